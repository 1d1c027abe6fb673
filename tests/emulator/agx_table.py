"""Registers and spills of the kernels, by Mesa's compiler for Apple's G13 GPU (the M1 family).

    python -m tests.emulator.agx_table DIR/kvqagx --json tests/emulator/agx/table.json
    python -m tests.emulator.agx_table DIR/kvqagx --kernels attend --dims 64 128 --dtypes float16

``DIR/kvqagx`` is Mesa's compiler as a command: SPIR-V, an entry point and a number of threads in,
statistics out. The emulator's stand-in gives the complete Metal source that MLX generates; nothing
runs. clang of ``ziglang`` makes SPIR-V of it. Launches of one source with equal threadgroups share
a row. Three minutes on two idle cores. ``agx/before.json`` is the table before kernels were written
for few registers, ``agx/table.json`` today's, with which ``test_agx.py`` compares.

What the numbers are not:

- Not Apple's compiler: use them to compare two versions of a kernel.
- G13 only: a thread has at most 256 registers of 16 bits there; 104 allow 1024 threads a core.
- SPIR-V has no simdgroup_matrix. Two FMAs of the same operands stand for a product.
- Mesa reads no bfloat: integers of 16 bits stand in, converted by shifts and additions as on M1.
- Instructions, spills and fills are those in the program, not those executed.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, count
from pathlib import Path

import mlx.core as mx

from mlx_kvq import ops
from mlx_kvq.format.format import Format, make_format
from mlx_kvq.format.layout import tail_dtype
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import gpu
from mlx_kvq.ops.gpu.jit import KERNELS
from tests.support import calls

from . import arrays, emulated, standin
from .counters import Counters
from .source import parse

HERE = Path(__file__).resolve().parent
DIMS = (64, 128, 256)
DTYPES = ("float16", "bfloat16")
CLANG = ["-target", "spirv64v1.4", "-O2", "-w", "-fno-caret-diagnostics"]
CXX = [
    "-std=c++14",
    "-fno-slp-vectorize",
    "-fno-builtin-memset",
    "-ffp-contract=off",
    "-fsigned-char",
    "-fno-math-errno",
]
SPIRV = ["-mllvm", "-spirv-ext=+SPV_KHR_bit_instructions"]
SECONDS = 60  # of one compiler run
COLUMNS = ("instructions", "registers", "spills", "fills", "scratch", "threads", "max_threads")
STATISTICS = re.compile(
    r"(?P<instructions>\d+) inst,.* (?P<registers>\d+) regs,.* (?P<scratch>\d+) scratch, "
    r"(?P<max_threads>\d+) threads,.* (?P<spills>\d+):(?P<fills>\d+) spills"
)


@dataclass
class Row:
    """A kernel's source, the launches that have it, and what the compiler says of it."""

    kernel: str
    D: int
    dtype: str
    variants: list[str]
    threads: int
    instructions: int | None = None
    registers: int | None = None
    spills: int | None = None
    fills: int | None = None
    scratch: int | None = None
    max_threads: int | None = None
    error: str = ""
    source: str = field(default="", repr=False)


def formats(D: int) -> Iterator[tuple[str, Format]]:
    yield "", make_format(Spec.parse("int4-srft"), D)
    one = mx.ones((2, D))
    yield (
        "calibrated, ",
        make_format(
            Spec.parse("int4-srft"), D, D, keys=Calibration(one, one), values=Calibration(one, one)
        ),
    )


def other_formats(D: int) -> Iterator[tuple[str, Format]]:
    """Rows of 3 bits, and keys rounded with feedback."""
    one, metric = mx.ones((2, D)), mx.broadcast_to(mx.eye(D), (2, D, D))
    plain, weighted = Calibration(one, one), Calibration(one, one, metric=metric)
    yield "int3, ", make_format(Spec.parse("int3-srft"), D)
    for bits in ("int3", "int4"):
        spec = Spec.parse(f"{bits}-srft:rounding=feedback")
        yield (
            f"{bits}, calibrated, feedback, ",
            make_format(spec, D, D, keys=weighted, values=plain),
        )
    spec = Spec.parse("int3-srft")
    yield "int3, calibrated, ", make_format(spec, D, D, keys=plain, values=plain)


