"""What an exact tail, or exact sinks, would be worth: KL per byte, before any cache has them.

Every query sees the last ``--recent`` tokens, itself included, and the first ``--sink`` ones
exactly, and the others as the package writes and reads them; the keys and values of both kinds are
kept unpacked. One line per setting, the spec alone first:

    python scripts/studies/tail_study.py --model tiny-qwen2 --text novel.txt \\
        --calibration c.safetensors --recent 1 4 16 64 --sink 4 \\
        --other int4-srft:group_size=32 k8v4-srft:group_size=64
"""

import argparse

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.models import base
from texts import windows_of
from tqdm import tqdm

import mlx_kvq
from mlx_kvq import ops
from mlx_kvq.calibration.set import CalibrationSet
from mlx_kvq.measure.baselines import own
from mlx_kvq.measure.quality import measure, summarize
from mlx_kvq.ops import plain


class Cache:
    """Exact and rounded keys and values of one layer."""

    group_size = None

    def __init__(self, fmt, window, recent, sink):
        self.format, self.window, self.recent, self.sink = fmt, window, recent, sink
        self.offset = 0
        self.exact: tuple | list = ()
        self.rounded: tuple | list = ()

    @property
    def bits(self):  # leads mlx-lm to its quantized attention, and that to this cache
        return self

    @property
    def state(self):
        return self.exact, self.rounded

    def update_and_fetch(self, k, v):
        rows, _ = plain.quantize_pack(k, v, self.format)
        kept = plain.dequantize(ops.Packed(rows, k.shape[2], self.format))
        sides = self.format.keys, self.format.values
        new = [side.output(y) for side, y in zip(sides, kept, strict=True)]
        if self.offset:
            k, v = (mx.concatenate([*a], axis=2) for a in zip(self.exact, (k, v), strict=True))
            new = [mx.concatenate([*a], axis=2) for a in zip(self.rounded, new, strict=True)]
        self.offset, self.exact, self.rounded = k.shape[2], (k, v), new
        return k, v

    def make_mask(self, N, return_array=False, window_size=None):
        return None  # attention makes its own


def attention(q, keys, values, scale, mask, bits, **_):
    cache = bits
    (k, v), (k_rounded, v_rounded) = cache.exact, cache.rounded
    B, Hq, L, D = q.shape
    T = cache.offset
    back = mx.arange(T - L, T)[:, None] - mx.arange(T)  # how far back a token is
    seen = back >= 0
    if cache.window is not None:
        seen = seen & (back < cache.window)
    exact = (back < cache.recent) | (mx.arange(T) < cache.sink)
    if T == L:  # the first chunk attends exactly, as in the package
        exact = mx.ones_like(exact)
    seen, exact = (mx.tile(a, (Hq // k.shape[1], 1)) for a in (seen, exact))
    q = (q * scale).reshape(B, k.shape[1], -1, D)
    logits = mx.where(exact, q @ k.swapaxes(-1, -2), q @ k_rounded.swapaxes(-1, -2))
    p = mx.softmax(mx.where(seen, logits, mx.finfo(mx.float32).min), axis=-1)
    out = mx.where(exact, p, 0) @ v + mx.where(exact, 0, p) @ v_rounded
    return out.reshape(B, Hq, L, -1)


def maker(model, spec, calibration, recent=0, sink=0):
    packed: list = mlx_kvq.make_prompt_cache(model, spec, calibration=calibration)
    layers = [(c.format, getattr(c, "max_size", None)) for c in packed]
    layouts = [fmt.layout for fmt, _ in layers]
    bits = np.mean([32 * lay.words / (lay.k_dim + lay.v_dim) for lay in layouts])
    return lambda: [Cache(*layer, recent, sink) for layer in layers], bits


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True, help="From `mlx_kvq calibrate`.")
    parser.add_argument("--spec", default="int4-srft:group_size=64,recent=0")
    parser.add_argument("--recent", nargs="*", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--sink", nargs="*", type=int, default=[4])
    parser.add_argument("--other", nargs="*", default=[], help="Specs to compare with.")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    args = parser.parse_args()

    model, tokenizer = load(args.model)[:2]
    model.set_dtype(mx.float32)
    calibration = CalibrationSet.load(args.calibration)
    settings = [(args.spec, 0, 0)]
    settings += [(args.spec, r, 0) for r in args.recent] + [(args.spec, 0, s) for s in args.sink]
    settings += [(spec, 0, 0) for spec in args.other]
    makers, bits = {"own": own(model).make}, {}
    for spec, recent, sink in settings:
        name = spec + (f" recent {recent}" if recent else "") + (f" sink {sink}" if sink else "")
        makers[name], stored = maker(model, spec, calibration, recent, sink)
        part = min(1.0, (recent + sink) / args.tokens)
        bits[name] = 16 * part + (1 - part) * stored
    base.quantized_scaled_dot_product_attention = attention  # type: ignore[assignment]
    steps = len(makers) * -(-args.tokens // args.chunk)
    windows = windows_of(tokenizer, args.text, args.windows, args.tokens)
    with tqdm(total=steps, desc="chunks") as bar:
        scores = measure(model, makers, windows, args.chunk, bar.update, batch=args.windows)
    first = np.mean([x.mean() for x in scores[next(iter(bits))].kl])
    for name, b in bits.items():
        kl = summarize(name, scores[name], scores["own"], 0).kl.mean
        print(f"{name:40} {b:.3f} bits  KL {kl:.5f}  {kl / first:.3f}")


if __name__ == "__main__":
    main()
