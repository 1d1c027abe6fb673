"""Trials that this machine has passed, kept on disk, so that the next process need not repeat them.

One file for each GPU, system, version of MLX and of this package: a JSON object of passed trials,
by a hash of the kernels' text, with its constants, and of the dtypes. It is written whole or not at
all; where two processes write at once, one's new trials are lost, and are made again. A file that
cannot be read or written is as good as none. ``mlx_kvq doctor`` and ``mlx_kvq cache --clear``
delete it: then kernels are tried anew.
"""

import hashlib
import json
import platform
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx

from .. import __version__
from ..files import kept_folder, parse_json, replacing

MOST = 1000  # trials in a file: each is 100 bytes, and a model has fewer than ten


def machine() -> dict[str, str]:
    """What a trial depends on apart from the kernel."""
    info = mx.device_info()
    return {
        "device": f"{info.get('device_name', 'unknown')} {info.get('architecture', '')}".strip(),
        "system": f"{platform.platform()} {platform.version()}",  # the latter has the build
        "mlx": mx.__version__,  # type: ignore[attr-defined]
        "mlx_kvq": __version__,
    }


def path() -> Path | None:
    """The file of this machine; None where there is no home folder."""
    try:
        folder = kept_folder()
    except RuntimeError:
        return None
    return folder / f"trials-{_digest(machine().values())}.json"


def key(op: str, texts: Iterable[str], dtypes: tuple) -> str:
    """The name of a trial; ``texts`` are digests of the kernels."""
    return _digest([op, *texts, *map(str, dtypes)])


def has(trial: str) -> bool:
    file = path()
    return file is not None and trial in read(file)


def add(trial: str, said: str) -> None:
    """Keep a passed trial, described in a few words, if that can be."""
    if (file := path()) is None:
        return
    trials = [*read(file).items(), (trial, said)][-MOST:]
    text = json.dumps({"machine": machine(), "passed": dict(trials)}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            part.write_text(text, encoding="utf-8")
    except OSError:  # a full or read-only disk: the next process tries again
        pass


def forget() -> None:
    """Delete the file of this machine, if that can be."""
    try:
        if (file := path()) is not None:
            file.unlink(missing_ok=True)
    except OSError:
        pass


def read(file: Path) -> dict[str, str]:
    """The trials of a file; none if it cannot be read or is damaged."""
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
        parts = [{**found["passed"]}, {**found["machine"]}]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    whole = all(isinstance(x, str) for part in parts for x in part.values())
    return parts[0] if whole else {}


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
