"""The rotations compared: SRFT, SRHT, Householder, quaternion, learned, none.

For every rotation, with and without centring and balanced scales (μ, σ): the error on the
calibration text that it was learned or chosen on, and KL and perplexity on held-out text, fed in
chunks. The table of README.md is its output. Usage:

    python scripts/studies/rotation_study.py --model tiny-qwen2 --outlier scale \\
        --text novel.txt --calibration-text other-novels.txt --json study.json
"""

import argparse
import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from learned import Samples, choose_signs, errors, learn_rotation
from mlx_lm import load
from outliers import make_outlier
from texts import windows_of
from tqdm import tqdm

from mlx_kvq.caches import seams
from mlx_kvq.calibration.fit import balanced_scale
from mlx_kvq.format import rotation
from mlx_kvq.format.feedback import whitened
from mlx_kvq.format.format import Format, make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.measure.baselines import own
from mlx_kvq.measure.quality import measure, summarize
from mlx_kvq.model.plan import pack_caches
from mlx_kvq.stock import CachePath

RANDOM = ("none", "srft", "srht", "householder", "quaternion")
# name -> (base, objective, λ too)
LEARNED = {
    "learned, mse": ("none", "mse", False),
    "learned + λ, mse": ("none", "mse", True),
    "learned·srft, mse": ("srft", "mse", False),
    "learned·srft + λ, mse": ("srft", "mse", True),
    "learned + λ, weighted": ("none", "weighted", True),
    "learned·srft + λ, weighted": ("srft", "weighted", True),
}
BALANCED = {
    "learned, weighted": ("none", "weighted", False),
    "learned + λ, weighted": ("none", "weighted", True),
    "learned·srft + λ, weighted": ("srft", "weighted", True),
}
# (rotation, channels of a group or None for all, scale rule, with μ and σ)
PER_TOKEN = [
    ("none", None, "paper", False),
    ("none", 64, "paper", False),
    ("srft", None, "paper", False),
    ("srft", 64, "paper", False),
    ("srft", None, "search", False),
    ("none", None, "search", True),
    ("srft", None, "search", True),
]


@contextmanager
def recorded(caches):
    """Collects (q, k, v) of every attention while the block runs, per layer."""
    found: list[tuple[list, list, list]] = [([], [], []) for _ in caches]
    last = [0]
    attention = mx.fast.scaled_dot_product_attention

    def watched(q, *args, **kwargs):
        found[last[0]][0].append(q)
        return attention(q, *args, **kwargs)

    for i, cache in enumerate(caches):

        def update(k, v, i=i, update=cache.update_and_fetch):
            found[i][1].append(k)
            found[i][2].append(v)
            last[0] = i
            return update(k, v)

        cache.update_and_fetch = update
    mx.fast.scaled_dot_product_attention = watched
    try:
        yield found
    finally:
        mx.fast.scaled_dot_product_attention = attention


