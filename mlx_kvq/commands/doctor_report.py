"""``mlx_kvq doctor --report FILE``: doctor's block, the benchmark at three lengths and peak memory
beside fp16, in one Markdown file. Nothing private is in it: no name of a user, a machine or a
folder, and no model is read."""

import argparse
import getpass
import os
import platform
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..calibration.automatic import random_tokens
from ..calibration.fit import calibrate_tokens
from ..files import failure, replacing
from ..format.spec import Spec
from ..measure import baselines, model_speed
from ..measure.shapes import random_model
from . import doctor_figures as figures

CONTEXTS = [1024, 4096, 16384]
CPU_CONTEXTS = [32, 64, 128]
ENOUGH = 12 << 30  # bytes of memory for the larger shape
BENCHMARK = 240.0  # seconds on a Mac, a guess until one has run it
CPU_BENCHMARK = 20.0


def seconds() -> float:
    return CPU_BENCHMARK if ops.language() is None else BENCHMARK


def write(path: Path, block: Callable[[], tuple[str, int]], bar) -> int:
    """Run everything and write the file, again after each part: a run may be cut off. Exit status 0
    if every check passed."""
    report = _Report(path)
    text, failed = block()
    report.add("Checks", text)
    report.add("Benchmark", _benchmark(bar))
    report.add("End", f"Complete. {'Every check passed.' if not failed else f'{failed} failed.'}")
    bar.write(f"written to {path}: attach it to an issue")
    return 1 if failed else 0


def check(path: Path, overwrite: bool) -> None:
    """Raise ValueError if the file exists, or its folder does not."""
    if path.is_dir():
        raise ValueError(f"--report takes a file, and {path} is a folder.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: give another name, or --overwrite.")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"The folder of {path} does not exist.")


class _Report:
    """The parts that are done, in the file."""

    def __init__(self, path: Path):
        self.path, self.parts = path, [_title()]

    def add(self, title: str, text: str) -> None:
        self.parts.append(f"## {title}\n\n{public(text)}\n")
        with replacing(self.path) as part:
            part.write_text("\n".join(self.parts), encoding="utf-8")


def _title() -> str:
    if ops.language() is None:
        return (
            "# mlx_kvq doctor: REDUCED report of a CPU\n\nNo kernel ran. Lengths are short; "
            "nothing here says anything about a GPU.\n"
        )
    return f"# mlx_kvq doctor: report of a {ops.language()} GPU\n"


def _benchmark(bar) -> str:
    """Prefill, decoding and peak memory of a model with random weights; what fails is a line."""
    try:
        label, entries = _entries()
        on_cpu = ops.language() is None
        contexts, tokens, rounds = (CPU_CONTEXTS, 4, 2) if on_cpu else (CONTEXTS, 32, 5)
        args = argparse.Namespace(
            shape=label, model=None, weight_bits=None, batch_size=[1], contexts=contexts,
            tokens=tokens, rounds=rounds, prefill_rounds=1,
        )  # fmt: skip
        rows = [HEAD, "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
        bar.set_description("benchmark")
        for found in model_speed.measure(args, entries):
            rows += [_row(row) for row in found]
            bar.update(seconds() / len(contexts))
    except Exception as error:
        return f"failed: {failure(error)}"
    return f"{label}, random weights, batch 1\n\n" + "\n".join(rows)


HEAD = (
    "| cache | context | ms/token | ±% | × fp16 | prefill s | × fp16 | cache MB | peak MB of "
    "prefill | peak MB of decoding |"
)


def _row(row: dict[str, Any]) -> str:
    if "note" in row:
        return f"| {row['cache']} | {row['context']} | {row['note']} |{' |' * 7}"
    x, p = (row.get(k, [float("nan")])[0] for k in ("x_fp16", "prefill_x_fp16"))
    spread = 50 * (row["ms_high"] - row["ms_low"]) / row["ms"]
    sizes = (row[k] / 1e6 for k in ("cache_bytes", "prefill_peak_bytes", "decode_peak_bytes"))
    cells = [row["cache"], row["context"], f"{row['ms']:.2f}", f"{spread:.0f}", f"{x:.2f}"]
    cells += [f"{row['prefill_s']:.3f}", f"{p:.2f}", *(f"{s:.1f}" for s in sizes)]
    return f"| {' | '.join(map(str, cells))} |"


def _entries() -> tuple[str, dict[str, baselines.Contender]]:
    """A model with weights in 4 bits in the shape of a real one, on its own cache and on int4; on a
    CPU a small one."""
    if ops.language() is None:
        model: nn.Module = figures.small()
        label = "two layers in the shape of Qwen2.5-1.5B's attention"
    else:
        info = mx.device_info()
        enough = int(info.get("memory_size") or info.get("total_memory") or 0) >= ENOUGH
        shape = "qwen2.5-1.5b" if enough else "qwen2.5-0.5b"
        label, model = f"{shape}, 4-bit", random_model(shape, mx.float16, 4)
    spec = Spec.parse("int4-srft")
    assert spec is not None
    calibration = calibrate_tokens(model, [random_tokens(model)[:128]], progress=False)
    packed = baselines.packed(model, spec, calibration)
    return label, {"fp16": baselines.own(model), "int4-srft": packed}


def public(text: str) -> str:
    """The text without names of folders, of the user and of the machine."""
    for folder, short in _folders():
        text = text.replace(folder, short)
    for name in _names():
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "(name)", text, flags=re.I)
    return text


def _folders() -> Iterator[tuple[str, str]]:
    """Longest first."""
    package = Path(__file__).resolve().parents[2]
    found = {str(package): "(package)", os.getcwd(): "(here)", sys.prefix: "(python)"}
    for name in ("HOME", "MLX_KVQ_CACHE", "XDG_CACHE_HOME", "TMPDIR", "VIRTUAL_ENV"):
        if value := os.environ.get(name):
            found[value] = "~" if name == "HOME" else f"({name})"
    yield from sorted(found.items(), key=lambda pair: -len(pair[0]))


def _names() -> set[str]:
    """Of the user and the machine; not those so short that they are in other words."""
    names = {os.environ.get(n, "") for n in ("USER", "LOGNAME", "USERNAME", "HOSTNAME")}
    for ask in (getpass.getuser, socket.gethostname, platform.node):
        try:
            names.add(ask())
        except (OSError, KeyError, ImportError):  # no such user
            continue
    names |= {name.partition(".")[0] for name in names}
    return {name for name in names if len(name) > 2 and name not in ("root", "localhost")}
