"""Processor times behind the choices of the reference path on CPU.

    python scripts/bench_cpu.py

Scores of a token's queries, the rotation, and storing tokens, each beside the obvious way to do
it. (The operations as a whole, beside other caches: mlx_kvq benchmark --cpu-time.)
"""

import shutil
import time
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from mlx_kvq.format import levels, rotation
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.measure.timing import interleave, spread
from mlx_kvq.ops import plain

SHAPES = ((12, 2, 128), (4, 1, 256))  # query heads, KV heads, head size


def compare(title: str, ways: dict, unit: float = 1.0) -> None:
    def chain(way):
        def run(steps: int) -> None:
            for _ in range(steps):
                mx.eval(way())

        return run

    times = interleave(
        {name: chain(way) for name, way in ways.items()}, steps=16, clock=time.process_time
    )
    cells = ", ".join(f"{n} {1e3 * spread(t).median / unit:.4g}" for n, t in times.items())
    print(f"{title}: {cells}", flush=True)


def scores() -> None:
    print("\nScores of one token, ms: mlx's transposed product, and codes turned over")
    for Hq, Hkv, D in SHAPES:
        fmt = make_format(Spec("int4", "srft"), D)
        lay = fmt.layout
        for T in (1024, 4096, 16384):
            k = mx.random.normal((1, Hkv, T, D))
            (rows, _), q = plain.quantize_pack(k, k, fmt), mx.random.normal((1, Hkv, Hq // Hkv, D))
            mx.eval(rows, q)
            T -= 24  # a cache's buffer has room for more, save at each 256th token

            def product(rows=rows, q=q, T=T, lay=lay):
                words, _, scales, _ = levels.split(rows[:, :, :T], lay)
                return plain._matmul(
                    q, words, scales, lay.k_bits, lay.k_group, "search", transpose=True
                )

            def turned(rows=rows, q=q, T=T, fmt=fmt):
                return plain._scores(q, rows, T, fmt)

            compare(f"{Hq}/{Hkv} D={D} T={T}", {"transposed": product, "turned over": turned})


def rotations() -> None:
    print("\nRotation, µs per vector: by the matrix, by the transform")
    for D in (128, 256):
        R = rotation.matrix("srft", 0, 0, D)
        assert R is not None
        for n in (1, 12, 4096):
            x = mx.random.normal((n, D))
            mx.eval(x)
            ways = {
                "matrix": partial(mx.matmul, x, R.T),
                "transform": partial(rotation.srft, x, 0, 0),
            }
            compare(f"D={D}, {n} vectors", ways, unit=n / 1e3)


def storing() -> None:
    print("\nStoring, µs per vector of K or V: as it is, compiled, mlx-lm's kv4")
    for _, Hkv, D in SHAPES:
        fmt = make_format(Spec("int4", "srft"), D)
        for L in (1, 2048):
            k = mx.random.normal((1, Hkv, L, D))
            mx.eval(k)

            def pack(k, v, fmt=fmt):
                return plain.quantize_pack(k, v, fmt)[0]

            ways: dict[str, Callable] = {"as it is": partial(pack, k, k)}
            if shutil.which("g++"):  # what mlx compiles with on Linux
                ways["compiled"] = partial(mx.compile(pack), k, k)
            ways["kv4"] = lambda k=k: (mx.quantize(k, 64, 4), mx.quantize(k, 64, 4))
            compare(f"{Hkv} heads, D={D}, {L} tokens", ways, unit=2 * Hkv * L / 1e3)


if __name__ == "__main__":
    scores()
    rotations()
    storing()
