"""What a calibration for one length of context costs at another: the expected squared error of a
logit over that of a calibration for just this length, the geometric mean over layers and heads.

    python scripts/studies/position_error.py --model M --for 1024 4096 mix:8192 --at 512 1024 8192

``4096`` is a calibration for the positions of contexts of 4096 tokens alone, ``mix:8192`` what
``calibrate --positions 8K`` makes. One pass over the built-in text gives the moments; the rest is
the closed form of docs/mathematics.md, without the noise of a measurement.
"""

import argparse

import mlx.core as mx
import numpy as np
from mlx_lm import load

from mlx_kvq.calibration.fit import balanced_scale, sample_text
from mlx_kvq.calibration.moments import collect
from mlx_kvq.calibration.positions import contexts, spread
from mlx_kvq.stock import packable


def powers(m, lengths):
    """μ, E[k²] and E[q²] per channel, [H, D] each, over contexts of these lengths."""
    mean, square = spread(np.asarray(m.keys.mean), m.keys.square, m.rope, lengths)
    queries = spread(np.zeros_like(mean), m.queries.square, m.rope, lengths)[1]
    return mean, *(np.einsum("hdd->hd", a) for a in (square, queries))


def log_error(m, made_for, length):
    """Of one layer, per head: log of the error under a calibration over the least one."""
    mu, k2, q2 = powers(m, made_for)
    sigma = balanced_scale(k2 - mu**2, q2)
    mean, k2, q2 = powers(m, [length])
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
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    model, tokenizer, *_ = load(args.model)
    ids = mx.array(tokenizer.encode(sample_text())[: args.tokens])
    caches, shapes = packable(model)
    windows = [ids[i : i + 1024] for i in range(0, ids.size, 1024)]
    found = [m for m in collect(model, caches, shapes, windows).values() if m.rope is not None]
    print("| made for |", " | ".join(map(str, args.at)), "|")
    print("|---|" + "--:|" * len(args.at))
    for name in args.made:
        kind, _, n = name.rpartition(":")
        lengths = contexts(int(n)) if kind == "mix" else [int(n)]
        errors = [np.mean([log_error(m, lengths, at).mean() for m in found]) for at in args.at]
        print(f"| {name} |", " | ".join(f"{np.exp(e):.2f}" for e in errors), "|")


if __name__ == "__main__":
    main()
