"""``mlx_kvq cache``: the calibrations that were made automatically and kept."""

import argparse
from datetime import UTC, datetime

from ..calibration import automatic
from ..calibration.set import CalibrationSet
from ..files import line, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="Delete them: they are made again.")


def run(args: argparse.Namespace) -> None:
    folder = automatic.directory()
    if args.clear:
        print(f"{len(automatic.prune(folder, 0))} deleted from {folder}")
        return
    files = sorted(folder.glob("*.safetensors"))
    print(f"{folder}: {len(files)} of at most {automatic.LARGEST_FOLDER >> 20} MiB in all")
    for path in files:
        try:
            notes = CalibrationSet.load(path).metadata
            text = f"{notes.get('model', '?')}: {notes.get('text')}, {notes.get('tokens')} tokens"
        except ValueError as error:
            text = line(error)
        used = datetime.fromtimestamp(path.stat().st_mtime, UTC).date()
        print(f"{size(path):>9}  {used}  {path.name}  {text}")
