"""Which scales to try for a group, how to choose one, and which one to store: KL of writers.

Variants of ``mlx_kvq.ops.plain`` write the rows, the package reads them. Prints the KL of each and
its ratio to the first, with the standard error of the windows' paired differences:

    python scripts/studies/scale_study.py --model tiny-qwen2 --text novel.txt \\
        --calibration c.safetensors
"""

import argparse

import mlx.core as mx
import numpy as np
from mlx_lm import load
from texts import windows_of
from tqdm import tqdm

from mlx_kvq.calibration.set import CalibrationSet
from mlx_kvq.format import levels as format_levels
from mlx_kvq.measure.baselines import candidate, own
from mlx_kvq.measure.quality import measure

SIX = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
THREE = (0.98, 0.92, 0.86)
# What codes are made with: fractions of the abs-max scale, chosen by the least squared error or the
# smallest angle, or the weights of the largest magnitude and of the rms; and what is stored.
VARIANTS = {
    "shipped": (format_levels.tried, "angle", "length"),
    "three": (THREE, "error", "length"),
    "three by angle": (THREE, "angle", "length"),
    ".95 .88": ((0.95, 0.88), "error", "length"),
    ".95": ((0.95,), "error", "length"),
    "moments": ({32: (0.95, 0.02), 64: (0.85, 0.2), 128: (0.7, 0.5)}, "moments", "length"),
    "shipped's scales, none refitted": (format_levels.tried, "angle", "step"),
    "six": (SIX, "error", "step"),
    "six, least squares": (SIX, "error", "least squares"),
    "six, length": (SIX, "error", "length"),
    "six, unbiased": (SIX, "error", "unbiased"),
    "18 from .6": (tuple(np.arange(0.6, 1.05, 0.025).tolist()), "error", "length"),
}


def step(fractions, rule):
    """In place of ``reference._step``."""

    def scale(y, bits, name):
        if name != "search" or bits == 8:
            return search(y, bits, name)
        group, outermost = y.shape[-1], format_levels.zero_code(bits, name)
        top = mx.abs(y).max(axis=-1, keepdims=True) / outermost
        if rule == "moments":
            of_top, of_rms = fractions[group]
            rms = mx.sqrt(mx.square(y).mean(axis=-1, keepdims=True))
            return of_top * top + of_rms / outermost * rms
        tried = top * mx.array(fractions(group, bits) if callable(fractions) else fractions)
        x, s = y[..., None, :], tried[..., None]
        levels = format_levels._codes(x, s, bits, name) - outermost
        if rule == "error":
            found = mx.square(x - s * levels).sum(axis=-1)
        else:
            found = -(x * levels).sum(axis=-1) / mx.linalg.norm(levels, axis=-1)
        return mx.take_along_axis(tried, mx.argmin(found, axis=-1, keepdims=True), axis=-1)

    search = format_levels._step
    return scale


def stored(rule):
    """In place of ``reference._stored``."""

    def scale(y, codes, step, bits, name):
        if name != "search" or bits == 8 or rule == "step":
            return step
        levels = codes - format_levels.zero_code(bits, name)
        yy, yl, ll = ((a * b).sum(axis=-1, keepdims=True) for a, b in (
            (y, y), (y, levels), (levels, levels)))  # fmt: skip
        found = {"length": mx.sqrt(yy / ll), "least squares": yl / ll, "unbiased": yy / yl}[rule]
        return mx.where(step > 0, format_levels._to_half(found), 0.0)

    return scale


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True, help="From `mlx_kvq calibrate`.")
    parser.add_argument("--spec", default="int4-srft:group_size=64,recent=0")
    parser.add_argument("--only", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    args = parser.parse_args()

    model, tokenizer = load(args.model)[:2]
    model.set_dtype(mx.float32)
    windows = windows_of(tokenizer, args.text, args.windows, args.tokens)
    given = CalibrationSet.load(args.calibration)
    makers = {"own": own(model).make, "packed": candidate(model, args.spec, calibration=given).make}
    first, shipped = None, format_levels._step
    for name in tqdm(args.only, desc="variants"):
        fractions, criterion, scale = VARIANTS[name]
        format_levels._step, format_levels._stored = step(fractions, criterion), stored(scale)
        scores = measure(model, makers, windows, args.chunk, batch=args.windows)["packed"]
        format_levels._step = shipped
        kl = np.array([x.mean() for x in scores.kl])
        first = kl if first is None else first
        ratio = kl.mean() / first.mean()
        error = (kl - ratio * first).std(ddof=1) / np.sqrt(len(kl)) / first.mean()
        tqdm.write(f"{name:32} {kl.mean():.5f}  {ratio:.3f} ± {error:.3f}")


if __name__ == "__main__":
    main()
