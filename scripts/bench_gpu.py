"""What docs/performance.md says of a GPU: operations in three minutes, models in about eight.

    python scripts/bench_gpu.py OUT               # OUT/ops.json, OUT/models.json
    python scripts/bench_gpu.py OUT --budget 540  # seconds, not 900; what does not fit is left out
    python scripts/bench_gpu.py OUT --match 'gemma.*batch 16'   # some rows, by their names
    python scripts/bench_gpu.py OUT --tiny        # the same way with tiny sizes, on any machine
    python scripts/tables.py OUT/*.json           # the tables, as markdown

The files are what ``mlx_kvq benchmark --json`` writes. Each is written anew after every row of
measurements: a run that is killed keeps what it has. All contenders of a row are timed in turn, in
one process, on one card; a custom kernel is compiled once (3 to 5 s on CUDA), before its first row
is timed.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx_lm.models import qwen2

from mlx_kvq.commands import benchmark
from mlx_kvq.files import replacing
from mlx_kvq.measure import model_speed, op_speed
from mlx_kvq.measure.shapes import SHAPES
from mlx_kvq.measure.timing import copy_bandwidth

OPS_CACHES = ["fp16", "int4-srft", "kv4", "kv8"]
MODEL_CACHES = ["fp16", "int4-srft"]
# Heads, batch, tokens: attention of one token.
ATTEND = [
    *(("12,2,128", B, T) for B, T in ((1, 512), (1, 4000), (1, 32000), (1, 130000))),
    *(("12,2,128", B, T) for B, T in ((16, 8192), (32, 32000))),
    *(
        (heads, B, T)
        for heads in ("4,1,256", "32,8,128", "14,2,64")
        for B, T in ((1, 4000), (1, 32000), (32, 32000))
    ),
]
# Shape, batch, context: prefill and decoding.
MODELS = [
    (shape, B, T)
    for shape in ("gemma-3-1b", "qwen2.5-1.5b")
    for B, T in ((16, 8192), (1, 256), (1, 1024), (1, 4096), (1, 8192), (1, 32768))
]
TINY = {
    "model_type": "qwen2", "hidden_size": 128, "num_hidden_layers": 2, "rms_norm_eps": 1e-6,
    "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1000,
}  # fmt: skip
TINY_ATTEND = [("4,2,64", 1, 40), ("4,2,64", 2, 300)]


@dataclass(frozen=True)
class Item:
    """One row of measurements: arguments of ``mlx_kvq benchmark``, and the file it goes to."""

    file: str
    name: str
    arguments: list[str]


def items(args: argparse.Namespace) -> list[Item]:
    rounds = ["--rounds", str(args.rounds), "--beyond", str(args.beyond)]
    attend = [
        Item(
            "ops.json",
            f"{heads}, batch {B}, {T} tokens",
            ["--ops", "attend", "--heads", heads, "--batch-size", str(B), "--contexts", str(T)]
            + ["--kv-cache", *OPS_CACHES, *(["fp16-even"] if B > 1 else []), *rounds],
        )
        for heads, B, T in (TINY_ATTEND if args.tiny else ATTEND)
    ]
    models = [
        Item(
            "models.json",
            f"{shape}, batch {B}, {T} tokens",
            ["--shape", shape, "--batch-size", str(B), "--contexts", str(T)]
            + ["--kv-cache", *MODEL_CACHES, *rounds]
            + ["--tokens", str(args.tokens), "--prefill-rounds", str(args.prefill_rounds)],
        )
        for shape, B, T in args.models
    ]
    return [*attend, *models]


class Models:
    """The models and caches of one shape, made once for all its contexts."""

    def __init__(self) -> None:
        self.shape = ""
        self.entries: dict = {}

    def measure(self, args: argparse.Namespace) -> Iterator[list[dict]]:
        if args.shape != self.shape:
            self.entries = {}
            mx.clear_cache()
            self.entries, self.shape = model_speed.entries(args), args.shape
        return model_speed.measure(args, self.entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the JSON files")
    parser.add_argument("--budget", type=float, default=900, help="seconds in all")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--prefill-rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="decode steps in a chain")
    parser.add_argument("--beyond", type=int, default=160, metavar="MB", help="above the L2 cache")
    parser.add_argument("--only", choices=["ops", "models"], help="one of the two files")
    parser.add_argument("--match", default="", metavar="REGEX", help="only rows with such names")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on any machine")
    args = parser.parse_args()
    if min(args.rounds, args.prefill_rounds, args.tokens) < 1 or args.beyond < 0:
        parser.error("rounds and tokens are at least 1, megabytes at least 0")
    args.models = MODELS
    if args.tiny:
        args.rounds, args.prefill_rounds, args.tokens, args.beyond = 2, 1, 2, 1
        SHAPES["tiny"] = (qwen2, TINY)
        args.models = [("tiny", 1, 40), ("tiny", 2, 40)]
    args.out.mkdir(parents=True, exist_ok=True)
    sys.exit(run(args))


def run(args: argparse.Namespace) -> int:
    """Measure until the time is over; 1 if something was left out."""
    started = time.perf_counter()
    record = benchmark.record()
    record["command"] = f"python scripts/bench_gpu.py {' '.join(sys.argv[1:])}"
    copy = copy_bandwidth(args.beyond)
    record["copy_gb_per_s"] = round(copy / 1e9, 1)
    for name, value in record.items():
        print(f"{name:10} {value}", flush=True)
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    results: dict[str, list] = {}
    models = Models()
    left, longest = 0, {"ops.json": 0.0, "models.json": 0.0}
    for item in items(args):
        if args.only and item.file != f"{args.only}.json" or not re.search(args.match, item.name):
            continue
        begun = time.perf_counter()
        # One more takes about as long as the longest of its kind so far.
        if begun - started + longest[item.file] > args.budget:
            print(f"left out, no time: {item.name}", flush=True)
            left += 1
            continue
        given = parser.parse_args(item.arguments)
        measured = (
            op_speed.measure(given, copy) if item.file == "ops.json" else models.measure(given)
        )
        for rows in measured:
            results.setdefault(item.file, []).extend(rows)
            with replacing(args.out / item.file) as part:
                text = {"record": record, "rows": results[item.file], "paper": benchmark.PAPER}
                part.write_text(json.dumps(text, indent=1, ensure_ascii=False), encoding="utf-8")
            for row in rows:
                print(line(row), flush=True)
        took = time.perf_counter() - begun
        longest[item.file] = max(longest[item.file], took)
        print(f"{time.perf_counter() - started:6.0f} s, {took:.1f} of them for this", flush=True)
    return min(left, 1)


def line(row: dict) -> str:
    name = f"{row.get('heads') or row['model']}, batch {row['batch']}, "
    name += f"{row.get('tokens') or row['context']} tokens, {row['cache']}"
    if "note" in row:
        return f"{name}: {row['note']}"
    time_ = f"{row['us']:.1f} µs" if "us" in row else f"{row['ms']:.2f} ms"
    x = row.get("x_fp16")
    return f"{name}: {time_}" + (f", {x[0]:.2f} x fp16 ({x[1]:.2f}-{x[2]:.2f})" if x else "")


if __name__ == "__main__":
    main()
