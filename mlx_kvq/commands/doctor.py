"""Check this machine: every kernel against float64, compile times, first timings beside fp16.

The output is one block to paste into an issue. With ``--report FILE`` the benchmark and peak memory
come to it, in one file to attach (``doctor_report``).
"""

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
from tqdm import tqdm

from .. import ops
from ..files import failure
from ..measure.machine import machine
from ..ops import cubins, passed
from . import doctor_checks as checks
from . import doctor_figures as figures
from . import doctor_report
from .doctor_checks import Result

ESTIMATE = 'docs/performance.md, "Apple GPUs: an estimate"; python -m tests.emulator.estimate_apple'
NOT_RUN = (
    "weights of a real model; float32 models; head sizes, groups and lengths that are not in the "
    "tables; batches of more than 2 in the checks; dense rotations, which have no kernel"
)
OTHERS = {"metal": "attend_join, which is CUDA's", "cuda": "attend_store with combine, Metal's"}
CPU_CASES = [checks.EVERY[0], checks.EVERY[3]]
# Seconds of each part, for the time that is left: a guess until a Mac has run it; and on a CPU.
SECONDS = {"checks": 90.0, "formats": 40.0, "compiled": 15.0, "replayed": 5.0, "beside fp16": 40.0}
CPU_SECONDS = {"checks": 15.0}
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=None, help="Seed of the random data.")
    parser.add_argument(
        "--report", type=Path, metavar="FILE",
        help="Also run the benchmark at three lengths and measure peak memory beside fp16, about "
        "ten minutes, and write all of it to this Markdown file, to attach to an issue.",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="Replace the file of --report.")


def run(args: argparse.Namespace) -> int:
    """Print the block; exit status 0 if everything agrees, 1 if not."""
    seed = time.time_ns() % 2**32 if args.seed is None else args.seed
    if args.report is not None:
        doctor_report.check(args.report, args.overwrite)
    seconds = sum((CPU_SECONDS if ops.language() is None else SECONDS).values())
    seconds += doctor_report.seconds() if args.report is not None else 0
    # "12:03, about 04:10 left"
    form = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, about {remaining} left"
    with tqdm(total=seconds, leave=False, disable=None, bar_format=form) as bar:
        if args.report is not None:
            return doctor_report.write(args.report, partial(block, seed, bar), bar)
        text, failed = block(seed, bar)
    print(text)
    return 1 if failed else 0


def watched(bar: tqdm, part: str, items: Iterable[T], number: int) -> Iterator[T]:
    """The items of a part of the work, the bar moved on after each."""
    bar.set_description(part)
    for item in items:
        yield item
        bar.update((CPU_SECONDS if ops.language() is None else SECONDS)[part] / number)


def block(seed: int, bar: tqdm) -> tuple[str, int]:
    """The block, and how many checks failed. What this machine's earlier trials found is forgotten
    first: every kernel is tried anew."""
    passed.forget()
    ops.forget()
    language = ops.language()
    lines = [f"{name:10} {value}" for name, value in facts(seed).items()]
    if language is None:
        lines += [
            "",
            "No kernel ran: MLX has no GPU here. Only the reference was checked, plain mx",
        ]
        lines += ["operations on a CPU, against float64. It says nothing about kernels."]
    cases = CPU_CASES if language is None else checks.EVERY
    every, few = checks.check(seed, cases), checks.check(seed + 1, checks.MORE, checks.FEW)
    results = list(watched(bar, "checks", every, checks.number(cases)))
    lines += ["", *table(results, cases)]
    if language is not None:
        number = checks.number(checks.MORE, checks.FEW)
        more = list(watched(bar, "formats", few, number))
        results += more
        lines += ["", *formats_table(more), "", *gpu_lines(bar)]
    failed = [r for r in results if not r.passed]
    broken = sum(line.startswith("FAIL") for line in lines)  # parts of gpu_lines
    lines += ["", f"{len(results) - len(failed)} of {len(results)} passed"]
    lines += [f"FAIL {r.op}, {r.case}: {said(r)}" for r in failed]
    lines += ["", f"not run: {not_run(language)}"]
    return "\n".join(["```", *lines, "```"]), len(failed) + broken


def facts(seed: int) -> dict[str, str]:
    language = ops.language()
    found = machine()
    found["memory"] = memory()
    found["backend"] = language or "reference (no GPU that MLX can use)"
    return {**found, "seed": str(seed)}


