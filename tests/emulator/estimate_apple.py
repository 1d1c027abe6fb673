"""An ESTIMATE of the kernels' time on Apple GPUs, where nothing has been measured yet.

    python -m tests.emulator.estimate_apple            # the tables of docs/performance.md, a minute
    python -m tests.emulator.estimate_apple --sweep    # numbers of splits, and where the cycles go
    python -m tests.emulator.estimate_apple --check    # beside times that others published
    python -m tests.emulator.estimate_apple --json docs/pictures/scale.json  # for scripts/scale.py

The emulator runs the Metal kernels and counts what their threads do; MLX's own
attention, from the headers in its wheel, is run and counted likewise. Counts become time by the
instruction throughputs that philipturner/metal-benchmarks measured on M1:

- A core starts four instructions of 32 lanes a cycle. FMA, additions, comparisons, bitwise
  operations and selects take 1 cycle of that, a shuffle or ballot 2, a SIMD sum or maximum 14.5, an
  8x8x8 matrix product 20 (MetalFlashAttention's prompts run at 85 % of 16 on M1: 18.8).
- Shifts, integer products, conversions between integers and floats, rounding, exp2 and log2 go
  through one more pipeline, a quarter as wide (4 cycles; 6 a reciprocal, 8 a root), beside the
  others: the slower of the two counts.
- Few SIMD groups do not fill a core: 2.75 times the cycles with 4 of them, 1.6 with 8, none from
  24 on; fewer threadgroups than cores leave cores idle.
- Bytes: every input once, every output once, at a part of the chip's nominal bandwidth.
- What SIMD groups read, from caches as well: 64 bytes a cycle and core. MLX's attention reads a key
  once for each query head.
- A load or store is one instruction for 8 bytes of device memory, or 4 of threadgroup memory.

Every figure is a range:

- best: registers cost nothing; instructions and bytes overlap, the largest counts.
- worst: as many SIMD groups as registers allow, each spill and fill once a tile (Mesa's compiler,
  ``agx/table.json``: up to 255 registers, so that a core holds 12 SIMD groups, not 24), and what is
  read is not hidden behind so few: instructions and bytes are added. Caches give ``CACHED`` bytes a
  cycle and core, and an Ultra ``APART`` of its bandwidth.

MLX's kernels take 47 to 123 registers (``exp`` compiled as ``exp2``), so that a core is full; on M1
and M2 alone, whose caches are small, their reads are added at worst as well. ``--check`` says how
far all this is from what others measured.

Rounding keys with feedback is a chain of D / 8 dependent blocks: its time is that of the latencies
on the chain (:func:`chain`), not of counted instructions.

Not in it: the price of a launch (about the same number of them, tests.support.launches), but as
part of ``LAYER``, threadgroup memory but for its instructions, address arithmetic beyond one
instruction each, and what newer chips do better than M1. The ratio of two kernels under the same
model is worth more than either.
"""

import argparse
import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_kvq import ops
from mlx_kvq.caches.rows import WAITING
from mlx_kvq.format.format import Format, make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import gpu as fused
from mlx_kvq.ops import plain
from mlx_kvq.ops.gpu import attention, tuning
from mlx_kvq.ops.gpu.plan import plan
from tests.emulator import Counters, arithmetic, emulated, run, toolchain
from tests.emulator.mlx_kernels import mlx_source
from tests.support import calls

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
OCCUPANCY = {1: 11.0, 4: 2.75, 8: 1.6, 24: 1.0}  # SIMD groups a core -> cycles, times as many
# Of nominal bandwidth: 530 of 614 GB/s on M5 Max and 680 of 800 on M1 Ultra (mlx#3837), 266 of 307
# on M5 Pro (mlx#4076), each measured with a plain kernel.
REACHED = 0.86
# Of an Ultra, at worst: 475 of 800 GB/s, by a kernel on M1 Ultra that only loads, launched as an
# attention kernel is (mlx#3837).
APART = 0.59
# Bytes a cycle that a core reads from caches: 64 at best (metal-benchmarks); at worst what
# llama.cpp's attention got from M2 Ultra, 29.8, and from M4 Max and M5 Max, 40 (llama.cpp#23114).
CACHED, CACHED_OLD, CACHED_NEW = 64, 30, 40
# Of a layer in a step of one token, beside its weights, attention and the token stored: the median
# of what published rates of 4-bit models at short context leave (``--check``).
LAYER = 70e-6
FLOPS = 0.62  # of nominal, in large products: 17.4 of 28.3 TFLOP/s on M3 Ultra (Rapid-MLX#258)
FILL = 4  # cycles of a spill or fill, a guess
TILE = 16  # keys
# Cycles from an instruction to one that needs it, at little occupancy (metal-benchmarks, "raw").
LATENCY = {"fma": 3.9, "select": 6.4, "round": 5.4, "shuffle": 5.5, "sum": 29.0, "root": 10.7}
MISSED = 350e-9  # seconds of a load that no cache has; a guess, nothing is published


@dataclass(frozen=True)
class Chip:
    """Cores, GHz and GB/s as published; ``kind`` is the last letter of Metal's architecture,
    ``old`` says that caches are those of M1 and M2."""

    name: str
    kind: str
    cores: int
    clock: float
    bandwidth: float
    old: bool = False