def collect(model, windows, chunk):
    """Samples of keys and of values for every layer."""
    parts: list[tuple[list, list, list]] = [([], [], []) for _ in model.layers]
    for window in windows:
        caches = own(model).make()
        with recorded(caches) as found:
            for start in range(0, window.size, chunk):
                mx.eval(model(window[None, start : start + chunk], cache=caches))
        for layer, now in zip(parts, found, strict=True):
            for kind, arrays in zip(layer, now, strict=True):
                kind.append(mx.concatenate(arrays, axis=2)[0])  # [H, L, D]
    samples = []
    for layer, qkv in zip(model.layers, parts, strict=True):
        q, k, v = (mx.concatenate(a, axis=1) for a in qkv)
        H, D = k.shape[0], k.shape[2]
        q = q.reshape(H, -1, D)  # the query heads of a group together
        out = layer.self_attn.o_proj.weight.reshape(-1, H, q.shape[1] // k.shape[1], D)
        gram = mx.einsum("ohid,ohie->hde", out, out)
        centred = k - k.mean(axis=1, keepdims=True)
        square = [np.array(mx.square(a).mean(axis=1), dtype=np.float64) for a in (centred, q)]
        sigma = mx.array(balanced_scale(*square).astype(np.float32))
        qq = q.swapaxes(-1, -2) @ q / q.shape[1]
        keys = Samples(k, qq, k.mean(axis=1), sigma)
        values = Samples(v, gram, v.mean(axis=1), mx.ones(v.shape[::2]))
        mx.eval(k, v, qq, gram, sigma)
        samples.append((keys, values))
    return samples


def plain(s):
    return replace(s, mu=mx.zeros_like(s.mu), sigma=mx.ones_like(s.sigma))


def base(name, stream, D, seed=0):
    R = rotation.matrix(name, seed, stream, D)
    return mx.eye(D) if R is None else R


def maker(model, spec, layers):
    """Caches whose layers hold these (samples, R, λ) for keys and for values."""
    formats: dict[CachePath, Format] = {}
    for i, sides in enumerate(layers):
        calibrations = [
            Calibration(
                s.mu,
                s.sigma,
                None if lam is None else mx.tile(lam, (s.mu.shape[0], 1)),
                s.weight if t == rotation.KEYS and spec.rounding == "feedback" else None,
            )
            for t, (s, _, lam) in enumerate(sides)
        ]
        dims = [s.mu.shape[1] for s, _, _ in sides]
        fmt = make_format(spec, *dims, keys=calibrations[0], values=calibrations[1])
        for transform, (_, R, _) in zip((fmt.keys, fmt.values), sides, strict=True):
            transform.__dict__["matrix"] = R  # in place of the cached property
        formats[(i,)] = fmt
    make = own(model).make
    return lambda: pack_caches(make(), formats)


def mean_errors(layers, spec):
    """Keys' and values' relative errors, plain and weighted, averaged over layers."""
    found = [
        [errors(s, R, lam, group=spec.group_size, rule=spec.scale) for s, R, lam in sides]
        for sides in layers
    ]
    return np.mean(np.array(found), axis=0).tolist()


def fixed(data, name, seed=0):
    """Layers with a random rotation and no λ."""
    return [
        [(s, base(name, t, s.x.shape[2], seed), None) for t, s in enumerate(sides)]
        for sides in data
    ]


def signed(layers, group):
    """The same rotations after the best signs found for them."""
    return [
        [(replace(s, sigma=s.sigma * choose_signs(s, R, group=group)), R, lam) for s, R, lam in l]
        for l in layers  # noqa: E741
    ]


def study(samples, group, steps, wanted):
    """Yields (name, spec, layers): every rotation, for the data as it is and after μ and σ."""
    spec = Spec("int4", "none", group, recent=0)
    for balanced, learned in ((False, LEARNED), (True, BALANCED)):
        suffix = " | μ σ" if balanced else ""
        data = samples if balanced else [tuple(plain(s) for s in sides) for sides in samples]
        for name in RANDOM:
            yield name + suffix, spec, fixed(data, name)
        for name in ("srft", "srht"):
            yield f"{name}, chosen signs{suffix}", spec, signed(fixed(data, name), group)
        for name, (start, objective, with_lambda) in learned.items():
            if wanted is not None and name not in wanted:
                continue
            layers: list[list] = []
            for sides in tqdm(data, desc=name + suffix, leave=False):
                layers.append([])
                for t, s in enumerate(sides):
                    R = base(start, t, s.x.shape[2])
                    options = {"weighted": objective == "weighted", "with_lambda": with_lambda}
                    layers[-1].append(
                        (s, *learn_rotation(s, R, group=group, steps=steps, **options))
                    )
            yield name + suffix, spec, layers
    spec = Spec("int4", "none", group, rounding="feedback", recent=0)
    yield "srft, feedback | μ σ", spec, fixed(samples, "srft")
    layers = []
    for keys, values in tqdm(samples, desc="learned, weighted, feedback | μ σ", leave=False):
        # make_format moves σ of the keys for feedback; R is learned after it.
        moved = whitened(Calibration(keys.mu, keys.sigma, metric=keys.weight)).sigma
        options = {"group": group, "steps": steps}
        layers.append(
            [
                (s, *learn_rotation(seen, base("none", t, s.x.shape[2]), **options))
                for t, (s, seen) in enumerate(
                    [(keys, replace(keys, sigma=moved)), (values, values)]
                )
            ]
        )
    yield "learned, weighted, feedback | μ σ", spec, layers
    mixed = [[fast[0], now[1]] for fast, now in zip(fixed(samples, "srft"), layers, strict=True)]
    yield "srft keys, learned values, feedback | μ σ", spec, mixed
    for name, size, rule, balanced in PER_TOKEN:
        data = samples if balanced else [tuple(plain(s) for s in sides) for sides in samples]
        title = f"{name}, {'per token' if size is None else f'group {size}'}, {rule}"
        spec = Spec("int4", "none", size or samples[0][0].x.shape[2], scale=rule, recent=0)
        yield title + (" | μ σ" if balanced else ""), spec, fixed(data, name)


def seeds(samples, group, n):
    """Yields (name, spec, layers) for SRFT and SRHT with the seeds 0 to n - 1."""
    for balanced in (False, True):
        suffix = " | μ σ" if balanced else ""
        data = samples if balanced else [tuple(plain(s) for s in sides) for sides in samples]
        for name in ("srft", "srht"):
            for seed in range(n):
                layers = fixed(data, name, seed)
                yield f"{name} seed {seed}{suffix}", Spec("int4", "none", group, recent=0), layers


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration-text", required=True)
    parser.add_argument("--outlier", default="none", choices=("none", "scale", "bias"))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200, help="Of learning.")
    parser.add_argument("--seeds", type=int, default=0, help="Compare so many seeds instead.")
    parser.add_argument("--learned", nargs="*", help="Only these of the learned ones.")
    parser.add_argument("--json")
    args = parser.parse_args()

    seams.install()
    model, tokenizer = load(args.model)[:2]
    model.set_dtype(mx.float32)
    make_outlier(model, args.outlier)
    text = windows_of(tokenizer, args.text, args.windows, args.tokens)
    samples = collect(
        model, windows_of(tokenizer, args.calibration_text, 8, args.tokens), args.chunk
    )

    if args.seeds:
        found = seeds(samples, args.group_size, args.seeds)
    else:
        found = study(samples, args.group_size, args.steps, args.learned)
    makers, calibration = {"own": own(model).make}, {}
    for name, spec, layers in found:
        makers[name] = maker(model, spec, layers)
        calibration[name] = mean_errors(layers, spec)
    steps = args.windows * len(makers) * -(-args.tokens // args.chunk)
    with tqdm(total=steps, desc="text") as bar:
        scores = measure(model, makers, text, args.chunk, bar.update)
    rows: list[dict] = []
    for name in makers:
        r = summarize(name, scores[name], scores["own"], 0)
        rows.append({"name": name, "kl": r.kl.mean, "kl_windows": r.windows["kl"],
                     "change": [r.change.mean, r.change.low, r.change.high],
                     "errors": calibration.get(name)})  # fmt: skip
    title = f"{Path(args.model).name} {args.outlier}, group {args.group_size}"
    print(title)
    print(f"{'rotation':36} {'keys mse':>9} {'logits':>8} {'val mse':>8} {'KL':>8} {'change':>8}")
    for row in rows[1:]:
        e = row["errors"] or [[float("nan")] * 2] * 2
        print(
            f"{row['name']:36} {e[0][0]:9.5f} {e[0][1]:8.5f} {e[1][0]:8.5f} "
            f"{row['kl']:8.4f} {100 * row['change'][0]:+7.2f} %"
        )
    if args.json:
        Path(args.json).write_text(json.dumps({"title": title, "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
