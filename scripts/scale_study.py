"""Which scales to try for a group, and which one to store: KL of int4's writers.

Variants of ``mlx_kvq.reference`` write the rows, the package reads them. Prints the KL of each and
its ratio to the first, with the standard error of the windows' paired differences:

    python scripts/scale_study.py --model tiny-qwen2 --text novel.txt --calibration c.safetensors
"""

import argparse

import mlx.core as mx
import numpy as np
from mlx_lm import load
from texts import windows_of
from tqdm import tqdm

from mlx_kvq import reference
from mlx_kvq.baselines import candidate, own
from mlx_kvq.calibration import CalibrationSet
from mlx_kvq.quality import measure

SIX = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
VARIANTS = {
    "shipped": (reference.SEARCH, "length"),
    "shipped's scales, none refitted": (reference.SEARCH, "step"),
    "six": (SIX, "step"),
    "six, least squares": (SIX, "least squares"),
    "six, length": (SIX, "length"),
    "six, unbiased": (SIX, "unbiased"),
    "1 .9 .8, least squares": ((1.0, 0.9, 0.8), "least squares"),
    "1 .9 .8, length": ((1.0, 0.9, 0.8), "length"),
    ".95 .85, least squares": ((0.95, 0.85), "least squares"),
    ".95, least squares": ((0.95,), "least squares"),
    "18 from .6, least squares": (tuple(np.arange(0.6, 1.05, 0.025).tolist()), "least squares"),
}


def stored(rule):
    """In place of ``reference._stored``."""

    def scale(y, codes, step, bits, name):
        if name != "search" or bits == 8 or rule == "step":
            return step
        levels = codes - 7.5
        yy, yl, ll = ((a * b).sum(axis=-1, keepdims=True) for a, b in (
            (y, y), (y, levels), (levels, levels)))  # fmt: skip
        found = {"length": mx.sqrt(yy / ll), "least squares": yl / ll, "unbiased": yy / yl}[rule]
        return mx.where(step > 0, reference._to_half(found), 0.0)

    return scale


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True, help="From `mlx_kvq calibrate`.")
    parser.add_argument("--spec", default="int4-srft:group_size=64")
    parser.add_argument("--only", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    model.set_dtype(mx.float32)
    windows = windows_of(tokenizer, args.text, args.windows, args.tokens)
    given = CalibrationSet.load(args.calibration)
    makers = {"own": own(model).make, "packed": candidate(model, args.spec, calibration=given).make}
    first = None
    for name in tqdm(args.only, desc="variants"):
        fractions, rule = VARIANTS[name]
        reference.SEARCH, reference._stored = fractions, stored(rule)
        scores = measure(model, makers, windows, args.chunk, batch=args.windows)["packed"]
        kl = np.array([x.mean() for x in scores.kl])
        first = kl if first is None else first
        ratio = kl.mean() / first.mean()
        error = (kl - ratio * first).std(ddof=1) / np.sqrt(len(kl)) / first.mean()
        tqdm.write(f"{name:32} {kl.mean():.5f}  {ratio:.3f} ± {error:.3f}")


if __name__ == "__main__":
    main()