M1 = Chip("M1", "g", 8, 1.278, 68.3, True)
M2_ULTRA = Chip("M2 Ultra", "d", 76, 1.398, 800, True)
M3_ULTRA = Chip("M3 Ultra", "d", 80, 1.38, 819)
M4_MAX = Chip("M4 Max", "s", 40, 1.578, 546)
CHIPS = (M1, M2_ULTRA, M3_ULTRA, M4_MAX)
M1_ULTRA = Chip("M1 Ultra", "d", 64, 1.296, 800, True)
M3_PRO = Chip("M3 Pro", "s", 18, 1.38, 150)
M5_PRO = Chip("M5 Pro", "s", 20, 1.62, 307)
M5_MAX = Chip("M5 Max", "s", 40, 1.62, 614)
# MLX's attention of one token as others measured it, launches in a row, K and V of several buffers
# in turn: query and KV heads, D -> tokens and microseconds. From GB/s where those are given. All of
# MLX 0.32.0 or a little later: kernels that read one key at a time; today's read four.
PUBLISHED = [
    ("mlx#4077", M5_MAX, (32, 4, 128), {8192: 53.4, 16384: 87.6, 32768: 156.2}),
    ("mlx#4077", M5_MAX, (64, 8, 64), {8192: 73.5, 16384: 130.2, 32768: 244.0}),
    ("mlx#4076", M5_PRO, (32, 32, 128), {2048: 140.4, 8192: 476.0, 32768: 1910.8}),
    ("mlx#4076", M5_PRO, (32, 8, 128), {2048: 35.8, 8192: 127.6, 32768: 508.4}),
    ("mlx#4076", M5_PRO, (32, 4, 128), {2048: 32.3, 8192: 91.2, 32768: 353.2}),
    ("mlx#4076", M5_PRO, (64, 8, 64), {2048: 55.2, 8192: 148.5, 32768: 563.9}),
    ("mlx#3837", M1_ULTRA, (32, 4, 256), {100000: 2300.0}),
]
# Tokens a second of 4-bit models at short context by MLX: weights, of 4.5 bits, and layers.
STEPS = [
    ("mlx#2007", M4_MAX, "Gemma 3 1B", 1.0e9, 26, 308.2),
    ("mlx#2007", M4_MAX, "Gemma 3 4B", 3.88e9, 34, 142.6),
    ("Rapid-MLX#633", M3_ULTRA, "Qwen3 0.6B", 0.6e9, 28, 387.6),
    ("Rapid-MLX#634", M3_ULTRA, "Gemma 3 1B", 1.0e9, 26, 261.1),
    ("Rapid-MLX#636", M3_ULTRA, "Qwen3 8B", 8.19e9, 36, 112.9),
    ("Rapid-MLX#630", M3_ULTRA, "Qwen2.5 14B", 14.8e9, 48, 66.4),
]
# What 17,000 tokens of context add to a step, ms (mlx#2007): heads, D, layers that see all of them,
# layers with a window, the window.
LONGER = [
    ("Gemma 3 1B", M4_MAX, (4, 1, 256), 4, 22, 512, 1e3 / 284.337 - 1e3 / 308.223),
    ("Gemma 3 4B", M4_MAX, (8, 4, 256), 5, 29, 1024, 1e3 / 120.819 - 1e3 / 142.64),
]
# llama.cpp's attention over q8_0 keys and values, tuned: what so many tokens add to a step of Qwen3
# 0.6B's 28 layers, microseconds a layer (llama.cpp#26570).
Q8_0 = (M2_ULTRA, (16, 8, 128), 28, 240.28, {8192: 175.74, 16384: 136.16, 32768: 98.94})


@dataclass(frozen=True)
class Work:
    """Of one launch: cycles of SIMD groups in either pipeline, bytes, and its size.

    Args:
        main, rest (float): Cycles.
        spilled (float): Cycles of spills and fills, if registers matter.
        bytes (float): Read and written, each once.
        cached (float): Bytes that SIMD groups read, from caches or not.
        threadgroups (float), simd_groups (int): Of the launch, and of a threadgroup.
        resident (float): SIMD groups that a core's registers hold.
    """

    main: float
    rest: float
    bytes: float
    threadgroups: float
    simd_groups: int
    spilled: float = 0.0
    resident: float = 24.0
    cached: float = 0.0

    def times(self, n: float) -> "Work":
        return replace(
            self,
            main=self.main * n,
            rest=self.rest * n,
            spilled=self.spilled * n,
            bytes=self.bytes * n,
            cached=self.cached * n,
            threadgroups=self.threadgroups * n,
        )

    def on(self, registers: "Registers") -> "Work":
        """With what a compiler says of the kernel."""
        return replace(self, resident=registers.resident)

    def seconds(self, chip: Chip, registers: bool = False) -> tuple[float, float]:
        """By instructions, and by bytes."""
        cores = min(chip.cores, max(1.0, self.threadgroups))
        share = self.threadgroups / cores
        uneven = np.ceil(share) / share if share >= 1 else 1.0
        resident = min(24.0, share * self.simd_groups)
        cycles = max(self.main, self.rest)
        if registers:
            resident = min(resident, self.resident)
            cycles += self.spilled
        points = sorted(OCCUPANCY)
        slow = np.interp(resident, points, [OCCUPANCY[p] for p in points])
        reached = chip.bandwidth * 1e9 * REACHED
        return cycles * slow * uneven / (4 * cores * chip.clock * 1e9), self.bytes / reached

    def reading(self, chip: Chip, rate: float) -> float:
        """Seconds of what SIMD groups read, at so many bytes a cycle and core."""
        return self.cached / (
            min(chip.cores, max(1.0, self.threadgroups)) * rate * chip.clock * 1e9
        )

    def best(self, chip: Chip) -> float:
        return max(*self.seconds(chip), self.reading(chip, CACHED))

    def worst(self, chip: Chip) -> float:
        """Where a core holds fewer SIMD groups than fill it its loads are not hidden; nor are they
        on M1 and M2, whose caches are small."""
        instructions, bytes_ = self.seconds(chip, registers=True)
        if chip.kind == "d":
            bytes_ *= REACHED / APART
        reading = max(bytes_, self.reading(chip, CACHED_OLD if chip.old else CACHED_NEW))
        if self.resident < 24 or chip.old:
            return instructions + reading
        return max(instructions, reading)


