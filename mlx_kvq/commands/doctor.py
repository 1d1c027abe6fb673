"""Check this machine: every kernel against the reference, with first timings.

Run it once on a Mac or an NVIDIA machine and paste the table into an issue.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
from tqdm import tqdm

from .. import ops
from ..format import levels
from ..format.format import Format, make_format
from ..format.spec import Spec
from ..measure.machine import machine

fused, plain = ops.BACKENDS["gpu"], ops.BACKENDS["plain"]

# (spec, head size, query heads, KV heads)
CASES = [
    ("int4-srft", 64, 8, 8),
    ("int4-srft", 80, 8, 2),
    ("int4-srft", 96, 6, 1),
    ("int4-srft", 112, 4, 4),
    ("int4-srft", 128, 12, 2),
    ("int4-srft:group_size=64", 128, 32, 8),
    ("int4-srht", 128, 8, 1),
    ("int8-srft", 128, 12, 2),
    ("k8v4-srft", 128, 12, 2),
    ("int4-srft:scale=absmax", 128, 16, 1),
    ("int4-srft", 192, 4, 2),
    ("int4-srft", 256, 4, 1),
    ("int4-srft:group_size=64", 256, 8, 4),
]
LENGTHS = (1, 37, 1000)
REPEATS = 20
CODES = 1e-3  # part of the codes that may differ from the reference, by one step
RELATIVE = {mx.float16: 2e-3, mx.bfloat16: 1e-2}


@dataclass
class Result:
    """One row of the table: an operation on one case."""

    op: str
    case: str
    error: float
    limit: float
    microseconds: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.error <= self.limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=None, help="Seed of the random data.")


def run(args: argparse.Namespace) -> int:
    """Print the machine and the table; exit status 0 if every kernel agrees, 1 if not."""
    seed = time.time_ns() % 2**32 if args.seed is None else args.seed
    for name, value in machine().items():
        print(f"{name:10} {value}")
    language = ops.language()
    if language is None:
        print("backend    reference (no GPU that MLX can use)")
        print("\nNo kernels run on this machine: packed caches work, in plain mx operations.")
        return 0
    print(f"backend    {language}\nseed       {seed}\n")
    results = list(tqdm(check(seed), total=3 * len(CASES) * len(RELATIVE), leave=False))
    print(f"{'':4} {'operation':14} {'case':44} {'error':>9} {'limit':>7} {'µs':>8}")
    for r in results:
        verdict = "ok" if r.passed else "FAIL"
        print(f"{verdict:4} {r.op:14} {r.case:44} {r.error:9.1e} {r.limit:7.0e} ", end="")
        print(r.failure or f"{r.microseconds:8.1f}")
    failed = sum(not r.passed for r in results)
    print(f"\n{len(results) - failed} of {len(results)} passed")
    return 1 if failed else 0


def check(seed: int) -> Iterator[Result]:
    """Every operation on every case and dtype, fused against reference."""
    mx.random.seed(seed)
    for text, D, Hq, Hkv in CASES:
        spec = Spec.parse(text)
        assert spec is not None
        fmt = make_format(spec, D)
        for dtype in RELATIVE:
            name = f"{text} D={D} heads={Hq}/{Hkv} {str(dtype).rpartition('.')[2]}"
            yield from _check_case(fmt, name, D, Hq, Hkv, dtype)


@contextmanager
def _on_cpu():
    """The reference in full fp32: MLX rounds fp32 matrix products to TF32 on CUDA."""
    with mx.stream(mx.cpu):
        yield


def _check_case(fmt: Format, name: str, D: int, Hq: int, Hkv: int, dtype) -> Iterator[Result]:
    T = max(LENGTHS)
    k = mx.random.normal((2, Hkv, T, D)).astype(dtype)
    v = mx.random.normal((2, Hkv, T, D)).astype(dtype)
    k[:, :, ::7] *= 20  # outliers
    q = mx.random.normal((2, Hq, 1, D)).astype(dtype)
    mx.eval(k, v, q)
    with _on_cpu():
        rows, tail = plain.quantize_pack(k, v, fmt, None, fmt.recent)
        mx.eval(rows, tail)

    def result(op, limit, compare, call):
        try:
            return Result(op, name, compare(), limit, _microseconds(call))
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return Result(op, name, float("nan"), limit, float("nan"), reason)

    def codes():
        got, kept = fused.quantize_pack(k, v, fmt, None, fmt.recent)
        if (off := _relative(kept, tail.astype(mx.float32))) > RELATIVE[dtype]:
            raise RuntimeError(f"the exact tail is off by {off:.1e}")
        kc, vc, *_ = levels.split(got, fmt.layout)
        kr, vr, *_ = levels.split(rows, fmt.layout)
        lay = fmt.layout
        apart = [
            mx.abs(levels.unpack_codes(a, bits) - levels.unpack_codes(b, bits))
            for a, b, bits in ((kc, kr, lay.k_bits), (vc, vr, lay.v_bits))
        ]
        return max(_number((d > 0).astype(mx.float32).mean()) for d in apart)

    def attend(q, length):
        return fused.attend(q, ops.Packed(rows, length, fmt, tail), D**-0.5)

    def attention():
        worst = 0.0
        for length in LENGTHS:
            got = attend(q, length)
            with _on_cpu():
                held = ops.Packed(rows, length, fmt, tail)
                expected = plain.attend(q.astype(mx.float32), held, D**-0.5)
                mx.eval(expected)
            worst = max(worst, _relative(got, expected))
        return worst

    def values():
        pairs = zip(
            fused.dequantize(ops.Packed(rows, T, fmt, tail), dtype),
            plain.dequantize(ops.Packed(rows, T, fmt, tail)),
            strict=True,
        )
        return max(_relative(a, b) for a, b in pairs)

    yield result(
        "quantize_pack",
        CODES,
        codes,
        lambda: fused.quantize_pack(k, v, fmt, None, fmt.recent),
    )
    yield result("attend", RELATIVE[dtype], attention, lambda: attend(q, T))
    yield result(
        "dequantize",
        RELATIVE[dtype],
        values,
        lambda: fused.dequantize(ops.Packed(rows, T, fmt), dtype),
    )


def _number(x: mx.array) -> float:
    return cast(float, x.item())


def _relative(got: mx.array, expected: mx.array) -> float:
    """Largest difference in a vector, relative to the vector's largest channel."""
    apart = mx.abs(got.astype(mx.float32) - expected).max(axis=-1)
    return _number((apart / mx.abs(expected).max(axis=-1)).max())


def _microseconds(call) -> float:
    """Median wall-clock time of one evaluated call, launch and synchronization included."""
    for _ in range(3):
        mx.eval(call())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)