def other_launches(D: int, dtype: mx.Dtype) -> Iterator[tuple[str, Callable]]:
    """The kernels that differ in these formats, without and with a tail."""
    H, T = 2, 256
    for title, fmt in other_formats(D):
        R = 2 * fmt.recent + 8
        tail = mx.zeros((1, H, R, 2 * D), tail_dtype(dtype))
        rows = mx.zeros((1, H, T, fmt.layout.words), mx.uint32)
        x = mx.zeros((1, H, 1, D), dtype)
        pack = partial(gpu.quantize_pack, x, x, fmt)
        yield f"{title}no tail, L=1", pack
        yield f"{title}tail, L=1", partial(pack, size=R, tail=tail)
        if fmt.kind.feedback:
            continue
        for name, end in (("no tail", None), ("tail", tail)):
            for parts, heads in ((1, 6), (4, 6), (1, 4), (4, 4)):
                q = mx.zeros((1, H * heads, 1, D), dtype)
                attend = partial(calls.attend, gpu, q, rows, T, fmt, D**-0.5, parts=parts)
                said = "" if heads > 4 else f", {heads} heads"
                yield f"{title}{name}{said}", partial(attend, tail=end)
            given = rows, T, fmt, dtype, end
            yield f"{title}{name}", partial(calls.dequantize, gpu, *given)
            yield f"{title}{name}", partial(calls.restore, gpu, *given)


def launches(D: int, dtype: mx.Dtype) -> Iterator[tuple[str, Callable]]:
    """Each kernel at head size D, in its variants; attend with 6 query heads a KV head, or, by
    ``attend_vector.metal``, with the number that is said."""
    H, T = 2, 256
    for title, fmt in formats(D):
        R = 2 * fmt.recent + 8

        def vectors(L: int, B: int = 1, count: int = H) -> mx.array:
            return mx.zeros((B, count, L, D), dtype)

        def rows(length: int, B: int = 1, fmt=fmt) -> mx.array:
            return mx.zeros((B, H, length, fmt.layout.words), mx.uint32)

        def tails(B: int = 1, R: int = R) -> mx.array:
            return mx.zeros((B, H, R, 2 * D), tail_dtype(dtype))

        def attend(parts: int, L: int = 1, B: int = 1, fmt=fmt, rows=rows, heads=6, **given):
            q = vectors(L, B, H * heads)
            return calls.attend(gpu, q, rows(T, B), T, fmt, D**-0.5, parts=parts, **given)

        first = ops.First(tails(1, 4), 4)
        plain = not title
        for parts in (1, 4):  # attend_finish; attend_store and combine
            yield f"{title}no tail", partial(attend, parts)
            yield f"{title}tail", partial(attend, parts, tail=tails())
            yield f"{title}tail, first", partial(attend, parts, tail=tails(), first=first)
            if plain:
                mask, sinks = mx.ones((1, 1, 1, T), mx.bool_), mx.zeros((H * 6,), dtype)
                starts = mx.zeros((2,), mx.int32)
                for name, tail in (("no tail", None), ("tail", tails())):
                    yield f"{name}, L=8", partial(attend, parts, 8, mask="causal", tail=tail)
                    yield f"{name}, mask", partial(attend, parts, mask=mask, tail=tail)
                yield "tail, starts", partial(attend, parts, B=2, starts=starts, tail=tails(2))
                own = ops.First(tails(2, 4), 4, starts)
                more = {"starts": starts, "tail": tails(2), "first": own}
                yield "tail, starts, first", partial(attend, parts, B=2, **more)
                yield "tail, sinks", partial(attend, parts, sinks=sinks, tail=tails())
                given = {"tail": tails(), "first": first, "heads": 4}
                yield "tail, first, mask, 4 heads", partial(attend, parts, mask=mask, **given)
                given |= {"tail": tails(2), "first": own, "starts": starts}
                yield "tail, starts, first, 4 heads", partial(attend, parts, B=2, **given)
            else:
                for n in (1, 2, 3, 4):
                    yield f"{title}no tail, {n} heads", partial(attend, parts, heads=n)
                    given = {"tail": tails(), "first": first, "heads": n}
                    yield f"{title}tail, first, {n} heads", partial(attend, parts, **given)

        x, long = vectors(1), vectors(512)
        pack_tail = partial(gpu.quantize_pack, fmt=fmt, size=R)
        yield f"{title}no tail, L=1", partial(gpu.quantize_pack, x, x, fmt)
        yield f"{title}no tail, L=512", partial(gpu.quantize_pack, long, long, fmt)
        yield f"{title}first tail, L=512", partial(pack_tail, long, long, tail=None)
        yield f"{title}tail, L=1", partial(pack_tail, x, x, tail=tails())
        yield f"{title}tail, L=512", partial(pack_tail, long, long, tail=tails())
        yield f"{title}L=1", partial(gpu.keep_exact, x, x, fmt, tails(), R)
        yield f"{title}rotated, L=16", partial(gpu.pack_rotated, tails()[:, :, -16:], fmt)

        chunk = vectors(32), vectors(32)
        for name, tail in (("no tail", None), ("tail", tails())):
            given = rows(T), T, fmt, dtype, tail
            if plain:
                yield name, partial(calls.dequantize, gpu, *given)
            yield f"{title}{name}", partial(calls.restore, gpu, *given)
            yield f"{title}{name}, chunk", partial(calls.restore, gpu, *given, chunk)
        given = rows(T), T, fmt, dtype, None, chunk, first
        yield f"{title}first, chunk", partial(calls.restore, gpu, *given)


