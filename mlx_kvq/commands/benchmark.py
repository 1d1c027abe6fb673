"""Speed of the model's own cache, mlx-lm's quantized ones and packed ones, side by side."""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from .. import ops
from ..files import replacing
from ..measure import model_speed, op_speed, plots
from ..measure.contenders import EVEN, PLAIN
from ..measure.machine import machine
from ..measure.shapes import SHAPES
from ..measure.timing import copy_bandwidth
from .options import cache, length

CONTEXTS = [256, 1024, 4096, 8192, 32768]
CACHES = [
    "fp16", "bf16", "kv4", "kv8", "int4-srft", "int8-srft", "k8v4-srft", "k5v4-srft", "int3-srft"
]  # fmt: skip
# What the paper's int4 gains over fp16 in ms per token, Apple M1 (arXiv 2605.05699).
PAPER: list[dict[str, Any]] = [
    {"model": "gemma-3-1b", "cache": "int4, paper on M1", "change": [-0.08, -0.03]},
    {"model": "qwen2.5-1.5b", "cache": "int4, paper on M1", "change": [-0.026, -0.007]},
]
PAPER_QUANTIZE = 25  # ns per vector, M1
# column -> width
OPS_TABLE = {
    "op": 10, "heads": 22, "cache": 12, "batch": 5, "tokens": 7, "µs": 10, "±%": 4,
    "x fp16": 6, "x bf16": 6, "x kv4": 6, "MB": 9, "of copy": 7, "ns/vector": 9,
}  # fmt: skip
MODELS_TABLE = {
    "model": 13, "cache": 17, "batch": 5, "context": 7, "ms/token": 8, "±%": 4, "x fp16": 9,
    "tokens/s": 8, "prefill s": 9, "prefill x fp16": 14, "cache MB": 9, "smaller x": 9,
    "prefill peak MB": 15, "decode peak MB": 14,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="Local model directory or repository, end to end.")
    which.add_argument(
        "--shape", choices=SHAPES, help="Random weights in this shape, end to end; no download."
    )
    which.add_argument(
        "--from-json", nargs="+", type=Path, metavar="FILE",
        help="Measure nothing: show what --json wrote earlier, several files together.",
    )  # fmt: skip
    parser.add_argument(
        "--kv-cache", nargs="+", default=CACHES, metavar="CACHE",
        type=cache(*PLAIN, EVEN, "kv4", "kv8"),
        help="fp16, bf16, fp32, kv4, kv8 (mlx-lm's) or specs; for operations also fp16-even, "
        f"batches of one length without a mask (default: {' '.join(CACHES)}).",
    )  # fmt: skip
    parser.add_argument(
        "--contexts", nargs="+", type=length, default=CONTEXTS, metavar="TOKENS",
        help="Such as 256 or 32K (default: 256 1K 4K 8K 32K).",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", nargs="+", type=int, default=[1], help="Sequences (default: 1)."
    )
    parser.add_argument(
        "--heads", nargs="+", default=op_speed.HEADS, metavar="Q,KV,D",
        help="Operation by operation: query heads, KV heads and head size "
        f"(default: {' '.join(op_speed.HEADS)}).",
    )  # fmt: skip
    parser.add_argument(
        "--ops", nargs="+", choices=op_speed.OPS, default=list(op_speed.OPS),
        help="Default: all of them.",
    )  # fmt: skip
    parser.add_argument(
        "--vectors", type=int, default=262144,
        help="Keys and values together that a long prompt stores in a layer "
        "(default: %(default)s).",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"], default="float16",
        help="Of the model, or of queries, keys and values, but in rows fp16, bf16 and fp32 "
        "(default: %(default)s).",
    )  # fmt: skip
    parser.add_argument("--weight-bits", type=int, choices=[4, 8], help="With --shape.")
    parser.add_argument(
        "--tokens", type=int, default=32, help="Decode steps in a chain (default: %(default)s)."
    )
    for name, count in (("--rounds", 7), ("--prefill-rounds", 3)):
        parser.add_argument(name, type=int, default=count, help="Default: %(default)s.")
    parser.add_argument(
        "--beyond", type=int, default=256, metavar="MB",
        help="Cycle through buffers of at least this size, to see memory and not a cache "
        "(default: %(default)s).",
    )  # fmt: skip
    parser.add_argument(
        "--cpu-time", action="store_true",
        help="Operation by operation on a CPU that others use too: processor time, not wall clock.",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="Write everything measured to this file.")
    parser.add_argument("--plot", type=Path, help="Time relative to fp16 over context.")


def run(args: argparse.Namespace) -> None:
    _check(args)
    if args.from_json:
        results = [_read(path) for path in args.from_json]
        for result in results:
            _print_record(result["record"])
            table = _Table(result["rows"][0] if result["rows"] else {})
            for row in result["rows"]:
                table.add(row)
            table.end()
    else:
        results = [_measure(args)]
    if args.plot:
        plots.draw_speed(results, str(args.plot), PAPER)


def _check(args: argparse.Namespace) -> None:
    for path in (args.json, args.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"The folder of {path} does not exist.")
    if args.plot:
        plots.check(str(args.plot))
    counts = [*args.contexts, *args.batch_size, args.tokens, args.rounds, args.prefill_rounds]
    if min(counts) < 1 or args.beyond < 0:
        raise ValueError("Contexts, batch sizes, tokens and rounds are at least 1.")
    if (args.model or args.shape) and min(args.contexts) < 2:
        raise ValueError("End to end a context has at least 2 tokens.")
    if args.cpu_time and (args.model or args.shape or ops.language()):
        raise ValueError("--cpu-time is for operations, and for a CPU.")
    if args.weight_bits and not args.shape:
        raise ValueError("--weight-bits goes with --shape.")


