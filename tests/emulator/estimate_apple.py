"""An ESTIMATE of the kernels' time on Apple GPUs, where nothing has been measured yet.

    python -m tests.emulator.estimate_apple            # the tables of docs/performance.md, minutes
    python -m tests.emulator.estimate_apple --sweep    # numbers of splits, and where the cycles go
    python -m tests.emulator.estimate_apple --check    # beside published times of MLX's attention

The emulator runs the Metal kernels and counts what their threads do; MLX's own
attention, from the headers in its wheel, is run and counted likewise. Counts become time by the
instruction throughputs that philipturner/metal-benchmarks measured on M1:

- A core starts four instructions of 32 lanes a cycle. FMA, additions, comparisons, bitwise
  operations and selects take 1 cycle of that, a shuffle or ballot 2, a SIMD sum or maximum 14.5, an
  8x8x8 matrix product 20.
- Shifts, integer products, conversions between integers and floats, rounding, exp2 and log2 go
  through one more pipeline, a quarter as wide (4 cycles; 6 a reciprocal, 8 a root), beside the
  others: the slower of the two counts.
- Few SIMD groups do not fill a core: 2.75 times the cycles with 4 of them, 1.6 with 8, none from
  24 on; fewer threadgroups than cores leave cores idle.
- Bytes: every input once, every output once, at the chip's nominal bandwidth.
- A load or store is one instruction for 8 bytes of device memory, or 4 of threadgroup memory.

What is not known is whether registers matter. Mesa's compiler (``agx/table.json``) gives our
kernels up to 255 of them, so that a core holds 12 SIMD groups, not 24, and lets some spill; MLX's
take 47 to 123 (``exp`` compiled as ``exp2``): 26 SIMD groups or more. So every figure of ours is a
range:

- best: registers cost nothing; instructions and bytes overlap, the larger of the two counts.
- worst: as many SIMD groups as registers allow, each spill and fill once a tile, and what is read
  is not hidden behind so few: instructions and bytes are added.

MLX's attention is reckoned by the first rule alone, ``--check`` says how far that is from what
others measured, and nothing is fitted to those times. Where fp16 is bound by bytes it can reach
``REACHED`` of the nominal bandwidth, as ours can.

Not in it: the price of a launch (about the same number of them, tests.support.launches), caches,
threadgroup memory but for its instructions, address arithmetic beyond one instruction each, and
what newer chips do better than M1. The ratio of two kernels under the same model is worth more than
either.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_kvq import ops
from mlx_kvq.format.format import Format, make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import gpu as fused
from mlx_kvq.ops import plain
from mlx_kvq.ops.gpu import attention
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
OCCUPANCY = {1: 11.0, 4: 2.75, 8: 1.6, 24: 1.0}  # SIMD groups a core -> cycles, times as many
# Of nominal bandwidth: 530 of 614 GB/s on M5 Max and 680 of 800 on M1 Ultra (mlx#3837), 266 of 307
# on M5 Pro (mlx#4076), each measured with a plain kernel.
REACHED = 0.86
FILL = 4  # cycles of a spill or fill, a guess
TILE = 16  # keys


@dataclass(frozen=True)
class Chip:
    """Cores, GHz and GB/s as published; ``kind`` is the last letter of Metal's architecture."""

    name: str
    kind: str
    cores: int
    clock: float
    bandwidth: float


CHIPS = (
    Chip("M1", "g", 8, 1.278, 68.3),
    Chip("M2 Ultra", "d", 76, 1.398, 800),
    Chip("M4 Max", "s", 40, 1.578, 546),
)
M1_ULTRA = Chip("M1 Ultra", "d", 64, 1.296, 800)
M5_PRO = Chip("M5 Pro", "s", 20, 1.62, 307)
M5_MAX = Chip("M5 Max", "s", 40, 1.62, 614)
# MLX's attention of one token as others measured it, launches in a row, K and V of several buffers
# in turn: query and KV heads, D -> tokens and microseconds. From GB/s where those are given.
PUBLISHED = [
    ("mlx#4077", M5_MAX, (32, 4, 128), {8192: 53.4, 16384: 87.6, 32768: 156.2}),
    ("mlx#4077", M5_MAX, (64, 8, 64), {8192: 73.5, 16384: 130.2, 32768: 244.0}),
    ("mlx#4076", M5_PRO, (32, 32, 128), {2048: 140.4, 8192: 476.0, 32768: 1910.8}),
    ("mlx#4076", M5_PRO, (32, 8, 128), {2048: 35.8, 8192: 127.6, 32768: 508.4}),
    ("mlx#4076", M5_PRO, (32, 4, 128), {2048: 32.3, 8192: 91.2, 32768: 353.2}),
    ("mlx#4076", M5_PRO, (64, 8, 64), {2048: 55.2, 8192: 148.5, 32768: 563.9}),
    ("mlx#3837", M1_ULTRA, (32, 4, 256), {100000: 2300.0}),
]


