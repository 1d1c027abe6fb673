"""Cycles of what the emulator counts, by instruction throughputs (metal-benchmarks)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx

from tests.emulator import Counters, arithmetic, toolchain

from .work import Work

# cycles in the four main pipelines, and in the one for the rest (metal-benchmarks, "Instruction
# Throughputs" and "ALU Layout"). A class that is not here is free: modifiers, and conversions
# between widths, which operands do by themselves.
SIMPLE = {
    **{f"{op}_{t}": 1 for op in ("fma", "add", "mul", "compare") for t in ("f32", "f16")},
    "add_int": 1, "compare_int": 1, "bitwise": 1, "select": 1, "int64": 1,
}  # fmt: skip
COMPLEX = {
    "shift": 4, "convert": 4, "round": 4, "exp": 4, "log": 4, "mul_int": 4, "sqrt": 8,
    "div_f32": 6, "div_f16": 6, "div_int": 12, "transcendental": 14,
}  # fmt: skip
REDUCTION, SHUFFLE, MATRIX = 14.5, 2.0, 20.0
SCALARS = re.compile(r"_shape$|_strides?$|^(N|scale|info|keep|blocks)$")  # of a whole launch


def work_of(c: Counters, bytes_: float) -> Work:
    """What the emulator counted, in cycles."""
    lanes = c.arithmetic
    main = sum(lanes.get(k, 0) * n for k, n in SIMPLE.items())
    rest = sum(lanes.get(k, 0) * n for k, n in COMPLEX.items())
    main += sum(lanes.get(k, 0) for k in COMPLEX)  # they take a slot as well
    # Neighbours are loaded together, 8 bytes at a time on average.
    main += (sum(c.bytes_read.values()) + sum(c.bytes_written.values())) / 8
    main += (c.threadgroup_bytes_read + c.threadgroup_bytes_written) / 4
    main, rest = main / 32, rest / 32
    for name, n in c.simd.items():
        if "matrix" in name or "multiply" in name:
            main += n * MATRIX
        else:
            light = "shuffle" in name or name in ("simd_any", "simd_all")
            main += n * (SHUFFLE if light else REDUCTION)
    groups = c.threads // 32 // c.threadgroups
    cached = sum(n for name, n in c.bytes_read.items() if not SCALARS.search(name))
    return Work(main, rest, bytes_, c.threadgroups, groups, cached=float(cached))


def contracted(c: Counters, bytes_: float) -> Work:
    """``work_of`` a kernel whose every float addition is to a product of the same expression, as
    MLX's are. Metal's compiler makes one FMA of them in every math mode (measured on M4,
    Sarek#315), the emulator's does not. Ours write ``fma``."""
    work = work_of(c, bytes_)
    added = min(c.arithmetic.get("add_f32", 0), c.arithmetic.get("mul_f32", 0))
    return replace(work, main=work.main - added / 32)


@contextmanager
def free_widening() -> Iterator[None]:
    """Conversions between float widths counted as free, in a cache of their own."""
    classify, digest = arithmetic.classify, toolchain._digest_of_emulator

    def without(line: str) -> tuple[str, int]:
        name, count = classify(line)
        free = name == "convert" and re.search(r"\bfp(ext|trunc)\b", line)
        return ("sign", count) if free else (name, count)

    arithmetic.classify = without
    toolchain._digest_of_emulator = lambda: digest() + b"free widening"
    try:
        yield
    finally:
        arithmetic.classify, toolchain._digest_of_emulator = classify, digest


def normal(*shape: int) -> mx.array:
    """Inputs of counted launches: fp16, of a normal distribution."""
    return mx.random.normal(shape).astype(mx.float16)
