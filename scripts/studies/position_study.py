"""Which calibration is best at which length of context: KL of int4 with each, on a real model.

A document is read once with exact keys and values. For every length its first tokens are then
rounded as the package rounds them, under each calibration, and the tokens after them are decoded
one at a time, all calibrations side by side as rows of a batch. A query reads the ``--first`` and
the newest ``--recent`` tokens exactly. This leaves out what rounding does while a prompt is read,
so the figures are lower than those of a cache in use, but many calibrations cost little more than
one:

    python scripts/studies/position_study.py --model M --text wikitext.txt \\
        --calibration old=a.safetensors new=b.safetensors --lengths 1024 8192 --json study.json

A row says the mean KL from the exact cache in nats, the geometric mean of the tokens' KL, and each
document's mean.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import load
from mlx_lm.models import base
from mlx_lm.models.cache import create_attention_mask

import mlx_kvq
from mlx_kvq import ops
from mlx_kvq.calibration.set import CalibrationSet
from mlx_kvq.measure.quality import kl
from mlx_kvq.ops import plain

CHUNK = 512  # of the prompt


class Prompt:
    """Exact keys and values of all tokens of a document, also where a sliding layer drops them."""

    def __init__(self, window):
        self.window, self.offset = window, 0
        self.state = None

    def update_and_fetch(self, k, v):
        seen = self._before() + k.shape[2]
        if self.state is not None:
            k, v = (mx.concatenate([*a], axis=2) for a in zip(self.state, (k, v), strict=True))
        self.offset, self.state = k.shape[2], (k, v)
        return k[:, :, -seen:], v[:, :, -seen:]

    def _before(self):
        """Tokens that are read with a chunk, before it."""
        return min(self.offset, self.window - 1) if self.window else self.offset

    def make_mask(self, N, return_array=False, window_size=None):
        window, before = window_size or self.window, self._before()
        if window is not None and before + N > window:
            return base.create_causal_mask(N, before, window_size=window)
        return create_attention_mask(N, before, return_array, None)


class Decoding:
    """Of one layer: row 0 exact, row i as ``rounders[i - 1]`` leaves keys and values, the first and
    the newest tokens exact in all. What a window no longer sees is not rounded, and what leaves the
    newest while it decodes only if ``late``."""

    def __init__(self, prompt, length, steps, rounders, first, recent, late=True):
        self.window, self.rounders, self.recent = prompt.window, rounders, recent
        self.offset, self.first, self.late = length, first, late
        # What a window no longer sees is not kept: the arrays begin with this token.
        self.begin = max(0, length - self.window) if self.window else 0
        near = max(first, self.begin) - self.begin
        exact = [x[:, :, self.begin : length] for x in prompt.state]
        # The next query reads the tokens from here exactly.
        far = max(near, length - recent + 1 - self.begin)
        rows = [[x] for x in exact]
        for rounder in rounders:
            old = rounder([x[:, :, near:far] for x in exact], at=self.begin + near)
            for row, x, y in zip(rows, exact, old, strict=True):
                row.append(mx.concatenate([x[:, :, :near], y, x[:, :, far:]], axis=2))
        room = [(0, 0), (0, 0), (0, steps), (0, 0)]
        self.k, self.v = (mx.pad(mx.concatenate(row), room) for row in rows)
        mx.eval(self.k, self.v)

    def update_and_fetch(self, k, v):
        at, self.offset = self.offset - self.begin, self.offset + 1
        self.k[:, :, at : at + 1], self.v[:, :, at : at + 1] = k, v
        old = at - self.recent
        if self.late and old + self.begin >= self.first and old >= 0:
            for row, rounder in enumerate(self.rounders, 1):
                one = [x[row : row + 1, :, old : old + 1] for x in (self.k, self.v)]
                new = rounder(one, at=self.begin + old)
                self.k[row : row + 1, :, old : old + 1] = new[0]
                self.v[row : row + 1, :, old : old + 1] = new[1]
        end = self.offset - self.begin
        seen = max(0, end - self.window) if self.window else 0
        return self.k[:, :, seen:end], self.v[:, :, seen:end]

    def make_mask(self, N, return_array=False, window_size=None):
        return None  # one token, and what it may not see is not returned


def rounded(sides, fmt, at=0):
    """Keys and values [1, H, L, D] from position ``at`` on as they come out of the packed rows,
    wherever that is."""
    k, v = sides
    if k.size == 0:
        return sides
    rows, _ = plain.quantize_pack(k, v, fmt)
    kept = plain.dequantize(ops.Packed(rows, k.shape[2], fmt))
    return [t.output(y) for t, y in zip((fmt.keys, fmt.values), kept, strict=True)]


def read(model, caches, ids):
    """The prompt, without its logits."""
    for i in range(0, ids.size, CHUNK):
        model(ids[None, i : i + CHUNK], cache=caches)
        mx.eval([c.state for c in caches])


def decode(model, caches, ids):
    """KL [steps, rows] of every row from row 0 for each token that is read."""
    found = []
    for token in ids.tolist():
        rows = caches[0].k.shape[0]
        logits = model(mx.full((rows, 1), token), cache=caches)[:, -1].astype(mx.float32)
        logits = nn.log_softmax(logits, axis=-1)
        figures = kl(mx.broadcast_to(logits[:1], logits[1:].shape), logits[1:])
        mx.eval(figures, [(c.k, c.v) for c in caches])
        found.append(np.array(figures, dtype=np.float64))
    return np.stack(found)


def study(model, tokenizer, named, args):
    """(length, name) -> KL of each document, [steps] each."""
    windows, rounders = layers_of(model, named, args.spec)
    ids = mx.array(tokenizer.encode(args.text.read_text(encoding="utf-8")))
    longest = max(args.lengths) + args.decoded
    if ids.size < args.documents * longest:
        raise SystemExit(f"{args.text} has {ids.size} tokens, too few.")
    found: dict = {}
    for d in range(args.documents):
        start = d * (ids.size // args.documents)
        document = ids[start : start + longest]
        prompts = [Prompt(w) for w in windows]
        started = time.perf_counter()
        read(model, prompts, document[: max(args.lengths)])
        print(f"document {d}: {time.perf_counter() - started:.0f} s to read", flush=True)
        for length in args.lengths:
            caches = [
                Decoding(p, length, args.decoded, r, args.first, args.recent)
                for p, r in zip(prompts, rounders, strict=True)
            ]
            scores = decode(model, caches, document[length : length + args.decoded])
            for name, values in zip(named, scores.T, strict=True):
                found.setdefault((length, name), []).append(values)
                print(f"  {length} {name}: {values.mean():.5f}", flush=True)
    return found


def layers_of(model, named, spec):
    """The window of each layer, or None, and what rounds under each calibration."""
    made = [mlx_kvq.make_prompt_cache(model, spec, calibration=c) for c in named.values()]
    windows = [getattr(c, "max_size", None) for c in made[0]]
    return windows, [
        [partial(rounded, fmt=c.format) for c in layer] for layer in zip(*made, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="All of its layers are packed.")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--spec", default="int4-srft")
    parser.add_argument("--first", type=int, default=4, help="tokens read exactly")
    parser.add_argument("--recent", type=int, default=16, help="newest tokens read exactly")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="of a prompt")
    parser.add_argument("--decoded", type=int, default=64, help="tokens after a prompt")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    named = {}
    for given in args.calibration:
        name, _, file = given.partition("=")
        named[name] = CalibrationSet.load(file)
    model, tokenizer, *_ = load(args.model)
    model.set_dtype(mx.float32)
    found = study(model, tokenizer, named, args)
    rows = [
        {
            "model": Path(args.model).name, "length": length, "calibration": name,
            "kl": float(np.mean(values)), "geometric": geometric(values),
            "documents": [float(x.mean()) for x in values],
        }
        for (length, name), values in found.items()
    ]  # fmt: skip
    for row in rows:
        parts = ", ".join(f"{x:.5f}" for x in row["documents"])
        print(
            f"{row['model']}, {row['length']} tokens, {row['calibration']}: KL {row['kl']:.5f} "
            f"({parts}), geometric {row['geometric']:.6f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def geometric(values) -> float:
    """The geometric mean of the tokens' KL; rounding can make that of a certain token negative."""
    return float(np.exp(np.mean(np.log(np.maximum(np.concatenate(values), 1e-9)))))


if __name__ == "__main__":
    main()