@dataclass(frozen=True)
class Work:
    """Of one launch: cycles of SIMD groups in either pipeline, bytes, and its size.

    Args:
        main, rest (float): Cycles.
        spilled (float): Cycles of spills and fills, if registers matter.
        bytes (float): Read and written.
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

    def times(self, n: float) -> "Work":
        return replace(
            self,
            main=self.main * n,
            rest=self.rest * n,
            spilled=self.spilled * n,
            bytes=self.bytes * n,
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

    def best(self, chip: Chip) -> float:
        return max(self.seconds(chip))

    def worst(self, chip: Chip) -> float:
        """If a core holds fewer SIMD groups than fill it, its loads are not hidden."""
        instructions, bytes_ = self.seconds(chip, registers=True)
        if self.resident < 24:
            return instructions + bytes_
        return max(instructions, bytes_)


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
    return Work(main, rest, bytes_, c.threadgroups, groups)


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


def random(*shape: int) -> mx.array:
    return mx.random.normal(shape).astype(mx.float16)


@dataclass
class Linear:
    """Work of a launch that is so much for each part and so much for each key."""

    part: Work
    key: Work
    cache: dict = field(default_factory=dict)

    @classmethod
    def fit(cls, at: Callable[[int, int], Work], short: int, long: int, parts: int) -> "Linear":
        a, b = at(short, parts), at(long, parts)

        def line(get) -> tuple[float, float]:
            key = (get(b) - get(a)) / (long - short)
            return (get(a) - short * key) / parts, key

        (pm, km), (pr, kr) = line(lambda w: w.main), line(lambda w: w.rest)
        part = Work(pm, pr, 0, a.threadgroups / parts, a.simd_groups, 0.0, a.resident)
        # A tile is one SIMD group's: 16 keys share its spills.
        return cls(part, Work(km, kr, 0, 0, a.simd_groups, a.spilled))

    def __call__(self, keys: int, parts: int, bytes_: float) -> Work:
        p = self.part.times(parts)
        return replace(
            p,
            main=p.main + keys * self.key.main,
            rest=p.rest + keys * self.key.rest,
            spilled=keys * self.key.spilled,
            bytes=bytes_,
        )


class Ours:
    """Our kernels for one format and its heads, as models launch them: calibrated, with a tail."""

    def __init__(self, fmt: Format, Hq: int, Hkv: int):
        self.fmt, self.Hq, self.Hkv, self.D = fmt, Hq, Hkv, fmt.layout.k_dim
        self.finish = Linear.fit(self._attend("attend_finish"), 256, 512, 1)
        self.store = Linear.fit(self._attend("attend_store"), 1024, 2048, 2)
        self.combine = {parts: self._combined(parts) for parts in (2, 16)}

    def _counted(self, T: int, parts: int) -> list[Counters]:
        rows = calls.quantize_pack(
            plain, random(1, self.Hkv, T, self.D), random(1, self.Hkv, T, self.D), self.fmt
        )
        q = random(1, self.Hq, 1, self.D)
        mx.eval(rows, q)
        tail = random(1, self.Hkv, self.fmt.recent, 2 * self.D) if self.fmt.recent else None
        given = {"parts": parts, "tail": tail}
        with emulated("counted") as e:
            mx.eval(calls.attend(fused, q, rows, T, self.fmt, self.D**-0.5, **given))
        return e.counters

    def _attend(self, kernel: str):
        def at(T: int, parts: int) -> Work:
            c = next(c for c in self._counted(T, parts) if kernel in c.kernel)
            blocks = -(-self.Hq // self.Hkv // 8) * self.Hkv
            spilled = registers.spills * FILL / TILE * blocks
            return replace(work_of(c, 0).on(registers), spilled=spilled)

        registers = Registers.of(kernel, self.D, "calibrated, tail")
        return at

    def _combined(self, parts: int) -> Work:
        c = self._counted(64 * parts, parts)[-1]
        registers = Registers.of("combine", self.D, "calibrated, tail")
        return work_of(c, 4.0 * self.Hq * self.D * parts).on(registers)

    def attend(self, T: int, parts: int) -> list[Work]:
        """The launches of one token's attention over T keys."""
        rows = 4.0 * self.fmt.layout.words * self.Hkv * T
        if parts == 1:
            return [self.finish(T, 1, rows)]
        few, many = self.combine[2], self.combine[16]
        per = (many.main - few.main) / 14, (many.rest - few.rest) / 14
        last = replace(
            few,
            main=few.main + (parts - 2) * per[0],
            rest=few.rest + (parts - 2) * per[1],
            bytes=4.0 * self.Hq * self.D * parts,
        )
        return [self.store(T, parts, rows + last.bytes), last]

    def parts(self, T: int) -> int:
        with emulated():  # the launch sizes of Metal
            q = mx.zeros((1, self.Hq, 1, self.D))
            rows = mx.zeros((1, self.Hkv, T, self.fmt.layout.words), mx.uint32)
            return attention.grid(q, ops.Packed(rows, T, self.fmt)).parts(T, 1, None)

    def vectors(self, op: str, L: int) -> Work:
        """quantize_pack or dequantize of L tokens."""
        n = min(L, 512)
        k, v = random(1, self.Hkv, n, self.D), random(1, self.Hkv, n, self.D)
        rows = calls.quantize_pack(plain, k, v, self.fmt)
        mx.eval(k, v, rows)
        with emulated("counted") as e:
            if op == "quantize_pack":
                mx.eval(calls.quantize_pack(fused, k, v, self.fmt))
            else:
                mx.eval(calls.dequantize(fused, rows, n, self.fmt, mx.float16))
        token = self.Hkv * (4 * self.D + 4 * self.fmt.layout.words)
        variant = "calibrated, no tail, L=512" if op == "quantize_pack" else "no tail"
        registers = Registers.of(op, self.D, variant)
        work = work_of(e.counters[0], token * n).on(registers)
        # A SIMD group packs a set of four vectors or more at a time.
        spilled = registers.spills * FILL * 2 * self.Hkv * n / 4
        return replace(work, spilled=spilled).times(L / n)


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
        return work_of(c, 0)

    def _first(self, T: int, blocks: int) -> Work:
        source = self._source("sdpa_vector_2pass_1", f"float16_t, {self.D}", blocks)
        group = self.Hq // self.Hkv
        shapes = [(self.Hq, blocks, self.D), (self.Hq, blocks), (self.Hq, blocks)]
        _, c = run(
            source, [*self._arrays(T), mx.zeros(8, mx.float16)], shapes,
            [mx.float16, mx.float32, mx.float32],
            (self.Hkv * 32, group, blocks), (32, group, 1), mode="counted",
        )  # fmt: skip
        return work_of(c, 0)

    def _second(self, blocks: int) -> Work:
        source = self._source("sdpa_vector_2pass_2", f"float16_t, {self.D}", blocks)
        inputs = [random(self.Hq, blocks, self.D), mx.zeros((self.Hq, blocks))]
        inputs += [mx.zeros((self.Hq, blocks)), np.int32(blocks)]
        mx.eval(inputs[:3])
        _, c = run(
            source, inputs, [(1, self.Hq, 1, self.D)], [mx.float16], (self.Hq * 1024, 1, 1),
            (1024, 1, 1), mode="counted", max_threads=1024,
        )  # fmt: skip
        return work_of(c, 2.0 * self.Hq * self.D * blocks)

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

    def attend(self, T: int, chip: Chip) -> list[Work]:
        bytes_ = 4.0 * self.D * self.Hkv * T
        if not (blocks := self.blocks(T, chip)):
            return [self.single(T, 1, bytes_)]
        a, b = self.second[32], self.second[64]
        more = (blocks - 32) / 32
        last = replace(
            a,
            main=a.main + more * (b.main - a.main),
            rest=a.rest + more * (b.rest - a.rest),
            bytes=2.0 * self.Hq * self.D * blocks,
        )
        return [self.first(T, blocks, bytes_ + last.bytes), last]