def sources(dims: tuple[int, ...] = DIMS, dtypes: tuple[str, ...] = DTYPES) -> list[Row]:
    """A row for each Metal source and threadgroup size."""
    found: dict[tuple, Row] = {}

    def record(source, inputs, shapes, kinds, grid, threadgroup, **_):
        kernel = re.search(r"kvq_(\w+?)_[0-9a-f]{12}", source)[1]
        threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
        key = (D, dtype, source, threads)
        row = found.setdefault(key, Row(kernel, D, dtype, [], threads, source=source))
        if variant not in row.variants:
            row.variants.append(variant)
        made = [arrays.empty_output(s, d, 0) for s, d in zip(shapes, kinds, strict=True)]
        return made, Counters(kernel)

    run, standin.run = standin.run, record
    try:
        with emulated():
            for D in dims:
                for dtype in dtypes:
                    kind = getattr(mx, dtype)
                    for name, launch in chain(launches(D, kind), other_launches(D, kind)):
                        variant = name  # for record
                        launch()
    finally:
        standin.run = run
    missing = {n for n in KERNELS if n != "attend_join"} - {row.kernel for row in found.values()}
    if missing:
        raise RuntimeError(f"agx_table launches no {', '.join(sorted(missing))}")
    return sorted(found.values(), key=lambda row: (row.kernel, row.D, row.dtype))


def cxx(source: str) -> str:
    """C++ of a Metal source, by the emulator's translation, with an entry point for SPIR-V."""
    kernel = parse(source)
    code, _, entry = kernel.code.partition('\n#line 1 "entry"\n')
    code = code.replace('#include "metal.h"\n', '#include "metal.h"\n#include "entry.h"\n', 1)
    code = re.sub(
        r"\[\[kernel\]\]\s+void", "static inline __attribute__((always_inline)) void", code
    )
    call = re.search(r"EMU_ENTRY \{(.*)\}", entry, re.S)[1]
    call = re.sub(r"\(unsigned long\)args\[(\d+)\]", r"arg\1", call)
    buffers = (f"{b.type.rstrip('&* ')}* arg{i}" for i, b in enumerate(kernel.buffers))
    thread = "const ThreadInfo thread_info = agx_thread(), *info = &thread_info;"
    return f"{code}\nAGX_ENTRY agx_entry({', '.join(buffers)}) {{ {thread}{call}}}\n"


def for_mesa(ir: str) -> str:
    """LLVM IR in words that SPIR-V and Mesa have: a reversal of a few bits as one of 32, the
    hardware's exp2 for Metal's fast::exp2, and bfloat as an integer."""
    number = count()

    def reversal(match: re.Match) -> str:
        out, bits, x = match[1], int(match[2]), match[3]
        wide, turned, low = (f"%agx.{next(number)}" for _ in range(3))
        return (
            f"  {wide} = zext i{bits} {x} to i32\n"
            f"  {turned} = call i32 @llvm.bitreverse.i32(i32 {wide})\n"
            f"  {low} = lshr i32 {turned}, {32 - bits}\n"
            f"  {out} = trunc i32 {low} to i{bits}"
        )

    def widened(match: re.Match) -> str:
        wide, high = (f"%agx.{next(number)}" for _ in range(2))
        return (
            f"  {wide} = zext i16 {match[2]} to i32\n"
            f"  {high} = shl i32 {wide}, 16\n"
            f"  {match[1]} = bitcast i32 {high} to float"
        )

    def narrowed(match: re.Match) -> str:  # to the nearest, ties to even
        bits, last, odd, half, sum_, high = (f"%agx.{next(number)}" for _ in range(6))
        return (
            f"  {bits} = bitcast float {match[2]} to i32\n"
            f"  {last} = lshr i32 {bits}, 16\n"
            f"  {odd} = and i32 {last}, 1\n"
            f"  {half} = add i32 {odd}, 32767\n"
            f"  {sum_} = add i32 {bits}, {half}\n"
            f"  {high} = lshr i32 {sum_}, 16\n"
            f"  {match[1]} = trunc i32 {high} to i16"
        )

    call = r"^  (%\S+) = .*call i(?!32\b)(\d+) @llvm\.bitreverse\.i\d+\(i\d+ (%[^\s)]+)\).*$"
    ir = re.sub(call, reversal, ir, flags=re.M)
    ir = re.sub(r"^declare i\d+ @llvm\.bitreverse\..*$", "", ir, flags=re.M)
    ir = re.sub(r"^  (%\S+) = fpext bfloat (\S+) to float.*$", widened, ir, flags=re.M)
    ir = re.sub(r"^  (%\S+) = fptrunc float (\S+) to bfloat.*$", narrowed, ir, flags=re.M)
    ir = re.sub(r"\bbfloat\b", "i16", ir)
    ir = ir.replace("@llvm.exp2.f32(", "@_Z11native_exp2f(")
    return f"{ir}\ndeclare i32 @llvm.bitreverse.i32(i32)\n"


