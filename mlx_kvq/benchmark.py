"""Speed of the model's own cache, mlx-lm's quantized ones and packed ones, side by side."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import mlx.core as mx
from mlx_lm import load
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from tqdm import tqdm

from . import model as models
from .contenders import Contender, Heads, contender, nbytes
from .doctor import machine
from .shapes import SHAPES, random_model
from .timing import Timing, copy_bandwidth, interleave, summarize

CACHES = ["fp16", "bf16", "kv4", "kv8", "int4-srft", "k8v4-srft", "int8-srft"]
HEADS = [Heads(12, 2, 128), Heads(4, 1, 256), Heads(32, 8, 128)]
PAPER = (
    "arXiv 2605.05699 on Apple M1, int4 against fp16, ms per token: Gemma-3 1B -3 to -8 %, "
    "Qwen2.5-1.5B -0.7 to -2.6 %; about 25 ns per vector to quantize"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="Local model directory or repository, end to end.")
    which.add_argument(
        "--shape", choices=SHAPES, help="Random weights in this shape, end to end; no download."
    )
    parser.add_argument(
        "--kv-cache", nargs="+", default=CACHES, metavar="CACHE",
        help=f"fp16, bf16, kv4, kv8 (mlx-lm's) or specs (default: {' '.join(CACHES)}).",
    )  # fmt: skip
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 4096, 8192, 32768])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--weight-bits", type=int, choices=[4, 8], help="With --shape.")
    parser.add_argument("--tokens", type=int, default=32, help="Decode steps in a chain.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--beyond", type=int, default=256, metavar="MB",
        help="Cycle through buffers of at least this size, to see memory and not a cache.",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="Write everything measured to this file.")


def run(args: argparse.Namespace) -> None:
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise ValueError(f"The folder of {args.json} does not exist.")
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["mlx_kvq", *sys.argv[1:]]),
        "commit": _commit(),
        **machine(),
    }
    for name, value in record.items():
        print(f"{name:10} {value}")
    if args.model or args.shape:
        rows = _end_to_end(args)
        columns = ["cache", "batch", "context", "ms_per_token", "ratio", "tokens_per_s",
                   "prefill_s", "cache_mb", "peak_mb"]  # fmt: skip
    else:
        copy = round(copy_bandwidth(args.beyond) / 1e9, 1)
        record["copy_gb_per_s"] = str(copy)
        print(f"copy       {copy} GB/s, read and written")
        rows = list(_attention(args, copy))
        rows += _storing(args, copy)
        columns = ["op", "heads", "cache", "batch", "context", "microseconds", "ratio", "mb",
                   "of_copy"]  # fmt: skip
    print()
    _table(rows, columns)
    print(f"\nratio: time of fp16 over time of this cache. For comparison: {PAPER}.")
    if args.json:
        _write(args.json, json.dumps({"record": record, "rows": rows}, indent=1))


def _attention(args, copy: float) -> Iterator[dict]:
    dtype = getattr(mx, args.dtype)
    work = [(h, B, T) for h in HEADS for B in args.batch_size for T in args.contexts]
    for heads, B, T in tqdm(work, desc="attention", leave=False):
        chains, sizes = {}, {}
        for name in args.kv_cache:
            c = contender(name, heads, dtype)
            first = c.make(B, T)
            mx.eval(first)
            sizes[name] = nbytes(first)
            copies = max(2, min(64, (args.beyond << 20) // sizes[name]))
            buffers = [first] + [c.make(B, T) for _ in range(copies - 1)]
            mx.eval(buffers)
            q = mx.random.normal((B, heads.queries, 1, heads.dim))
            kind = mx.bfloat16 if name == "bf16" else dtype
            chains[name] = _chain(c, buffers, q.astype(kind), args.tokens)
        times = interleave(chains, args.rounds)
        for name, t in times.items():
            yield _row("attend", heads, name, B, T, t, times, sizes[name], copy)


def _chain(c: Contender, buffers: list, q: mx.array, steps: int):
    mx.eval(q)

    def chain() -> int:
        x = q
        for i in range(steps):
            x = c.attend(x, buffers[i % len(buffers)])
        mx.eval(x)
        return steps

    return chain


def _storing(args, copy: float) -> Iterator[dict]:
    """One token and a prompt's worth of vectors; the next call waits for the last."""
    dtype = getattr(mx, args.dtype)
    for heads in tqdm(HEADS, desc="storing", leave=False):
        for L in (1, 131072 // heads.kv):
            k, v = (mx.random.normal((1, heads.kv, L, heads.dim)).astype(dtype) for _ in "kv")
            mx.eval(k, v)
            chains, sizes = {}, {}
            for name in args.kv_cache:
                if (store := contender(name, heads, dtype).store) is None:
                    continue
                kept = store(k, v)
                mx.eval(kept)
                sizes[name] = nbytes((k, v)) + nbytes(kept)

                chains[name] = _storing_chain(store, k, v, args.tokens if L == 1 else 4)
            times = interleave(chains, args.rounds)
            for name, t in times.items():
                yield _row("store", heads, name, 1, L, t, times, sizes[name], copy)


def _storing_chain(store, k: mx.array, v: mx.array, steps: int):
    def chain() -> int:
        after: list = []
        for _ in range(steps):
            after = list(store(mx.depends(k, after) if after else k, v))
        mx.eval(after)
        return steps

    return chain


def _row(op, heads, name, B, T, t: Timing, times, size, copy) -> dict:
    fp16 = times.get("fp16")
    return {
        "op": op, "heads": str(heads), "cache": name, "batch": B, "context": T,
        "microseconds": round(1e6 * t.median, 2),
        "low": round(1e6 * t.low, 2), "high": round(1e6 * t.high, 2),
        "ratio": round(fp16.median / t.median, 2) if fp16 else None,
        "mb": round(size / 1e6, 3),
        "of_copy": round(size / t.median / 1e9 / copy, 3),
    }  # fmt: skip


def _end_to_end(args) -> list[dict]:
    """Prefill, then decode in chunks of steps, the caches taking turns."""
    dtype = getattr(mx, args.dtype)
    if args.model:
        model, *_ = load(args.model)
    else:
        model = random_model(args.shape, dtype, args.weight_bits)
    rows = []
    work = [(B, T) for B in args.batch_size for T in args.contexts]
    for B, T in tqdm(work, desc="end to end", leave=False):
        steppers = {}
        for name in args.kv_cache:
            if (stepper := _Stepper.start(model, name, B, T)) is not None:
                steppers[name] = stepper
        times: dict[str, list[float]] = {name: [] for name in steppers}
        for r in range(args.rounds + 1):
            for name, stepper in steppers.items():
                seconds = stepper.step(args.tokens)
                if r:  # the first is warm-up
                    times[name].append(seconds)
        timings = {name: summarize(values) for name, values in times.items()}
        for name, t in timings.items():
            s = steppers[name]
            fp16 = timings.get("fp16")
            rows.append({
                "cache": name, "batch": B, "context": T,
                "ms_per_token": round(1e3 * t.median, 3),
                "low": round(1e3 * t.low, 3), "high": round(1e3 * t.high, 3),
                "ratio": round(fp16.median / t.median, 3) if fp16 else None,
                "tokens_per_s": round(B / t.median, 1),
                "prefill_s": round(s.prefill, 3),
                "cache_mb": round(s.cache_bytes / 1e6, 2),
                "peak_mb": round(s.peak / 1e6, 1),
            })  # fmt: skip
        del steppers
        mx.clear_cache()
    return rows


class _Stepper:
    """One cache in the middle of a generation."""

    def __init__(self, model, cache, B: int, T: int):
        self.model, self.cache = model, cache
        tokens = mx.random.randint(0, 1000, (B, T))
        mx.eval(tokens)
        for attempt in range(2):  # the first compiles
            if attempt == 0:
                self._prompt(tokens[:, : min(T, 64)])
                for c in cache:
                    c.trim(c.offset)
            mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        start = time.perf_counter()
        self.y = self._prompt(tokens)
        mx.synchronize()
        self.prefill = time.perf_counter() - start
        self.peak = mx.get_peak_memory() - before
        self.cache_bytes = sum(c.nbytes for c in cache)

    def _prompt(self, tokens, step: int = 2048):
        for i in range(0, tokens.shape[1], step):
            logits = self.model(tokens[:, i : i + step], cache=self.cache)
            mx.eval([c.state for c in self.cache])
        y = logits[:, -1:].argmax(axis=-1)
        mx.eval(y)
        return y

    @classmethod
    def start(cls, model, name: str, B: int, T: int) -> "_Stepper | None":
        caches = make_prompt_cache(model)
        if name in ("kv4", "kv8"):
            if any(not hasattr(c, "to_quantized") or hasattr(c, "max_size") for c in caches):
                return None  # mlx-lm cannot quantize a sliding layer
            caches = [QuantizedKVCache(64, int(name[2:])) for _ in caches]
        elif name == "bf16":
            return None  # a cache holds the model's dtype: --dtype
        elif name != "fp16":
            caches = models.make_prompt_cache(model, name)
        return cls(model, caches, B, T)

    def step(self, steps: int) -> float:
        """Seconds per step of greedy decoding, pipelined as mlx-lm does."""
        start = time.perf_counter()
        y = self.y
        for _ in range(steps):
            y = self.model(y, cache=self.cache)[:, -1:].argmax(axis=-1)
            mx.async_eval(y)
        mx.eval(y)
        self.y = y
        return (time.perf_counter() - start) / steps


def _table(rows: list[dict], columns: list[str]) -> None:
    cells = [columns] + [["" if r[c] is None else str(r[c]) for c in columns] for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _commit() -> str:
    """The commit of the checkout this runs from, if it is one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "not a checkout"
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"