def total(launches: list[Work], chip: Chip) -> tuple[float, float, float, float]:
    """Microseconds by instructions and by bytes; and the estimate, at best and at worst."""
    pairs = [w.seconds(chip) for w in launches]
    best, worst = ([getattr(w, name)(chip) for w in launches] for name in ("best", "worst"))
    return tuple(1e6 * sum(x) for x in (*zip(*pairs, strict=True), best, worst))


def check() -> None:
    """MLX's attention by this model, beside what others measured."""
    print("| from | chip | heads, D | tokens | measured µs | estimate µs | quotient |")
    print("|---" * 7 + "|")
    quotients = []
    for source, chip, (Hq, Hkv, D), times in PUBLISHED:
        theirs = Theirs(Hq, Hkv, D)
        for T, measured in times.items():
            t = total(theirs.attend(T, chip), chip)[2]
            quotients.append(measured / t)
            print(
                f"| {source} | {chip.name} | {Hq} / {Hkv}, {D} | {T} | {measured:.1f} | {t:.1f} "
                f"| {measured / t:.2f} |",
                flush=True,
            )
    low, middle, high = np.quantile(quotients, (0, 0.5, 1))
    print(f"\nmeasured / estimate: median {middle:.2f}, {low:.2f} to {high:.2f}")


