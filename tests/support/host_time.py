"""µs of the host that one layer of a decode step costs, before anything is evaluated.

    python -m tests.support.host_time                   # kernels stand in: any machine
    python -m tests.support.host_time --machine cuda

With a GPU its own kernels are called; without one, stand-ins that MLX builds graphs of. Least and
median of many steps over 28 layers, in the thread's own time: a busy machine disturbs less.
"""

import argparse
import time
from collections.abc import Callable

import mlx.core as mx

from mlx_kvq import ops
from mlx_kvq.caches.attention import packed_attention
from mlx_kvq.caches.single import PackedKVCache
from mlx_kvq.format.format import Format, make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import trial
from mlx_kvq.ops.gpu import jit, machine

LAYERS, TOKENS = 28, 1000
HEADS, KV_HEADS, DIM = 12, 2, 128


def stand_in(name: str) -> None:
    """Believe in this machine; kernels become sums of their inputs."""

    def kernel(*_) -> Callable:
        def launch(inputs, grid, threadgroup, output_shapes, output_dtypes):
            total = mx.stack([a.sum().astype(mx.float32) for a in inputs]).sum()
            pairs = zip(output_shapes, output_dtypes, strict=True)
            return [mx.broadcast_to(total.astype(dtype), shape) for shape, dtype in pairs]

        return launch

    kept: dict[tuple, Callable] = {}
    jit.kernel = lambda *key: kept.setdefault(key, kernel(*key))
    machine.language = lambda: name
    trial.works = lambda *_: True


def formats() -> list[Format]:
    """As a calibrated model has them: alike but for their numbers."""
    spec = Spec.parse("int4-srft")
    mus = (mx.random.normal((KV_HEADS, DIM)) for _ in range(2 * LAYERS))
    pairs = zip(mus, mus, strict=True)
    return [make_format(spec, DIM, keys=Calibration(a), values=Calibration(b)) for a, b in pairs]


def spread(step: Callable[[int], list[mx.array]], steps: int) -> tuple[float, float]:
    """Least and median µs per layer."""
    times = []
    for i in range(steps):
        start = time.thread_time()
        made = step(i)
        times.append((time.thread_time() - start) / LAYERS * 1e6)
        if i % 8 == 0:
            mx.eval(made)
        del made  # what freeing a graph takes is not the step's
    times.sort()
    return times[0], times[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", choices=["metal", "cuda"], default="metal")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    if ops.language() is None:
        stand_in(args.machine)
        print(f"stand-ins for the kernels of {args.machine}")
    k, q = (mx.random.normal((1, n, 1, DIM)).astype(mx.float16) for n in (KV_HEADS, HEADS))
    prompt = mx.random.normal((1, KV_HEADS, TOKENS, DIM)).astype(mx.float16)
    layers = formats()
    recent = layers[0].recent_at(TOKENS)
    rows, tail = ops.quantize_pack(prompt, prompt, layers[0], None, recent)
    mx.eval(k, q, rows, tail)
    caches = [PackedKVCache(fmt) for fmt in layers]
    for cache in caches:
        cache.update_and_fetch(prompt, prompt)

    def attend(i: int) -> list[mx.array]:
        at = TOKENS - i % 100
        return [ops.attend(q, ops.Packed(rows, at, fmt, tail), 0.1) for fmt in layers]

    def keep(i: int) -> list[mx.array]:
        return [ops.keep_exact(k, k, fmt, tail, recent) for fmt in layers]

    def step(i: int) -> list[mx.array]:
        return [packed_attention(q, *c.update_and_fetch(k, k), scale=0.1) for c in caches]

    for name, call in (("attend", attend), ("keep_exact", keep), ("cache and attend", step)):
        least, median = spread(call, args.steps)
        print(f"{name:18} {least:6.1f} {median:6.1f} µs a layer")


if __name__ == "__main__":
    main()
