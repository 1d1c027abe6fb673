"""``mlx_kvq cache``: what was made automatically and kept: calibrations, which kernels passed their
trial on this machine, and compiled CUDA kernels."""

import argparse
from datetime import UTC, datetime
from pathlib import Path

from .. import files
from ..calibration.set import CalibrationSet
from ..ops import cubins, passed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="Delete them: they are made again.")


def run(args: argparse.Namespace) -> None:
    folder = files.kept_folder()
    if args.clear:
        print(f"{len(files.prune(folder, 0))} deleted from {folder}")
        if handed := cubins.withdraw():  # copies of compiled kernels
            print(f"{handed} deleted from {cubins.mlx_folder()}")
        return
    kept = files.kept_files(folder)
    print(f"{folder}: {len(kept)} of at most {files.LARGEST_FOLDER >> 20} MiB in all")
    for path in kept:
        try:
            said = SAID[path.suffix](path)
        except ValueError as error:
            said = files.line(error)
        used = datetime.fromtimestamp(path.stat().st_mtime, UTC).date()
        print(f"{files.size(path):>9}  {used}  {path.name}  {said}")


def _calibration(path: Path) -> str:
    notes = CalibrationSet.load(path).metadata
    return f"{notes.get('model', '?')}: {notes.get('text')}, {notes.get('tokens')} tokens"


def _trials(path: Path) -> str:
    if not (trials := passed.read(path)):
        raise ValueError("is damaged: kernels are tried again")
    where = files.parse_json(files.read_text(path))["machine"]
    return files.line(f"{len(trials)} kernels passed on {', '.join(where.values())}")


def _kernel(path: Path) -> str:
    if (kept := cubins.read(path, used=False)) is None:
        raise ValueError("is damaged: the kernel is compiled again")
    return files.line(kept[1])


SAID = {".json": _trials, ".safetensors": _calibration, ".cubin": _kernel}  # of files.KEPT
