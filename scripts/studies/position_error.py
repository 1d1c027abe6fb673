"""What a calibration for one length of context costs at another: the expected squared error of a
logit over that of a calibration for just this length, the geometric mean over layers and heads.

    python scripts/studies/position_error.py --model M --for 1024 4096 mix:8192 --at 512 1024 8192

``4096`` is a calibration for the positions of contexts of 4096 tokens alone, ``mix:8192`` what
``calibrate --positions 8K`` makes: both from windows of 1024 tokens of the built-in text, by the
closed form of docs/mathematics.md. ``read:4096`` is made of windows of 4096 tokens as they were
read. With ``--text`` the columns are that text read in windows of their length, so the least error
is of a calibration that knew it; without, they are the closed form, and no text's noise is in them.

    python scripts/studies/position_error.py --model M --calibration-text novels.txt \\
        --text wikitext.txt --tokens 16384 --for read:1024 read:16384 mix:16384 --at 1024 16384
"""

import argparse
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
from mlx_lm import load

from mlx_kvq.calibration import moments
from mlx_kvq.calibration.fit import balanced_scale, sample_text
from mlx_kvq.calibration.positions import contexts
from mlx_kvq.stock import packable

LENGTH = 1024  # of a window for the closed form


class AsRead(moments.LayerMoments):
    """Moments of keys and queries where they are, as if no RoPE were known."""

    def add(self, keys, values, offset, rope):
        super().add(keys, values, offset, None)


def moments_of(model, ids, length, kind=moments.LayerMoments):
    """Path of a layer -> its moments from windows of ``length`` tokens."""
    caches, shapes = packable(model)
    windows = [ids[i : i + length] for i in range(0, ids.size, length)]
    with mock.patch.object(moments, "LayerMoments", kind):
        return moments.collect(model, caches, shapes, windows)


def powers(m, lengths):
    """μ, E[k²] and E[q²] per channel, [H, D] each, over contexts of these lengths."""
    mean, covariance = m.key_moments(lengths)
    var, queries = (np.einsum("hdd->hd", a) for a in (covariance, m.query_square(lengths)))
    return mean, var + mean**2, queries


def log_error(made, there):
    """Per head: log of the error under a calibration over the least one. Both are ``powers``: of
    what the calibration is made of, and of what it meets."""
    mu, k2, q2 = made
    sigma = balanced_scale(k2 - mu**2, q2)
    mean, k2, q2 = there
    left = k2 - 2 * mu * mean + mu**2
    least = np.sqrt((k2 - mean**2) * q2).sum(axis=-1) ** 2
    return np.log((left / sigma**2).sum(axis=-1) * (q2 * sigma**2).sum(axis=-1) / least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--for", dest="made", nargs="+",
        default=["1024", "4096", "8192", "32768", "mix:8192", "mix:32768"],
    )  # fmt: skip
    parser.add_argument(
        "--at", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384, 32768]
    )
    parser.add_argument("--tokens", type=int, default=2048, help="read of each text")
    parser.add_argument("--calibration-text", type=Path, help="default: the built-in text")
    parser.add_argument("--text", type=Path, help="default: the closed form")
    args = parser.parse_args()
    model, tokenizer, *_ = load(args.model)

    def tokens_of(path):
        text = path.read_text(encoding="utf-8")[: 16 * args.tokens] if path else sample_text()
        return mx.array(tokenizer.encode(text)[: args.tokens])

    ids = tokens_of(args.calibration_text)
    turned = moments_of(model, ids, LENGTH)
    layers = [path for path, m in turned.items() if m.rope is not None]
    text = tokens_of(args.text)
    there: dict[int, list] = {}
    for at in args.at:
        met = moments_of(model, text, at, AsRead) if args.text else turned
        there[at] = [powers(met[path], [at]) for path in layers]
    print("| made for |", " | ".join(map(str, args.at)), "|")
    print("|---|" + "--:|" * len(args.at))
    for name in args.made:
        kind, _, n = name.rpartition(":")
        of = moments_of(model, ids, int(n), AsRead) if kind == "read" else turned
        lengths = contexts(int(n)) if kind == "mix" else [int(n)]
        made = [powers(of[path], lengths) for path in layers]
        errors = [
            np.mean([log_error(*pair).mean() for pair in zip(made, there[at], strict=True)])
            for at in args.at
        ]
        print(f"| {name} |", " | ".join(f"{np.exp(e):.2f}" for e in errors), "|", flush=True)


if __name__ == "__main__":
    main()
