"""What each part of the calibration is worth, alone and with others: KL of int4 at the same bytes.

μ, σ and λ on keys and on values, chosen signs (a negative σ), and the seed with the least error
on calibration text; λ and σ of values are the closed forms of `docs/mathematics.md`. Prints a table
in Markdown, a column for the model as it is and for each key outlier: the KL and its ratio to what
the package does, with the standard error of the windows' paired differences.

    python scripts/studies/variant_study.py --model tiny-qwen2 --text heldout-novel.txt \\
        --calibration-text calibration-novels.txt
"""

import argparse
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from learned import choose_seed, choose_signs
from mlx_lm import load
from outliers import make_outlier
from rotation_study import collect
from texts import windows_of
from tqdm import tqdm

import mlx_kvq
from mlx_kvq.caches import seams
from mlx_kvq.calibration.fit import balanced_scale
from mlx_kvq.format import rotation
from mlx_kvq.format.format import Format, make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.measure.baselines import own
from mlx_kvq.measure.quality import measure
from mlx_kvq.model.plan import pack_caches
from mlx_kvq.stock import CachePath

SHIPPED = "**μ and σ on keys, μ on values**"
# name -> what keys get, what values get
VARIANTS = {
    SHIPPED: ("mu sigma", "mu"),
    "nothing": ("", ""),
    "μ on keys": ("mu", ""),
    "μ on values": ("", "mu"),
    "μ on both": ("mu", "mu"),
    "σ on keys": ("sigma", ""),
    "λ on keys": ("lam", ""),
    "λ on values": ("", "lam"),
    "λ on both": ("lam", "lam"),
    "μ and σ on keys": ("mu sigma", ""),
    "μ and λ on both": ("mu lam", "mu lam"),
    "as shipped, and σ on values": ("mu sigma", "mu sigma"),
    "… λ on keys": ("mu sigma lam", "mu"),
    "… λ on values": ("mu sigma", "mu lam"),
    "… λ on both": ("mu sigma lam", "mu lam"),
    "… chosen signs on both": ("mu sigma signs", "mu signs"),
    "… σ on values, λ and signs on both": ("mu sigma signs lam", "mu sigma signs lam"),
}


def fp32(a):
    return mx.array(np.asarray(a, dtype=np.float32))


def samples_of(model, windows, calibration, chunk):
    """(keys, values) of each layer, with μ and σ as the package's calibration has them, and a σ
    for the values from the columns of the output projection."""
    found = []
    for i, (keys, values) in enumerate(collect(model, windows, chunk)):
        layer = calibration.layers[(i,)]
        values = replace(values, mu=layer.values.mu)
        square = mx.square(values.x - values.mu[:, None]).mean(axis=1)
        columns = np.einsum("hdd->hd", np.array(values.weight, dtype=np.float64))
        values = replace(values, sigma=fp32(balanced_scale(np.array(square), columns)))
        found.append((replace(keys, mu=layer.keys.mu, sigma=layer.keys.sigma), values))
    return found


def balanced_lambda(s, R):
    """λ = (E[(R(q ⊙ σ))²] / E[(R((x − μ) ⊘ σ))²])^¼ per rotated channel, [H, D]."""
    rotated = mx.square(s.balanced @ R.T).mean(axis=1)
    weight = s.weight * s.sigma[:, :, None] * s.sigma[:, None]
    return fp32(balanced_scale(np.einsum("hii->hi", np.array(R @ weight @ R.T)), np.array(rotated)))


def part(s, names, stream, spec):
    """The calibration of one side of a layer that has only these parts."""
    s = replace(
        s,
        mu=s.mu if "mu" in names else mx.zeros_like(s.mu),
        sigma=s.sigma if "sigma" in names else mx.ones_like(s.sigma),
    )
    R = rotation.matrix(spec.rotation, spec.seed, stream, s.mu.shape[1])
    if "signs" in names:
        assert R is not None, "no rotation, no signs"
        s = replace(s, sigma=s.sigma * choose_signs(s, R, group=spec.group_size))
    return Calibration(s.mu, s.sigma, balanced_lambda(s, R) if "lam" in names else None)


