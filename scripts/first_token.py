"""Seconds from the start of a process to its first token: with nothing kept, in the next process,
and with MLX compiling the CUDA kernels itself.

    python scripts/first_token.py MODEL [--rounds 3] [--json FILE]

Every row is a process of its own that loads the model, reads a prompt of 30 tokens, writes 20, and
reads another prompt of 600. Columns are seconds from the start of the process on, but the last two:
what was done with kernels. Nothing of the user's cache is used or changed. MODEL is a folder, or a
repository that is on the disk already; examples/models/tiny-qwen2-8bit will do.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT, TOKENS, LONGER = 30, 20, 600
# Row -> which folders of kept things it has, what is deleted first, and its environment.
ROWS: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "int4, nothing kept": ("on", ("kept", "ptx"), {}),
    "int4, the next process": ("on", (), {}),
    "int4, after a restart of the machine": ("on", ("ptx",), {}),
    "MLX compiles, nothing kept": ("off", ("kept", "ptx"), {"MLX_KVQ_COMPILED": "0"}),
    "MLX compiles, the next process": ("off", (), {"MLX_KVQ_COMPILED": "0"}),
    "fp16, nothing kept": ("fp16", ("kept", "ptx"), {}),
    "fp16, the next process": ("fp16", (), {}),
}
COLUMNS = ["imported", "loaded", "first token", f"{TOKENS} tokens", f"{LONGER} more read"]


def one(model: str, spec: str, started: float) -> None:
    """A process: prints its times as JSON. Imports are part of them."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    import mlx_kvq
    from mlx_kvq.ops import cubins

    times = [time.time() - started]
    loaded, *_ = load(model)
    if spec != "fp16":
        mlx_kvq.enable(loaded, spec, verbose=False)
    mx.eval(loaded.parameters())
    times.append(time.time() - started)
    for i, _ in enumerate(generate_step(mx.ones((PROMPT,), mx.int32), loaded, max_tokens=TOKENS)):
        if i in (0, TOKENS - 1):
            times.append(time.time() - started)
    next(generate_step(mx.ones((LONGER,), mx.int32), loaded, max_tokens=1))
    times.append(time.time() - started)
    device = mx.device_info().get("device_name", "CPU")
    print(json.dumps({"times": times, "kernels": str(cubins.record), "device": device}))


def measured(folder: Path, row: str, args: argparse.Namespace) -> dict:
    which, emptied, more = ROWS[row]
    kept = {"kept": folder / which / "kept", "ptx": folder / which / "ptx"}
    for name in emptied:
        shutil.rmtree(kept[name], ignore_errors=True)
    env = {**os.environ, "MLX_KVQ_COMPILED": "", **more}
    env |= {"MLX_KVQ_CACHE": str(kept["kept"]), "MLX_PTX_CACHE_DIR": str(kept["ptx"])}
    spec = "fp16" if which == "fp16" else args.kv_cache
    command = [sys.executable, __file__, args.model, "--one", spec, str(time.time())]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"'{row}' failed with status {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, list[dict]]) -> list[str]:
    lines = [f"| | {' | '.join(COLUMNS)} | kernels |", f"|---|{'--:|' * len(COLUMNS)}---|"]
    for row, rounds in found.items():
        each = zip(*(r["times"] for r in rounds), strict=True)
        cells = [f"{statistics.median(times):.2f}" for times in each]
        said = "" if row.startswith("fp16") else rounds[-1]["kernels"]
        lines.append(f"| {row} | {' | '.join(cells)} | {said} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--kv-cache", default="int4-srft:calibrate=off")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write every time to this file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # spec, start
    args = parser.parse_args()
    if args.one is not None:
        return one(args.model, args.one[0], float(args.one[1]))
    found: dict[str, list[dict]] = {row: [] for row in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for row in ROWS:
                found[row].append(measured(Path(folder), row, args))
                print(f"{row}: {found[row][-1]['times']}", file=sys.stderr, flush=True)
    device = found["int4, nothing kept"][0]["device"]
    print(f"{device}, {args.model}, median of {args.rounds}, seconds\n")
    print("\n".join(table(found)))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