def sweep(ours: Ours, contexts: list[int]) -> None:
    """What each number of splits would take, and a threadgroup's work apart from its keys."""
    for name, line in (("one split", ours.finish), ("several", ours.store)):
        key, part = line.key, line.part
        print(
            f"\n{name}: cycles of a SIMD group per key {key.main:.0f} (one pipeline: "
            f"{key.rest:.0f}), per threadgroup {part.main:.0f} ({part.rest:.0f})"
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


def attention_table(ours: Ours, theirs: Theirs, contexts: list[int], spec: str) -> None:
    print(
        f"\nAttention of one token, {ours.Hq} q / {ours.Hkv} kv heads, D = {ours.D}, "
        "microseconds\n\n| chip | tokens | fp16 bytes | fp16 instructions | fp16 estimate | "
        f"{spec} splits | bytes | instructions | at best | at worst | fp16 / {spec} |"
    )
    print("|---" * 11 + "|")
    for chip in CHIPS:
        for T in contexts:
            parts = ours.parts(T)
            i, b, t, _ = total(theirs.attend(T, chip), chip)
            i2, b2, best, worst = total(ours.attend(T, parts), chip)
            print(
                f"| {chip.name} | {T} | {b:.1f} | {i:.1f} | {t:.1f} | {parts} | {b2:.1f} "
                f"| {i2:.1f} | {best:.1f} | {worst:.1f} | {t / worst:.2f} to {t / best:.2f} |"
            )
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


def vectors_table(ours: Ours) -> None:
    print(f"\nStoring and taking out, {ours.Hkv} kv heads, D = {ours.D}\n")
    print(
        "| chip | operation | tokens | bytes, µs | instructions, µs | ns per vector, at best | "
        "at worst |"
    )
    print("|---" * 7 + "|")
    for op, L in (("quantize_pack", 1), ("quantize_pack", 32768), ("dequantize", 32768)):
        work = ours.vectors(op, L)
        for chip in CHIPS:
            i, b, *both = total([work], chip)
            best, worst = (f"{1e3 * t / (2 * ours.Hkv * L):.2f}" for t in both)
            print(f"| {chip.name} | {op} | {L} | {b:.1f} | {i:.1f} | {best} | {worst} |")


# Bytes of weights in 4 bits, layers that see everything, layers with a window of 512.
MODELS = {128: ("Qwen2.5-1.5B", 0.87e9, 28, 0), 256: ("Gemma 3 1B", 0.56e9, 4, 22)}


def decoding_table(ours: Ours, theirs: Theirs, contexts: list[int]) -> None:
    """A whole step: weights at the bandwidth that is reached, attention, and a token stored."""
    name, weights, full, windowed = MODELS[ours.D]
    print(f"\nA decode step of {name}, weights in 4 bits, ms\n")
    print("| chip | tokens | fp16 | int4 at best | at worst | faster |")
    print("|---" * 6 + "|")
    store = ours.vectors("quantize_pack", 1)
    for chip in CHIPS:
        for T in contexts:
            times = np.full(3, weights / (chip.bandwidth * 1e9 * REACHED))
            for layers, seen in ((full, T), (windowed, min(T, 512))):
                _, _, fp16, _ = total(theirs.attend(seen, chip), chip)
                _, _, best, worst = total([*ours.attend(seen, ours.parts(seen)), store], chip)
                times += np.array([fp16, best, worst]) * layers * 1e-6
            fp16, best, worst = times * 1e3
            print(
                f"| {chip.name} | {T} | {fp16:.2f} | {best:.2f} | {worst:.2f} | "
                f"{fp16 / worst:.2f} to {fp16 / best:.2f} |"
            )


def calibrated(spec: Spec, D: int, Hkv: int) -> Format:
    """As of a model: with a centre and scales of channels."""
    given = Calibration(mx.zeros((Hkv, D)), mx.ones((Hkv, D)))
    return make_format(spec, D, keys=given, values=given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", default="int4-srft")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 1024, 4096, 32768])
    parser.add_argument("--sweep", action="store_true", help="only numbers of splits")
    parser.add_argument("--check", action="store_true", help="only MLX's, beside published times")
    args = parser.parse_args()
    mx.random.seed(0)
    spec = Spec.parse(args.spec)
    assert spec is not None
    print("ESTIMATES from counted instructions and nominal bandwidth; nothing here was measured.")
    with free_widening():
        if args.check:
            return check()
        for Hq, Hkv, D in ((12, 2, 128), (4, 1, 256)):
            ours = Ours(calibrated(spec, D, Hkv), Hq, Hkv)
            if args.sweep:
                print(f"\n{Hq} q / {Hkv} kv heads, D = {D}, microseconds by number of splits")
                sweep(ours, args.contexts)
                continue
            theirs = Theirs(Hq, Hkv, D)
            attention_table(ours, theirs, args.contexts, args.spec)
            decoding_table(ours, theirs, args.contexts)
            vectors_table(ours)


if __name__ == "__main__":
    main()