@dataclass(frozen=True)
class Registers:
    """What Mesa's compiler says of a kernel: SIMD groups a core holds, spills and fills."""

    resident: float
    spills: int

    @classmethod
    def of(cls, kernel: str, D: int, variant: str) -> "Registers":
        rows = json.loads((Path(__file__).parent / "agx" / "table.json").read_text())
        for row in rows:
            same = (row["kernel"], row["D"], row["dtype"]) == (kernel, D, "float16")
            if same and variant in row["variants"]:
                return cls(row["max_threads"] / 32, row["spills"] + row["fills"])
        raise ValueError(f"agx/table.json has no {kernel}, D = {D}, {variant!r}.")


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


COUNTED = ("main", "rest", "cached")  # of a launch, by the emulator


def random(*shape: int) -> mx.array:
    return mx.random.normal(shape).astype(mx.float16)


@dataclass
class Linear:
    """Work of a launch that is so much for each part, each key and each exact token."""

    part: Work
    key: Work
    exact: Work

    @classmethod
    def fit(
        cls, at: Callable[..., Work], short: int, long: int, parts: int, exact: tuple = ()
    ) -> "Linear":
        """``at(keys, parts)`` at two lengths; ``at(keys, parts, n)`` for two numbers ``exact``."""
        few, many = exact or (0, 0)
        a, b = at(short, parts, *exact[:1]), at(long, parts, *exact[:1])
        c = at(short, parts, many) if exact else a
        nothing = Work(0, 0, 0, 0, a.simd_groups)

        def slope(high: Work, n: int) -> Work:
            given = {k: (getattr(high, k) - getattr(a, k)) / n for k in COUNTED}
            return replace(nothing, **given)

        key = slope(b, long - short)
        each = slope(c, many - few) if exact else nothing
        given = {
            k: (getattr(a, k) - short * getattr(key, k) - few * getattr(each, k)) / parts
            for k in COUNTED
        }
        part = replace(a, **given, threadgroups=a.threadgroups / parts, spilled=0.0)
        # A tile is one SIMD group's: 16 keys share its spills.
        return cls(part, replace(key, spilled=a.spilled), each)

    def __call__(self, keys: float, parts: float, bytes_: float, exact: float = 0) -> Work:
        p = self.part.times(parts)
        given = {
            k: getattr(p, k) + keys * getattr(self.key, k) + exact * getattr(self.exact, k)
            for k in COUNTED
        }
        return replace(p, **given, spilled=keys * self.key.spilled, bytes=bytes_)