def compile_row(row: Row, driver: Path, folder: Path) -> None:
    """Fill in a row's statistics, or its error."""
    import ziglang

    folder.mkdir()
    for name in ("metal.h", "metal_math.h", "metal_types.h"):
        shutil.copy(HERE / name, folder)
    for name in ("metal_simd.h", "entry.h"):
        shutil.copy(HERE / "agx" / name, folder)
    (folder / "kernel.metal").write_text(row.source)

    def call(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            arguments, cwd=folder, capture_output=True, text=True, timeout=SECONDS
        )

    clang = [str(Path(ziglang.__file__).parent / "zig"), "clang", *CLANG]
    (folder / "kernel.cpp").write_text(cxx(row.source))
    done = call(*clang, *CXX, "-S", "-emit-llvm", "kernel.cpp", "-o", "kernel.ll")
    if done.returncode == 0:
        ir = folder / "kernel.ll"
        text = ir.read_text()
        called = re.findall(r"^define (?!.*@agx_entry\().*@(\w+)\(", text, flags=re.M)
        if called:
            row.error = f"not inlined: {', '.join(called)}"
            return
        ir.write_text(for_mesa(text))
        done = call(*clang, "-x", "ir", *SPIRV, "-c", "kernel.ll", "-o", "kernel.spv")
    if done.returncode:
        row.error = f"clang: {first_error(done)}"
        return
    try:
        done = call(str(driver), "kernel.spv", "agx_entry", str(row.threads))
    except subprocess.TimeoutExpired:
        row.error = f"driver: not done after {SECONDS} s"
        return
    match = STATISTICS.search(done.stdout)
    if done.returncode or not match:
        row.error = f"driver: {first_error(done)}"
        return
    for name, number in match.groupdict().items():
        setattr(row, name, int(number))


def first_error(done: subprocess.CompletedProcess) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    named = [line for line in lines if re.search("error|assert|unhandled", line, re.I)]
    return (named or lines or [f"exit status {done.returncode}"])[0][:200]


def compile_rows(rows: list[Row], driver: Path, jobs: int = 2, keep: Path | None = None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(jobs) as pool:
            done = [
                pool.submit(compile_row, r, driver, folder / f"{i:03}-{r.kernel}-{r.D}-{r.dtype}")
                for i, r in enumerate(rows)
            ]
        for job in done:
            job.result()


def table(rows: list[Row]) -> str:
    """A Markdown table."""
    head = ("kernel", "D", "dtype", "variant", *(c.replace("_", " ") for c in COLUMNS))
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * 4}{'---:|' * len(COLUMNS)}"]
    for row in rows:
        cells = [row.kernel, str(row.D), row.dtype, "; ".join(row.variants)]
        cells += [row.error] if row.error else [str(getattr(row, c)) for c in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("driver", type=Path, help="the built compiler, kvqagx")
    parser.add_argument("--dims", type=int, nargs="+", default=list(DIMS), help="head sizes")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--kernels", nargs="+", help="kernels whose names contain one of these")
    parser.add_argument("--variants", nargs="+", help="variants that contain one of these")
    parser.add_argument("--jobs", type=int, default=2, help="kernels compiled at once")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--keep", type=Path, help="new folder for sources, IR, SPIR-V")
    options = parser.parse_args()
    if not options.driver.is_file():
        parser.error(f"there is no compiler at {options.driver}")
    rows = sources(tuple(options.dims), tuple(options.dtypes))
    if options.kernels:
        rows = [row for row in rows if any(k in row.kernel for k in options.kernels)]
    if options.variants:
        rows = [r for r in rows if any(v in n for v in options.variants for n in r.variants)]
    compile_rows(rows, options.driver.resolve(), options.jobs, options.keep)
    print(table(rows))
    if options.json:
        kept = [{k: v for k, v in asdict(row).items() if k != "source"} for row in rows]
        lines = ",\n".join(json.dumps(row) for row in kept)
        options.json.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