def _measure(args: argparse.Namespace) -> dict:
    """Measure, print rows as they come, and write them as they come: a run may be cut off."""
    described = record()
    _print_record(described)
    result: dict[str, Any] = {"record": described, "rows": [], "paper": PAPER}
    items_of = len(args.contexts) * len(args.batch_size)
    if args.model or args.shape:
        items = model_speed.measure(args)
    else:
        each = {"attend": items_of, "quantize": len(args.batch_size) + 1, "dequantize": items_of}
        items_of = len(args.heads) * sum(each[op] for op in args.ops)
        copy = copy_bandwidth(args.beyond or 256)
        described["copy_gb_per_s"] = round(copy / 1e9, 1)
        print(f"{'copy':10} {described['copy_gb_per_s']} GB/s, read and written")
        items = op_speed.measure(args, copy)
    table = None
    with tqdm(total=items_of, unit="shape", leave=False, disable=None) as bar:
        for rows in items:
            for row in rows:
                table = table or _Table(row, bar.write)
                table.add(row)
            bar.update()
            result["rows"] += rows
            if args.json:
                with replacing(args.json) as part:
                    text = json.dumps(result, indent=1, ensure_ascii=False)
                    part.write_text(text, encoding="utf-8")
    if table:
        table.end()
    return result


class _Table:
    """A Markdown table, its rows as they come."""

    def __init__(self, first: dict, write=print):
        self.write, self.notes = write, list[str]()
        self.ops = "op" in first
        self.columns = OPS_TABLE if self.ops else MODELS_TABLE
        write("")
        self._line({c: c for c in self.columns})
        self._line({c: "-" * (w - 1) + ":" for c, w in self.columns.items()})

    def _line(self, cells: dict[str, str]) -> None:
        row = (cells.get(c, "").rjust(w) for c, w in self.columns.items())
        self.write(f"| {' | '.join(row)} |")

    def add(self, row: dict) -> None:
        cells = {k: str(row[k]) for k in ("op", "heads", "model", "cache", "batch") if k in row}
        for k in ("tokens", "context"):
            if k in row:
                cells[k] = str(row[k])
        if "note" in row:
            self._line(cells)
            self.notes.append(f"{', '.join(cells.values())}: {row['note']}")
            return
        for base in ("fp16", "bf16", "kv4"):
            if f"x_{base}" in row:
                cells[f"x {base}"] = f"{row[f'x_{base}'][0]:.2f}"
        unit = "us" if self.ops else "ms"
        cells["±%"] = f"{50 * (row[f'{unit}_high'] - row[f'{unit}_low']) / row[unit]:.0f}"
        if self.ops:
            cells["µs"] = f"{row['us']:.1f}"
            cells["MB"] = f"{row['bytes'] / 1e6:.2f}"
            cells["of copy"] = f"{row['of_copy']:.3f}"
            if "ns_per_vector" in row:
                cells["ns/vector"] = f"{row['ns_per_vector']:.3f}"
        else:
            cells["ms/token"] = f"{row['ms']:.2f}"
            cells["tokens/s"] = f"{row['tokens_per_s']:.1f}"
            cells["prefill s"] = f"{row['prefill_s']:.3f}"
            cells["cache MB"] = f"{row['cache_bytes'] / 1e6:.1f}"
            cells["prefill peak MB"] = f"{row['prefill_peak_bytes'] / 1e6:.1f}"
            cells["decode peak MB"] = f"{row['decode_peak_bytes'] / 1e6:.1f}"
            if "x_fp16" in row:
                cells["prefill x fp16"] = f"{row['prefill_x_fp16'][0]:.2f}"
                cells["smaller x"] = f"{row['smaller_than_fp16']:.2f}"
        self._line(cells)

    def end(self) -> None:
        for row in () if self.ops else PAPER:
            slow, fast = (1 / (1 + change) for change in reversed(row["change"]))
            self._line({**row, "x fp16": f"{slow:.2f}-{fast:.2f}"})
        for note in self.notes:
            self.write(f"\n{note}")
        paper = f" The paper's quantize on M1: about {PAPER_QUANTIZE} ns per vector."
        self.write(
            f"\nx: times faster than that row, median over rounds.{paper if self.ops else ''}"
        )


def record() -> dict[str, Any]:
    """What was measured with, on what: date, command, commit, versions, device."""
    info = mx.device_info()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"mlx_kvq {shlex.join(sys.argv[1:])}",
        "commit": _commit(),
        "sources": _digest(),
        **machine(),
        "device": f"{info.get('device_name', 'unknown')}, {os.cpu_count()} CPU cores",
    }


def _print_record(record: dict) -> None:
    for name, value in record.items():
        print(f"{name:10} {value}")


def _commit() -> str:
    """The commit of the checkout this runs from, if it is one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "not a checkout"
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def _digest() -> str:
    """Of the package and its kernels: what ran, also where there is no git."""
    digest = hashlib.sha256()
    for folder, pattern in (
        (Path(__file__).parents[1], "**/*.py"),
        (ops.kernels_path(), "*.[mc]*"),
    ):
        for path in sorted(folder.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _read(path: Path) -> dict:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(result, dict) or not {"record", "rows"} <= set(result):
        raise ValueError(f"{path} was not written by 'mlx_kvq benchmark --json'.")
    return result