class Ours:
    """Our kernels for one format and its heads, as models launch them: calibrated, with exact
    newest and first tokens."""

    def __init__(self, fmt: Format, Hq: int, Hkv: int):
        self.fmt, self.Hq, self.Hkv, self.D = fmt, Hq, Hkv, fmt.layout.k_dim
        self.heads = Hq, Hkv, self.D
        exact = (64, 256)
        self.finish = Linear.fit(self._attend("attend_finish"), 512, 1024, 1, exact)
        self.store = Linear.fit(self._attend("attend_store"), 1024, 2048, 2, exact)
        self.combine = {parts: self._combined(parts) for parts in (2, 16)}

    def _counted(self, T: int, parts: int, exact: int = 64) -> list[Counters]:
        rows = calls.quantize_pack(
            plain, random(1, self.Hkv, T, self.D), random(1, self.Hkv, T, self.D), self.fmt
        )
        q = random(1, self.Hq, 1, self.D)
        tail, first = random(1, self.Hkv, exact, 2 * self.D), random(1, self.Hkv, 4, 2 * self.D)
        mx.eval(rows, q, tail, first)
        packed = ops.Packed(rows, T, self.fmt, tail, first=ops.First(first, 4), recent=exact)
        with emulated("counted") as e:
            mx.eval(fused.attend(q, packed, self.D**-0.5, parts=parts))
        return e.counters

    def _attend(self, kernel: str):
        def at(T: int, parts: int, exact: int) -> Work:
            c = next(c for c in self._counted(T, parts, exact) if kernel in c.kernel)
            blocks = -(-self.Hq // self.Hkv // 8) * self.Hkv
            spilled = registers.spills * FILL / TILE * blocks
            return replace(work_of(c, 0).on(registers), spilled=spilled)

        heads = self.Hq // self.Hkv
        rows = tuning.vector_rows(self.fmt.layout, tuning.TUNING["metal"], heads, 1)
        said = f", {rows} heads" if rows else ""
        registers = Registers.of(kernel, self.D, f"calibrated, tail, first{said}")
        return at

    def _combined(self, parts: int) -> Work:
        c = self._counted(64 * parts, parts)[-1]
        registers = Registers.of("combine", self.D, "calibrated, tail, first")
        return work_of(c, 4.0 * self.Hq * self.D * parts).on(registers)

    def attend(self, T: int, parts: int, B: int = 1) -> list[Work]:
        """The launches of one token's attention over T keys, of B sequences."""
        exact = self.fmt.recent_at(T) + self.fmt.first
        rows = B * self.Hkv * (4.0 * self.fmt.layout.words * T + 4 * self.D * exact)
        if parts == 1:
            return [self.finish(B * T, B, rows, B * exact)]
        few, many = self.combine[2], self.combine[16]
        per = {k: (getattr(many, k) - getattr(few, k)) / 14 for k in COUNTED}
        given = {k: getattr(few, k) + (parts - 2) * per[k] for k in COUNTED}
        last = replace(few, **given, bytes=4.0 * self.Hq * self.D * parts).times(B)
        return [self.store(B * T, B * parts, rows + last.bytes, B * exact), last]

    def parts(self, T: int, B: int = 1) -> int:
        with emulated():  # the launch sizes of Metal
            q = mx.zeros((B, self.Hq, 1, self.D))
            rows = mx.zeros((B, self.Hkv, T, self.fmt.layout.words), mx.uint32)
            return attention.grid(q, ops.Packed(rows, T, self.fmt)).parts(T, 1, None, True)

    def _of_pack(self, c: Counters, n: int, variant: str) -> Work:
        token = self.Hkv * (4 * self.D + 4 * self.fmt.layout.words)
        registers = Registers.of("quantize_pack", self.D, variant)
        # A SIMD group packs a set of four vectors or more at a time.
        spilled = registers.spills * FILL * 2 * self.Hkv * n / 4
        return replace(work_of(c, token * n).on(registers), spilled=spilled)

    def token(self, T: int) -> Work:
        """keep_exact of one token of a context of T."""
        size = self.fmt.recent_at(T)
        x, tail = random(1, self.Hkv, 1, self.D), random(1, self.Hkv, size, 2 * self.D)
        mx.eval(x, tail)
        with emulated("counted") as e:
            mx.eval(fused.keep_exact(x, x, self.fmt, tail, size))
        registers = Registers.of("keep_exact", self.D, "calibrated, L=1")
        return work_of(e.counters[0], self.Hkv * size * 8 * self.D).on(registers)

    def packing(self) -> Work:
        """pack_rotated of the tokens that waited, keys to the nearest level."""
        y = random(1, self.Hkv, WAITING, 2 * self.D)
        mx.eval(y)
        with emulated("counted") as e:
            mx.eval(fused.pack_rotated(y, self.fmt))
        return self._of_pack(e.counters[0], WAITING, "calibrated, rotated, L=16")

    def prompt(self, L: int, feedback: bool = False) -> Work:
        """quantize_pack of L tokens; keys to the nearest level, or with feedback."""
        n = 512
        k, v = random(1, self.Hkv, n, self.D), random(1, self.Hkv, n, self.D)
        fmt = with_feedback(self.fmt) if feedback else self.fmt
        mx.eval(k, v, fmt.arrays)
        with emulated("counted") as e:
            mx.eval(calls.quantize_pack(fused, k, v, fmt))
        return self._of_pack(e.counters[0], n, "calibrated, tail, L=512").times(L / n)

    def dequantize(self, L: int) -> Work:
        n = 512
        rows = calls.quantize_pack(
            plain, random(1, self.Hkv, n, self.D), random(1, self.Hkv, n, self.D), self.fmt
        )
        mx.eval(rows)
        with emulated("counted") as e:
            mx.eval(calls.dequantize(fused, rows, n, self.fmt, mx.float16))
        token = self.Hkv * (4 * self.D + 4 * self.fmt.layout.words)
        registers = Registers.of("dequantize", self.D, "no tail")
        return work_of(e.counters[0], token * n).on(registers).times(L / n)


def with_feedback(fmt: Format) -> Format:
    """The same format with keys rounded with feedback; for counting any metric will do."""
    heads, D = fmt.heads or 1, fmt.layout.k_dim
    given = fmt.keys.calibration
    keys = replace(given, metric=mx.broadcast_to(mx.eye(D), (heads, D, D)))
    spec = replace(fmt.spec, rounding="feedback")
    return make_format(spec, D, keys=keys, values=fmt.values.calibration)


def chain(D: int, group: int) -> tuple[float, int]:
    """Cycles from one instruction to the next that one key with feedback takes
    (kernels/feedback.metal), and how often it waits for a block of the matrix."""
    t, own = LATENCY, group // 32 if group % 32 == 0 else -(-D // 32)
    pick = (own - 1) * t["select"]  # of_slice

    def spread(slices: float) -> float:
        """Errors go to eight lanes by as many shuffles, and are added to slices in two sums."""
        return t["shuffle"] + 7 * SHUFFLE + max(5 * t["fma"], 8 * slices)

    nearest = t["fma"] + t["round"] + 2 * t["select"] + t["fma"]
    block = pick + nearest + t["fma"] + t["select"] + spread(own)
    # Once the group's scale is known, on average to half of the slices.
    again = pick + t["fma"] + t["select"] + spread(D / 64)
    # Largest channel, two scales tried, the scale of the levels' length, damage looked for twice.
    scale = 3 * t["sum"] + 2 * (nearest + 2 * t["sum"]) + 2 * t["root"] + 2 * t["shuffle"]
    blocks, groups = D // 8, D // group
    waits = blocks + blocks - group // 8  # the first group has none before it
    return blocks * block + (waits - blocks) * again + groups * scale, waits


def feedback_seconds(chip: Chip, D: int, group: int) -> tuple[float, float]:
    """What feedback adds to the write of a key: at best its loads are hidden, at worst not."""
    cycles, waits = chain(D, group)
    best = cycles / (chip.clock * 1e9)
    return best, best + waits * MISSED


def contracted(c: Counters, bytes_: float) -> Work:
    """``work_of`` a kernel whose every float addition is to a product of the same expression, as
    MLX's are. Metal's compiler makes one FMA of them in every math mode (measured on M4,
    Sarek#315), the emulator's does not. Ours write ``fma``."""
    work = work_of(c, bytes_)
    added = min(c.arithmetic.get("add_f32", 0), c.arithmetic.get("mul_f32", 0))
    return replace(work, main=work.main - added / 32)


class Theirs:
    """MLX's attention in fp16 for a number of heads, of one query."""

    def __init__(self, Hq: int, Hkv: int, D: int):
        self.Hq, self.Hkv, self.D = Hq, Hkv, D
        self.single = Linear.fit(self._single, 512, 1024, 1)
        self.first = Linear.fit(self._first, 1024, 2048, 32)
        self.second = {blocks: self._second(blocks) for blocks in (32, 64)}

    def _source(self, name: str, arguments: str, blocks: int = 32) -> str:
        flags = ("mask", "bool_mask", "float_mask", "sinks")
        names = [f if f.startswith(("bool", "float")) else f"has_{f}" for f in flags]
        names += ["query_transposed", "do_causal"]
        constants = "".join(f"constant bool {n} = false;\n" for n in names)
        constants += f"constant int blocks = {blocks};\n"
        return mlx_source("sdpa_vector.h", name, arguments, constants)

    def _arrays(self, T: int) -> list:
        q, k, v = (random(1, h, n, self.D) for h, n in ((self.Hq, 1), (self.Hkv, T), (self.Hkv, T)))
        mx.eval(q, k, v)
        strides = [np.uint64(s) for s in (T * self.D, self.D, T * self.D, self.D)]
        none = np.int32(0)
        rest = [mx.zeros(8, mx.bool_), mx.zeros(8, mx.float16), none, none, none]
        return [q, k, v, np.int32(T), *strides, np.float32(self.D**-0.5), *rest]

    def _single(self, T: int, parts: int) -> Work:
        source = self._source("sdpa_vector", f"float16_t, {self.D}")
        q, k, v, n, *rest = self._arrays(T)
        inputs = [q, k, v, np.int32(self.Hq // self.Hkv), n, *rest, mx.zeros(8, mx.float16)]
        inputs.append(np.int32(0))
        _, c = run(
            source, inputs, [q.shape], [mx.float16], (self.Hq * 1024, 1, 1), (1024, 1, 1),
            mode="counted", max_threads=1024,
        )  # fmt: skip
        return contracted(c, 0)

    def _first(self, T: int, blocks: int) -> Work:
        source = self._source("sdpa_vector_2pass_1", f"float16_t, {self.D}", blocks)
        group = self.Hq // self.Hkv
        shapes = [(self.Hq, blocks, self.D), (self.Hq, blocks), (self.Hq, blocks)]
        _, c = run(
            source, [*self._arrays(T), mx.zeros(8, mx.float16)], shapes,
            [mx.float16, mx.float32, mx.float32],
            (self.Hkv * 32, group, blocks), (32, group, 1), mode="counted",
        )  # fmt: skip
        return contracted(c, 0)

    def _second(self, blocks: int) -> Work:
        source = self._source("sdpa_vector_2pass_2", f"float16_t, {self.D}", blocks)
        inputs = [random(self.Hq, blocks, self.D), mx.zeros((self.Hq, blocks))]
        inputs += [mx.zeros((self.Hq, blocks)), np.int32(blocks)]
        mx.eval(inputs[:3])
        _, c = run(
            source, inputs, [(1, self.Hq, 1, self.D)], [mx.float16], (self.Hq * 1024, 1, 1),
            (1024, 1, 1), mode="counted", max_threads=1024,
        )  # fmt: skip
        return contracted(c, 2.0 * self.Hq * self.D * blocks)

    def blocks(self, T: int, chip: Chip) -> int:
        """As in mlx/backend/metal/scaled_dot_product_attention.cpp, 0 for a single pass."""
        group = self.Hq // self.Hkv
        if not (chip.kind in "sd" and T >= 1024) and not (group > 1 and T >= 4096):
            return 0
        if chip.kind == "s":
            sizes = ((1024, 64), (8192, 128), (32768, 256), (65536, 512))
            return next((b for n, b in sizes if n >= T), 1024) if group > 4 else 64
        if chip.kind == "d":
            if group <= 2 and T > 8192:
                return 256
            return 128 if group < 6 or T < 16384 else 512 if T < 65536 else 1024
        return 64 if group >= 4 else 32

    def attend(self, T: int, chip: Chip, B: int = 1) -> list[Work]:
        bytes_ = 4.0 * self.D * self.Hkv * T * B
        if not (blocks := self.blocks(T, chip)):
            return [self.single(B * T, B, bytes_)]
        a, b = self.second[32], self.second[64]
        more = (blocks - 32) / 32
        given = {k: getattr(a, k) + more * (getattr(b, k) - getattr(a, k)) for k in COUNTED}
        last = replace(a, **given, bytes=2.0 * self.Hq * self.D * blocks).times(B)
        return [self.first(B * T, B * blocks, bytes_ + last.bytes), last]


def total(launches: list[Work], chip: Chip) -> tuple[float, float, float, float]:
    """Microseconds by instructions and by bytes; and the estimate, at best and at worst."""
    pairs = [w.seconds(chip) for w in launches]
    best, worst = ([getattr(w, name)(chip) for w in launches] for name in ("best", "worst"))
    return tuple(1e6 * sum(x) for x in (*zip(*pairs, strict=True), best, worst))


def span(low: float, high: float, digits: int = 3) -> str:
    """A range, rounded."""
    a, b = (f"{x:.0f}" if x >= 10 ** (digits - 1) else f"{x:.{digits}g}" for x in (low, high))
    return a if a == b else f"{a} to {b}"


def check() -> None:
    """MLX's attention by this model, beside what others measured; then what the rest is made of."""
    print(
        "| from | chip | heads, D | tokens | measured µs | estimate µs | measured / best, worst |"
    )
    print("|---" * 7 + "|")
    best = []
    for source, chip, (Hq, Hkv, D), times in PUBLISHED:
        theirs = Theirs(Hq, Hkv, D)
        for T, measured in times.items():
            _, _, low, high = total(theirs.attend(T, chip), chip)
            best.append(measured / low)
            print(
                f"| {source} | {chip.name} | {Hq} / {Hkv}, {D} | {T} | {measured:.1f} "
                f"| {span(low, high)} | {measured / low:.2f}, {measured / high:.2f} |",
                flush=True,
            )
    low, middle, high = np.quantile(best, (0, 0.5, 1))
    print(f"\nmeasured / best: median {middle:.2f}, {low:.2f} to {high:.2f}")
    longer()
    of_layers()
    quantized()


def longer() -> None:
    print("\nWhat 17,000 tokens add to a step (mlx#2007), ms\n")
    print("| chip | model | measured | estimate |")
    print("|---" * 4 + "|")
    for name, chip, heads, full, windowed, window, measured in LONGER:
        theirs = Theirs(*heads)
        ends = []
        for at in (2, 3):
            far, near, short = (
                total(theirs.attend(T, chip), chip)[at] for T in (17000, window, 64)
            )
            ends.append((full * far + windowed * near - (full + windowed) * short) / 1e3)
        print(f"| {chip.name} | {name} | {measured:.2f} | {span(*ends)} |")


def of_layers() -> None:
    """What published rates leave for a layer beside the weights."""
    print("\n| from | chip | model | step, ms | weights, ms | the rest, µs a layer |")
    print("|---" * 6 + "|")
    found = []
    for source, chip, name, weights, layers, rate in STEPS:
        read = weights * 4.5 / 8 / (chip.bandwidth * 1e9 * REACHED)
        found.append((1 / rate - read) / layers)
        print(
            f"| {source} | {chip.name} | {name} | {1e3 / rate:.2f} | {1e3 * read:.2f} "
            f"| {1e6 * found[-1]:.0f} |"
        )
    print(f"\nmedian {1e6 * np.median(found):.0f} µs a layer")


def quantized() -> None:
    """llama.cpp's attention over 8-bit keys and values beside the estimate of ours."""
    chip, (Hq, Hkv, D), layers, short, rates = Q8_0
    ours = Ours(calibrated(Spec.parse("int8-srft"), D, Hkv), Hq, Hkv)
    print(f"\n8-bit attention, {Hq} / {Hkv}, {D}, on {chip.name}, µs a layer\n")
    print("| tokens | llama.cpp, measured (#26570) | our int8, estimate |")
    print("|---" * 3 + "|")
    for T, rate in rates.items():
        _, _, low, high = total(ours.attend(T, ours.parts(T)), chip)
        print(f"| {T} | {1e6 * (1 / rate - 1 / short) / layers:.0f} | {span(low, high)} |")


def sweep(ours: Ours, contexts: list[int]) -> None:
    """What each number of splits would take, and a threadgroup's work apart from its keys."""
    for name, line in (("one split", ours.finish), ("several", ours.store)):
        key, part, exact = line.key, line.part, line.exact
        print(
            f"\n{name}: cycles of a SIMD group per key {key.main:.0f} (one pipeline: "
            f"{key.rest:.0f}), per exact token {exact.main:.0f} ({exact.rest:.0f}), per "
            f"split {part.main:.0f} ({part.rest:.0f})"
        )
    counts = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    print(f"\n| chip | tokens | {' | '.join(map(str, counts))} | as launched |")
    print("|---" * (len(counts) + 3) + "|")
    for chip in CHIPS:
        for T in contexts:
            cells = [
                f"{total(ours.attend(T, n), chip)[2]:.1f}" if 16 * n <= T else "" for n in counts
            ]
            print(f"| {chip.name} | {T} | {' | '.join(cells)} | {ours.parts(T)} |")


@dataclass(frozen=True)
class Model:
    """Parameters, layers that see everything, layers with a window, and the window."""

    name: str
    parameters: float
    full: int
    windowed: int = 0
    window: int = 0

    @property
    def layers(self) -> int:
        return self.full + self.windowed


MODELS = {
    (12, 2, 128): Model("Qwen2.5-1.5B", 1.54e9, 28),
    (32, 8, 128): Model("Llama-3.1-8B", 8.03e9, 32),
    (4, 1, 256): Model("Gemma 3 1B", 1.0e9, 4, 22, 512),
}


@functools.cache
def counted(ours: Ours, T: int) -> tuple[Work, Work]:
    """A token kept in a context of T, and the packing of those that waited."""
    return ours.token(T), ours.packing()


def written_nearest(ours: Ours, chip: Chip, T: int, B: int = 1) -> tuple[float, float]:
    """Microseconds of storing a token of each of B sequences, at best and at worst: it is kept, and
    one of as many as are packed together."""
    kept, packed = (work.times(B) for work in counted(ours, T))
    best = kept.best(chip) + packed.best(chip) / WAITING
    return 1e6 * best, 1e6 * (kept.worst(chip) + packed.worst(chip) / WAITING)


def written_fed(ours: Ours, chip: Chip, T: int, B: int = 1) -> tuple[float, float]:
    """The same, keys with feedback: a SIMD group packs one after the other of its set."""
    nearest = written_nearest(ours, chip, T, B)
    more = feedback_seconds(chip, ours.D, ours.fmt.layout.k_group)
    each = 1e6 * plan(ours.fmt.kind).pack_set / WAITING
    return nearest[0] + each * more[0], nearest[1] + each * more[1]


def step(ours: Ours, theirs: Theirs, chip: Chip, T: int) -> list[tuple[float, float]]:
    """Milliseconds of a token's step at best and at worst, fp16 and int4: weights in 4 bits at the
    bandwidth that is reached, attention, the token stored, and ``LAYER``."""
    model = MODELS[ours.heads]
    before = 1e3 * model.parameters * 4.5 / 8 / (chip.bandwidth * 1e9 * REACHED)
    before += 1e3 * model.layers * LAYER
    fp16, int4 = np.zeros(2), np.zeros(2)
    for layers, seen in ((model.full, T), (model.windowed, min(T, model.window))):
        if layers:
            fp16 += np.array(total(theirs.attend(seen, chip), chip)[2:]) * layers
            int4 += np.array(total(ours.attend(seen, ours.parts(seen)), chip)[2:]) * layers
            int4 += np.array(written_fed(ours, chip, seen)) * layers
    return [tuple(before + x / 1e3) for x in (fp16, int4)]


def decoding_table(ours: Ours, theirs: Theirs, contexts: list[int]) -> None:
    """Attention of one token, and a whole step."""
    model = MODELS[ours.heads]
    print(f"\n**{model.name}, {ours.Hq} / {ours.Hkv} heads of {ours.D}, weights in 4 bits**\n")
    print(
        "| chip | tokens | attention, µs: fp16 | int4 | fp16 / int4 | a step, ms: fp16 | int4 "
        "| fp16 / int4 |"
    )
    print("|---" * 8 + "|")
    for chip in CHIPS:
        for T in contexts:
            cells = []
            pairs = [
                (
                    total(theirs.attend(T, chip), chip)[2:],
                    total(ours.attend(T, ours.parts(T)), chip)[2:],
                ),
                step(ours, theirs, chip, T),
            ]
            for fp16, int4 in pairs:
                ratio = f"{fp16[0] / int4[1]:.2f} to {fp16[1] / int4[0]:.2f}"
                cells += [span(*fp16), span(*int4), ratio]
            print(f"| {chip.name} | {T} | {' | '.join(cells)} |")
    print(f"\n{dominating(ours, max(contexts))}")


def dominating(ours: Ours, T: int) -> str:
    """Which assumption alone moves the estimate most, by chip."""
    found = []
    for chip in CHIPS:
        launches = ours.attend(T, ours.parts(T))
        best = sum(w.best(chip) for w in launches)
        few = sum(max(w.seconds(chip, registers=True)) for w in launches)
        apart = sum(sum(w.seconds(chip)) for w in launches)
        found.append(
            f"{chip.name}: registers alone {few / best:.2f} times the best, "
            f"instructions and bytes one after the other alone {apart / best:.2f}"
        )
    return f"What moves the estimate at {T} tokens. {'; '.join(found)}."


def prompt_table(ours: Ours, theirs: Theirs) -> None:
    """What storing takes, keys to the nearest level and with feedback."""
    print(f"\nStoring, {ours.Hkv} / D = {ours.D}\n")
    print(
        "| chip | a token at 32K, µs a layer: nearest | feedback | of a step, % | a prompt, ns a "
        "token and layer: nearest | feedback | of reading it, % |"
    )
    print("|---" * 7 + "|")
    L, model = 32768, MODELS[ours.heads]
    nearest, fed = ours.prompt(L), ours.prompt(L, feedback=True)
    for chip in CHIPS:
        one = written_fed(ours, chip, L)
        whole = step(ours, theirs, chip, L)[1]
        share = [100 * model.layers * x / 1e3 / y for x, y in zip(one, whole, strict=True)]
        many = prompt_seconds(ours, fed, chip, L)
        plain_ = [x * 1e3 / L for x in total([nearest], chip)[2:]]
        per = [1e9 * x / L for x in many]
        reading = 2 * model.parameters / (chip.cores * 256 * chip.clock * 1e9 * FLOPS)
        print(
            f"| {chip.name} | {span(*written_nearest(ours, chip, L))} | {span(*one)} "
            f"| {span(*share, 2)} | {span(*plain_)} | {span(*per)} "
            f"| {span(*(100 * model.layers * x / 1e9 / reading for x in per), 2)} |"
        )


def prompt_seconds(ours: Ours, work: Work, chip: Chip, L: int) -> tuple[float, float]:
    """Of storing a prompt with feedback: by instructions, or by the chain of as many keys at a time
    as there are SIMD groups for keys, half of those that a core holds."""
    cycles, waits = chain(ours.D, ours.fmt.layout.k_group)
    one = cycles / (chip.clock * 1e9)
    keys = ours.Hkv * L / chip.cores
    best = max(work.best(chip), keys / 12 * one)
    return best, max(work.worst(chip), keys / (work.resident / 2) * (one + waits * MISSED))


def calibrated(spec: Spec, D: int, Hkv: int) -> Format:
    """As of a model: with a centre and scales of channels."""
    given = Calibration(mx.zeros((Hkv, D)), mx.ones((Hkv, D)))
    return make_format(spec, D, keys=given, values=given)


FIGURES = "microseconds: fp16 best, worst; int4 best, worst, its instructions, its bytes"


def scale_figures(spec: Spec) -> dict:
    """Attention for scripts/scale.py: by chip, heads, sequences and tokens."""
    machines: dict = {chip.name: _of_chip(chip) for chip in (M1, M3_ULTRA)}
    for heads in ((12, 2, 128), (32, 8, 128), (8, 4, 256)):
        theirs = Theirs(*heads)
        ours = Ours(calibrated(spec, heads[2], heads[1]), heads[0], heads[1])
        for chip in (M1, M3_ULTRA):
            rows: dict = {}
            for B in (1, 4, 16, 64):
                for T in (1024, 4096, 32768, 131072):
                    instructions, bytes_, *int4 = total(ours.attend(T, ours.parts(T, B), B), chip)
                    fp16 = total(theirs.attend(T, chip, B), chip)[2:]
                    rows[f"{B} x {T}"] = (*fp16, *int4, instructions, bytes_)
                    rows[f"{B} x {T} stored"] = written_fed(ours, chip, T, B)
            of_heads = {k: [round(x, 1) for x in v] for k, v in rows.items()}
            machines[chip.name]["heads"]["/".join(map(str, heads))] = of_heads
    return {"figures": FIGURES, **machines}


def _of_chip(chip: Chip) -> dict:
    """Bytes and operations a second, seconds of a layer."""
    flops = chip.cores * 256 * chip.clock * 1e9 * FLOPS
    bandwidth = chip.bandwidth * 1e9 * REACHED
    return {"bandwidth": round(bandwidth), "flops": round(flops), "layer": LAYER, "heads": {}}


def write_figures(spec: Spec, path: Path) -> None:
    data = json.loads(path.read_text())
    data["apple"] = scale_figures(spec)
    text = json.dumps(data, indent=1)
    flat = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    path.write_text(flat + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", default="int4-srft")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--sweep", action="store_true", help="only numbers of splits")
    parser.add_argument("--check", action="store_true", help="only beside published times")
    parser.add_argument("--json", type=Path, help="only figures for scripts/scale.py, to this file")
    args = parser.parse_args()
    mx.random.seed(0)
    spec = Spec.parse(args.spec)
    assert spec is not None
    print("ESTIMATES from counted instructions and nominal bandwidth; nothing here was measured.")
    with free_widening():
        if args.check:
            return check()
        if args.json:
            return write_figures(spec, args.json)
        for Hq, Hkv, D in MODELS:
            ours = Ours(calibrated(spec, D, Hkv), Hq, Hkv)
            if args.sweep:
                print(f"\n{Hq} q / {Hkv} kv heads, D = {D}, microseconds by number of splits")
                sweep(ours, args.contexts)
                continue
            theirs = Theirs(Hq, Hkv, D)
            decoding_table(ours, theirs, args.contexts)
            prompt_table(ours, theirs)


if __name__ == "__main__":
    main()