def maker(model, samples, names, spec):
    """Caches whose keys and values get these parts."""
    formats: dict[CachePath, Format] = {}
    for i, sides in enumerate(samples):
        keys, values = (
            part(s, n.split(), stream, spec)
            for stream, (s, n) in enumerate(zip(sides, names, strict=True))
        )
        dims = (s.mu.shape[1] for s in sides)
        formats[(i,)] = make_format(spec, *dims, keys=keys, values=values)
    make = own(model).make
    return lambda: pack_caches(make(), formats)


def column(model, tokenizer, args):
    """Name -> KL of every window, and the seed that calibration text would choose."""
    novel = Path(args.calibration_text).read_text(encoding="utf-8")
    calibration = mlx_kvq.calibrate(model, tokenizer, novel)
    windows = windows_of(tokenizer, args.calibration_text, args.samples, args.tokens)
    samples = samples_of(model, windows, calibration, args.chunk)
    spec = Spec("int4", "srft", args.group_size, recent=0)
    makers = {"own": own(model).make}
    for name, names in tqdm(VARIANTS.items(), desc="variants", leave=False):
        makers[name] = maker(model, samples, names, spec)
    for seed in range(1, args.seeds):
        makers[f"seed {seed}"] = maker(model, samples, VARIANTS[SHIPPED], replace(spec, seed=seed))
    ones = [(k, replace(v, sigma=mx.ones_like(v.sigma))) for k, v in samples]
    chosen = choose_seed(ones, spec, tqdm(range(args.seeds), desc="seeds", leave=False))
    text = windows_of(tokenizer, args.text, args.windows, args.tokens)
    steps = len(makers) * -(-args.tokens // args.chunk)
    with tqdm(total=steps, desc="chunks", leave=False) as bar:
        scores = measure(model, makers, text, args.chunk, bar.update, batch=args.windows)
    kl = {n: np.array([x.mean() for x in s.kl]) for n, s in scores.items() if n != "own"}
    seeds = {0: kl[SHIPPED]} | {n: kl.pop(f"seed {n}") for n in range(1, args.seeds)}
    kl[f"the seed of {args.seeds} with the least error on calibration text"] = seeds[chosen]
    means = {n: x.mean() for n, x in seeds.items()}
    kl["the best seed in hindsight"] = seeds[min(means, key=lambda n: means[n])]
    kl["the worst"] = seeds[max(means, key=lambda n: means[n])]
    return kl


def cell(kl, first):
    ratio = kl.mean() / first.mean()
    error = (kl - ratio * first).std(ddof=1) / np.sqrt(len(kl)) / first.mean()
    digits = 3 if ratio < 2 else 1
    return f"{kl.mean():.4f} ({ratio:.{digits}f} ± {error:.{digits}f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Local model directory, not quantized.")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration-text", required=True)
    parser.add_argument("--outliers", nargs="+", default=["none", "scale", "bias"])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=8, help="0 to N - 1 are compared.")
    parser.add_argument("--samples", type=int, default=8, help="Windows that λ and signs see.")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    args = parser.parse_args()

    seams.install()
    columns = {}
    for outlier in tqdm(args.outliers, desc=Path(args.model).name):
        model, tokenizer = load(args.model)[:2]
        model.set_dtype(mx.float32)
        columns[outlier] = column(make_outlier(model, outlier), tokenizer, args)
    title = Path(args.model).name
    print(f"| {title} |", " | ".join({"none": "clean"}.get(c, c) for c in columns), "|")
    print("|---|" + "--:|" * len(columns))
    for name in next(iter(columns.values())):
        print(f"| {name} |", " | ".join(cell(c[name], c[SHIPPED]) for c in columns.values()), "|")


if __name__ == "__main__":
    main()
