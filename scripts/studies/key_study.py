"""What else could be done to keys, at long contexts: a centre for each block of tokens, and a full
balanced transform, each with and without feedback.

    python scripts/studies/key_study.py --model M --text wikitext.txt --lengths 1024 32000

Documents are read once with exact keys and values. At every length what a query does not read
exactly is then rounded in each way, and the tokens after it are decoded one at a time, all ways as
rows of a batch (``position_study.Decoding``; what leaves the newest tokens meanwhile stays exact).
Everything is calibrated on the built-in text, for as many positions as by default.

- *centre*: a block of 64 tokens is rounded without its own mean over tokens, which is kept in fp16
  (an eighth of a bit more). *before*: without the mean of the block before it.
- *full*: keys are turned by a matrix T per head, so that T E[k kᵀ] Tᵀ and T⁻ᵀ E[q qᵀ] T⁻¹ are the
  same: dense, where μ, σ and the rotation are a sum and a fast transform.

A row says the mean KL from the exact cache in nats, and the geometric mean of the tokens' KL as a
multiple of the first row's, with the standard error of its logarithm over documents and pieces of
eight tokens.
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load
from position_error import LENGTH, moments_of
from position_study import Decoding, Prompt, decode, geometric, read, rounded

from mlx_kvq.calibration.fit import (
    balanced_scale,
    default_positions,
    layer_calibration,
    sample_text,
)
from mlx_kvq.calibration.positions import LEAST, contexts, mean_turn
from mlx_kvq.format.feedback import damped
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.stock import packable

TOKENS = 2048  # of the calibration
BLOCK = 64
PIECE = 8  # tokens whose errors are taken for one observation


def fp32(a):
    return mx.array(np.asarray(a, dtype=np.float32))


class Turned:
    """Keys without their mean before RoPE, turned to the positions of ranges that begin at
    ``starts``: it is known from the position alone. σ is that of what is left."""

    def __init__(self, m, positions, values, spec, window, starts):
        lengths = contexts(positions)
        mu, K = m.key_moments(lengths)
        self.starts = np.array(starts)
        ends = np.append(self.starts[1:], positions)
        centres = np.stack([turned(m, a, b - a) for a, b in zip(starts, ends, strict=True)], axis=1)
        # All positions of a context count alike, and so do contexts.
        inside = [np.clip(n - self.starts, 0, ends - self.starts) / n for n in lengths]
        square = np.einsum("b,hbd,hbe->hde", np.mean(inside, axis=0), centres, centres)
        K = K + mu[:, :, None] * mu[:, None] - square
        Q = m.query_square(lengths)
        sigma = balanced_scale(*(np.einsum("hdd->hd", M) for M in (K, Q)))
        keys = Calibration(mu=fp32(np.zeros_like(mu)), sigma=fp32(sigma), metric=fp32(Q))
        D = mu.shape[-1], values.mu.shape[-1]
        self.fmt = make_format(spec, *D, keys=keys, values=values, window=window)
        self.centres = fp32(centres)[None]

    def __call__(self, sides, at=0):
        k, v = sides
        place = np.searchsorted(self.starts, at + np.arange(k.shape[2]), side="right") - 1
        c = self.centres[:, :, mx.array(place)]
        k, v = rounded([k - c, v], self.fmt)
        return [k + c, v]


def turned(m, start, size):
    """The mean of keys over ``size`` positions from ``start`` on, [H, D]."""
    mean = np.asarray(m.keys.mean)
    if m.rope is None:
        return mean
    a, b, angle = m.rope.turns(mean.shape[-1])
    turn = mean_turn(angle, [size]) * np.exp(1j * angle * start)
    z = (mean[:, a] + 1j * mean[:, b]) * turn
    out = np.empty_like(mean)
    out[:, a], out[:, b] = z.real, z.imag
    return out


def octaves(positions, parts):
    """Beginnings of ranges that grow with the position: 0, then ``parts`` to each doubling."""
    count = int(np.log2(positions / LEAST) * parts)
    return [0, *(int(LEAST * 2 ** (i / parts)) for i in range(count))]


def power(M, p):
    """Mᵖ of symmetric positive matrices [H, D, D]."""
    w, v = np.linalg.eigh(M)
    return (v * np.maximum(w, w.max(axis=-1, keepdims=True) * 1e-9)[:, None] ** p) @ v.swapaxes(
        1, 2
    )


class Full:
    """Keys k - μ turned by T, so that the spread of keys and of queries is the same matrix."""

    def __init__(self, m, positions, values, spec):
        mu, K = m.key_moments(contexts(positions))
        Q = damped(m.query_square(contexts(positions)))
        half, back = power(damped(K), 0.5), power(damped(K), -0.5)
        T = power(back @ power(half @ Q @ half, 0.5) @ back, 0.5)
        inverse = np.linalg.inv(T)
        metric = inverse.swapaxes(1, 2) @ Q @ inverse
        D = T.shape[-1]
        keys = Calibration(
            mu=fp32(np.zeros_like(mu)), sigma=fp32(np.ones_like(mu)), metric=fp32(metric)
        )
        self.fmt = make_format(spec, D, values.mu.shape[-1], keys=keys, values=values)
        self.mu, self.turn, self.back = fp32(mu)[None, :, None], fp32(T), fp32(inverse)

    def __call__(self, sides, at=0):
        k, v = sides
        k, v = rounded([(k - self.mu) @ self.turn.swapaxes(1, 2), v], self.fmt)
        return [k @ self.back.swapaxes(1, 2) + self.mu, v]


def centred(sides, at=0, *, fmt, mu, before=False):
    """Rounded without the mean of each block of keys, from the first token on."""
    k, v = sides
    n = k.shape[2]
    if n == 0:
        return sides
    room = mx.pad(k, [(0, 0), (0, 0), (0, -n % BLOCK), (0, 0)])
    blocks = mx.unflatten(room, 2, (-1, BLOCK))
    counts = mx.minimum(BLOCK, n - BLOCK * mx.arange(blocks.shape[2]))[:, None, None]
    means = (blocks.sum(axis=3, keepdims=True) / counts).astype(mx.float16).astype(mx.float32)
    if before:
        means = mx.concatenate([means[:, :, :1], means[:, :, :-1]], axis=2)
    away = mx.broadcast_to(means, blocks.shape).flatten(2, 3)[:, :, :n] - mu[None, :, None]
    k, v = rounded([k - away, v], fmt)
    return [k + away, v]


def ways(m, positions, window, spec, only=()):
    """Name -> what rounds keys and values of a layer with these moments."""
    of = layer_calibration(m, positions)
    D = m.keys.mean.shape[-1], m.values.mean.shape[-1]
    made: dict = {}
    for rounding in ("feedback", "nearest"):
        own = replace(spec, rounding=rounding)
        fmt = make_format(own, *D, keys=of.keys, values=of.values, window=window)
        by = partial(Turned, m, positions, of.values, own, window)
        centre = partial(partial, centred, fmt=fmt, mu=of.keys.mu)
        made |= {
            rounding: partial(partial, rounded, fmt=fmt),
            f"{rounding}, centre": centre,
            f"{rounding}, before": partial(centre, before=True),
            f"{rounding}, by position": partial(by, range(0, positions, BLOCK)),
            f"{rounding}, by octave": partial(by, octaves(positions, 1)),
            f"{rounding}, by half octave": partial(by, octaves(positions, 2)),
            f"{rounding}, full": partial(Full, m, positions, of.values, own),
        }
    return {name: make() for name, make in made.items() if name in (only or made)}


def log_ratio(values, first):
    """Of two [documents][steps]: mean log of KL over KL, and its standard error."""
    logs = [
        np.log(np.maximum(v, 1e-9) / np.maximum(f, 1e-9)).reshape(-1, PIECE).mean(axis=1)
        for v, f in zip(values, first, strict=True)
    ]
    each = np.concatenate(logs)
    return each.mean(), each.std(ddof=1) / np.sqrt(each.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="All of its layers are packed.")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--spec", type=Spec.parse, default=Spec("int4", "srft"))
    parser.add_argument(
        "--only", nargs="+", metavar="WAY", help="these of the ways, feedback first"
    )
    parser.add_argument("--first", type=int, default=4, help="tokens read exactly")
    parser.add_argument("--recent", type=int, default=64, help="newest tokens read exactly")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192], help="of a prompt")
    parser.add_argument("--decoded", type=int, default=64, help="tokens after a prompt")
    parser.add_argument("--documents", type=int, default=1, help="of each text")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer, *_ = load(args.model)
    model.set_dtype(mx.float32)
    positions = default_positions(model)
    ids = mx.array(tokenizer.encode(sample_text())[:TOKENS])
    moments = moments_of(model, ids, LENGTH)
    sizes = [getattr(c, "max_size", None) for c in packable(model)[0]()]
    layers = [
        ways(moments[(i,)], positions, size, args.spec, args.only) for i, size in enumerate(sizes)
    ]
    found: dict = {}
    for text in args.text:
        ids = mx.array(tokenizer.encode(text.read_text(encoding="utf-8")))
        for d in range(args.documents):
            document = ids[d * (ids.size // args.documents) :][: max(args.lengths) + args.decoded]
            prompts = [Prompt(size) for size in sizes]
            read(model, prompts, document[: max(args.lengths)])
            for length in args.lengths:
                rows = [
                    Decoding(
                        p, length, args.decoded, [*w.values()], args.first, args.recent, late=False
                    )
                    for p, w in zip(prompts, layers, strict=True)
                ]
                scores = decode(model, rows, document[length : length + args.decoded])
                for name, values in zip(layers[0], scores.T, strict=True):
                    found.setdefault(length, {}).setdefault(name, []).append(values)
                    print(f"  {text.name} {d}, {length}, {name}: {values.mean():.5f}", flush=True)
    for length, by_name in found.items():
        print(f"\n| {Path(args.model).name}, {length} tokens | KL | × |\n|---|--:|--:|")
        first = next(iter(by_name.values()))
        for name, values in by_name.items():
            mean, error = log_ratio(values, first)
            kl = np.mean(np.concatenate(values))
            print(f"| {name} | {kl:.5f} | {np.exp(mean):.2f} ± {np.exp(mean) * error:.2f} |")
    if args.json:
        args.json.write_text(
            json.dumps(
                [
                    {"length": n, "name": name, "kl": [v.tolist() for v in values],
                     "geometric": geometric(values)}
                    for n, by_name in found.items() for name, values in by_name.items()
                ]
            ),
            encoding="utf-8",
        )  # fmt: skip


if __name__ == "__main__":
    main()
