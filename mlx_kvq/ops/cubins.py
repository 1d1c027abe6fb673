"""Compiled CUDA kernels, kept on disk so that the next process need not compile them.

One file for each kernel, GPU, driver, compiler, version of MLX and of this package: a line of JSON,
then the cubin. It is used only if its hash is right. A file that cannot be read or written is as
good as none. MLX is handed a copy: before it compiles a custom kernel it looks for a file of the
kernel's name in its own folder (``MLX_PTX_CACHE_DIR``), to which it writes none of them itself.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..files import kept_folder, parse_json, prune, replacing

PATTERN = "kernel-*.cubin"  # one of files.KEPT
MOST = 64 << 20  # bytes, here and in MLX's folder: a kernel has 40 to 150 KB, a model five
OURS = "custom_kernel_kvq_"  # MLX's word before our names


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel, and the name of its function there."""

    symbol: str
    image: bytes


@dataclass
class Record:
    """What this process did: kernels read, kernels compiled by NVRTC, seconds of that, and why MLX
    compiled one itself, if it did."""

    read: int = 0
    compiled: int = 0
    seconds: float = 0.0
    failure: str = ""

    def __str__(self) -> str:
        if not asked():
            return "all compiled by MLX"
        said = f"{self.read} read from disk, {self.compiled} compiled in {self.seconds:.1f} s"
        return f"{said}; some by MLX: {self.failure}" if self.failure else said


record = Record()


def asked() -> bool:
    """Whether ``MLX_KVQ_COMPILED`` leaves this on, and the system is Linux: names in MLX's folder
    have a hash that is the C++ library's.

    Raises:
        ValueError: If it is neither 0 nor 1.
    """
    given = os.environ.get("MLX_KVQ_COMPILED", "")
    if given not in ("", "0", "1"):
        raise ValueError(f"MLX_KVQ_COMPILED is 0, 1 or unset, got {given!r}.")
    return given != "0" and sys.platform == "linux"


# ---- what is kept -----------------------------------------------------------------------------
def path(parts: Iterable[str]) -> Path | None:
    """The file of a kernel; ``parts`` are all that it depends on. None if there is no home."""
    try:
        folder = kept_folder()
    except RuntimeError:
        return None
    return folder / f"kernel-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:24]}.cubin"


def read(file: Path | None, used: bool = True) -> tuple[Cubin, str] | None:
    """A kept kernel and a few words about it; None if it cannot be read or is damaged. It counts as
    used now unless told otherwise."""
    try:
        if file is None:
            return None
        line, _, image = file.read_bytes().partition(b"\n")
        said = parse_json(line)
        cubin = Cubin(said["symbol"], image)
        if said["sha256"] != _digest(cubin) or not isinstance(said["what"], str):
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if used:
        _used(file)
    return cubin, said["what"]


def keep(file: Path | None, cubin: Cubin, what: str) -> None:
    """Write the file, if that can be; those unused for longest go beyond ``MOST`` bytes."""
    if file is None:
        return
    said = {"what": what, "symbol": cubin.symbol, "sha256": _digest(cubin)}
    # A full or read-only disk, or another process that deletes: it is compiled again.
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            part.write_bytes(json.dumps(said).encode() + b"\n" + cubin.image)
        prune(file.parent, MOST, (PATTERN,))


def _used(file: Path) -> None:
    """Those unused for longest are deleted first."""
    with suppress(OSError):
        os.utime(file)


def _digest(cubin: Cubin) -> str:
    return hashlib.sha256(cubin.symbol.encode() + b"\n" + cubin.image).hexdigest()


# ---- what MLX is handed -----------------------------------------------------------------------
def mlx_folder() -> Path:
    """Where MLX looks for compiled kernels: ``MLX_PTX_CACHE_DIR``, else in the folder of temporary
    files, by the names that the C++ library asks for."""
    if own := os.environ.get("MLX_PTX_CACHE_DIR"):
        return Path(own)
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
    temporary = next((os.environ[n] for n in names if n in os.environ), "/tmp")
    return Path(temporary) / "mlx" / mx.__version__ / "ptx"  # type: ignore[attr-defined]


def hand_over(folder: Path, module: str, kernel: str, cubin: Cubin) -> None:
    """Put the kernel where MLX looks for ``module``, unless exactly that is there.

    Raises:
        OSError: If it cannot be written.
    """
    names = f"{kernel}\t{cubin.symbol}\n".encode()
    # The names first: MLX looks for the code, and then needs them.
    for suffix, content in ((".txt", names), (".ptx", cubin.image)):
        file = folder / f"{module}{suffix}"
        if file.is_file() and file.read_bytes() == content:
            _used(file)
            continue
        with replacing(file) as part:
            part.write_bytes(content)
    withdraw(MOST)


def withdraw(most: int = 0) -> int:
    """Delete what MLX was handed, what was unused for longest first, until the others take
    ``most`` bytes; how many kernels went."""
    total = gone = 0
    for _, size, file in sorted(_handed(), reverse=True):
        total += size
        if total <= most:
            continue
        with suppress(OSError):  # another user's
            file.unlink(missing_ok=True)
            file.with_suffix(".txt").unlink(missing_ok=True)  # after the code, which needs it
            gone += 1
    return gone


def _handed() -> Iterator[tuple[float, int, Path]]:
    """When it was last used, its size in bytes, and the file, of all that MLX was handed."""
    for file in mlx_folder().glob(f"{OURS}*.ptx"):
        try:
            info = file.stat()
        except OSError:
            continue
        yield info.st_mtime, info.st_size, file