def memory() -> str:
    """Of the machine, and how much of it a GPU may use, where MLX says so."""
    info = mx.device_info() if ops.language() else {}
    size = int(info.get("memory_size") or info.get("total_memory") or 0)
    size = size or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = int(info.get("max_recommended_working_set_size") or 0)
    return f"{size / 2**30:.0f} GiB" + (f", {limit / 2**30:.1f} for the GPU" if limit else "")


def not_run(language: str | None) -> str:
    if language is None:
        return f"every kernel, compile times, timings; {NOT_RUN}"
    return f"{NOT_RUN}; {OTHERS[language]}"


def said(r: Result) -> str:
    return r.failure or f"error {r.error:.1e}, at most {r.limit:.0e}"


def table(results: list[Result], cases: list) -> list[str]:
    """A line for each variant: errors by case, and µs of one call in the first that has it."""
    names = list(dict.fromkeys(r.case for r in results))
    lines = ["largest error against float64, of pack the part of other codes than the reference's:"]
    lines += [f"  {chr(97 + i)}  {name}" for i, name in enumerate(names)]
    heads = "".join(f"{chr(97 + i):>9}" for i in range(len(names)))
    lines.append(f"{'':30}{heads}{'µs, first':>10}")
    for op in dict.fromkeys(r.op for r in results):
        found = {r.case: r for r in results if r.op == op}
        cells = "".join(f"{_cell(found.get(name)):>9}" for name in names)
        first = next(iter(found.values()))
        lines.append(f"{op:30}{cells}{first.microseconds:10.1f}")
    return lines


def formats_table(results: list[Result]) -> list[str]:
    """A line for each format: errors by operation."""
    columns = list(dict.fromkeys(r.op for r in results))
    lines = [f"other formats: {', '.join(f'{i} {c}' for i, c in enumerate(columns, 1))}"]
    lines.append(f"{'':58}" + "".join(f"{i:>9}" for i, _ in enumerate(columns, 1)))
    for case in dict.fromkeys(r.case for r in results):
        found = {r.op: r for r in results if r.case == case}
        lines.append(f"{case:58}" + "".join(f"{_cell(found.get(c)):>9}" for c in columns))
    return lines


def _cell(r: Result | None) -> str:
    if r is None:
        return "-"
    return f"{r.error:.0e}" if r.passed else "FAIL"


def gpu_lines(bar: tqdm) -> Iterator[str]:
    """Compile times, replayed launches and first timings. A part that fails is a line: what was
    found before is not lost."""
    for part, lines in (
        ("compiled", compile_lines),
        ("replayed", replay_lines),
        ("beside fp16", timing_lines),
    ):
        bar.set_description(part)
        try:
            yield from lines()
        except Exception as error:
            yield f"FAIL {part}: {failure(error)}"
        bar.update(SECONDS[part])
        yield ""
    yield f"the estimate for Apple GPUs: {ESTIMATE}"


def compile_lines() -> Iterator[str]:
    yield "kernels from loading a model to its 20th token, alone and in a batch; ms to compile:"
    kernels = figures.compiled()
    for k in kernels:
        yield f"  {1e3 * k.seconds:8.1f}  {k.kernel}"
    yield f"  {1e3 * sum(k.seconds for k in kernels):8.1f}  {len(kernels)} kernels"
    if ops.language() == "cuda":
        yield f"kernels of this process: {cubins.record}"


def replay_lines() -> Iterator[str]:
    same, called, again = figures.replayed()
    bits = "the same bits" if same else "OTHER BITS: leave MLX_KVQ_REPLAY unset"
    # On CUDA they are replayed unless MLX_KVQ_REPLAY=0 forbids it.
    failed = "FAIL " if not same and ops.language() == "cuda" else ""
    yield (
        f"{failed}replayed launches: {bits}; a layer's step {called:.3f} ms called, "
        f"{again:.3f} replayed"
    )


def timing_lines() -> Iterator[str]:
    yield "first timings, µs (mlx-lm's KVCache in fp16, int4-srft):"
    for rows in figures.beside_fp16(figures.CONTEXTS):
        yield f"  {timing(rows)}"


def timing(rows: list[dict]) -> str:
    """One line for the rows of an operation at one shape."""
    first = rows[0]
    figures = (f"{r['cache']} {r['us']:.1f}" if "us" in r else r["note"] for r in rows)
    line = f"{first['op']:9} {first['heads']}, {first['tokens']} tokens: {', '.join(figures)}"
    last = rows[-1]
    return line + (f", {last['x_fp16'][0]:.2f} x" if "x_fp16" in last else "")
