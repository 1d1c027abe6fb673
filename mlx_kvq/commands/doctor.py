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
QUERIES = 8  # of a draft, say
SEEN = ops.CAUSAL
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
    results = list(tqdm(check(seed), total=5 * len(CASES) * len(RELATIVE), leave=False))
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
            yield from _Case(fmt, name, Hq, Hkv, dtype).results()


@contextmanager
def _on_cpu():
    """The reference in full fp32: MLX rounds fp32 matrix products to TF32 on CUDA."""
    with mx.stream(mx.cpu):
        yield


class _Case:
    """The operations on random data of one shape, two sequences."""

    def __init__(self, fmt: Format, name: str, Hq: int, Hkv: int, dtype: mx.Dtype):
        self.fmt, self.name, self.dtype, T = fmt, name, dtype, max(LENGTHS)
        lay, heads = fmt.layout, (2, Hkv, T)
        self.k = mx.random.normal((*heads, lay.k_dim)).astype(dtype)
        self.v = mx.random.normal((*heads, lay.v_dim)).astype(dtype)
        self.k[:, :, ::7] *= 20  # outliers
        self.q = mx.random.normal((2, Hq, QUERIES, lay.k_dim)).astype(dtype)
        self.sinks = mx.random.normal((Hq,))
        self.starts = mx.array([0, 3], mx.int32)
        mx.eval(self.k, self.v, self.q, self.sinks)
        with _on_cpu():
            size = fmt.recent + QUERIES - 1
            self.rows, self.tail = plain.quantize_pack(self.k, self.v, fmt, None, size)
            mx.eval(self.rows, self.tail)

    def results(self) -> Iterator[Result]:
        T, exact = max(LENGTHS), RELATIVE[self.dtype]
        for op, limit, compare, call in (
            ("quantize_pack", CODES, self.codes, self.pack),
            ("attend", exact, self.decoded, lambda: self.attend(fused, self.q[:, :, :1], T)),
            # A query that sees few values, which cancel, is off by more of their sum.
            ("attend, masks", 4 * exact, self.masked, lambda: self.attend(fused, self.q, T, SEEN)),
            (
                "dequantize",
                exact,
                self.dequantized,
                lambda: fused.dequantize(self.held(T), self.dtype),
            ),
            ("restore", exact, self.restored, lambda: fused.restore(self.held(T), self.dtype)),
        ):
            try:
                yield Result(op, self.name, compare(), limit, _microseconds(call))
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                nan = float("nan")
                yield Result(op, self.name, nan, limit, nan, reason)

    def held(self, length: int) -> ops.Packed:
        return ops.Packed(self.rows, length, self.fmt, self.tail)

    def pack(self):
        return fused.quantize_pack(self.k, self.v, self.fmt, None, self.tail.shape[2])

    def codes(self) -> float:
        got, kept = self.pack()
        if (off := _relative(kept, self.tail.astype(mx.float32))) > RELATIVE[self.dtype]:
            raise RuntimeError(f"the exact tail is off by {off:.1e}")
        lay = self.fmt.layout
        sides = zip(levels.split(got, lay), levels.split(self.rows, lay), strict=True)
        apart = [
            levels.unpack_codes(a, bits) != levels.unpack_codes(b, bits)
            for (a, b), bits in zip(sides, (lay.k_bits, lay.v_bits), strict=False)
        ]
        return max(_number(d.astype(mx.float32).mean()) for d in apart)

    def attend(self, backend, q, length: int, mask: ops.Mask = ops.EVERY, sinks=None) -> mx.array:
        return backend.attend(q, self.held(length), q.shape[3] ** -0.5, mask, sinks)

    def off(self, *args) -> float:
        """How far the kernel's attention is from the reference's."""
        with _on_cpu():
            q, *rest = args
            expected = self.attend(plain, q.astype(mx.float32), *rest)
            mx.eval(expected)
        return _relative(self.attend(fused, *args), expected)

    def decoded(self) -> float:
        return max(self.off(self.q[:, :, :1], length) for length in LENGTHS)

    def masked(self) -> float:
        """Several queries: drafts, batches with padding, windows, sinks, a model's own mask."""
        T, allowed = max(LENGTHS), mx.arange(max(LENGTHS)) % 5 != 0
        padded = ops.Mask(True, 90, self.starts)
        cases = (SEEN,), (padded,), (padded, self.sinks), (ops.Mask(array=allowed),)
        return max(self.off(self.q, T, *case) for case in cases)

    def dequantized(self) -> float:
        T = max(LENGTHS)
        return _furthest(fused.dequantize(self.held(T), self.dtype), plain.dequantize(self.held(T)))

    def restored(self) -> float:
        held, chunk = self.held(max(LENGTHS)), (self.k[:, :, :9], self.v[:, :, :9])
        got = fused.restore(held, self.dtype, chunk)
        return _furthest(got, plain.restore(held, mx.float32, chunk))


def _furthest(got, expected) -> float:
    return max(_relative(a, b) for a, b in zip(got, expected, strict=True))


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
