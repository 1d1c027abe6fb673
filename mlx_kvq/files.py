"""Files: written whole or not at all, opened only if they are files, and quoted in one way.

The content of a file is data. Before use a safetensors header is checked as a whole (sizes,
offsets, nesting), JSON is bounded in depth, and text is escaped in messages.
"""

import errno
import json
import os
import reprlib
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

TEXT = 200  # characters of a note, at most
LARGEST_FOLDER = 1 << 29  # bytes of what is kept; what was not used for longest is deleted
# Automatic calibrations; kernels that passed their trial; compiled kernels.
KEPT = ("*.safetensors", "trials-*.json", "kernel-*.cubin")
NESTING = 64  # levels of JSON; config.json of real models has fewer than ten
_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
}  # fmt: skip


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path of the same name, in a folder of its own, to write to. It replaces ``path`` when the
    block ends, and not if it raises."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        part = Path(folder) / path.name
        yield part
        os.replace(part, path)


def kept_folder() -> Path:
    """Where automatic calibrations, passed trials and compiled kernels are kept:
    ``MLX_KVQ_CACHE``, else ``$XDG_CACHE_HOME/mlx_kvq``, else ``~/.cache/mlx_kvq``. Raises
    RuntimeError if there is no home folder."""
    if own := os.environ.get("MLX_KVQ_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mlx_kvq"


def kept_files(folder: Path, patterns: Sequence[str] = KEPT) -> list[Path]:
    """The files of the folder that were kept there automatically."""
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def prune(folder: Path, most: int, patterns: Sequence[str] = KEPT) -> list[Path]:
    """Delete kept files of these names, those unused for longest first, until the others take
    ``most`` bytes.

    Raises:
        OSError: If one cannot be deleted.
    """
    files = sorted(kept_files(folder, patterns), key=lambda p: p.stat().st_mtime, reverse=True)
    deleted, total = [], 0
    for path in files:
        total += path.stat().st_size
        if total > most:
            path.unlink()
            deleted.append(path)
    return deleted


def regular(path: str | os.PathLike) -> os.stat_result:
    """``os.stat`` of a regular file, or of a link to one. Raises OSError if there is none, and
    ValueError if it is something else: a pipe or a device may block, or never end."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        kind = _KINDS.get(stat.S_IFMT(info.st_mode), "no file")
        raise ValueError(f"'{os.fspath(path)}' is {kind}, not a file.")
    return info


def safetensors_header(path: str | os.PathLike) -> tuple[dict[str, str], list[str]]:
    """Metadata and names of the tensors of a safetensors file, after a check that every shape,
    dtype and offset in the header fits the file's size. Raises OSError if it cannot be opened, and
    ValueError if it is no file, or no complete safetensors file."""
    regular(path)
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            return file.metadata() or {}, list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"it is no complete safetensors file: {line(error)}.") from None


def size(path: Path) -> str:
    """Size of a file, for people."""
    n = path.stat().st_size
    return f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n / 1e3:.1f} KB"


def parse_json(text: str | bytes) -> Any:
    """The content of JSON text. Raises ValueError if it is not JSON, or nested deeper than
    ``NESTING``."""
    try:
        found = json.loads(text)
    except RecursionError:
        found = None
    except ValueError as error:
        raise ValueError(f"is not JSON: {line(error)}") from None
    else:
        if not nested(found):
            return found
    raise ValueError(f"is nested more than {NESTING} levels deep")


def nested(given: object) -> bool:
    """Whether lists and dicts lie in each other more than ``NESTING`` deep."""
    level: list[Any] = [given]
    for _ in range(NESTING + 1):
        level = [outer for outer in level if isinstance(outer, dict | list)]
        if not level:
            return False
        members = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        level = [inner for part in members for inner in part]
    return True


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = 8
        self.maxstring = self.maxother = self.maxlong = 60


def quoted(given: object) -> str:
    """A value out of a file for a message: ASCII, at most 60 characters, of any size or depth."""
    text = _Repr().repr(given).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def line(said: object) -> str:
    """An error or other text as one printable line of at most 403 characters."""
    text = str(said)
    if isinstance(said, LookupError) or not text.strip():  # KeyError's text is the key alone
        text = f"{type(said).__name__}: {text}"
    text = " ".join(text.split())
    text = text if len(text) <= 2 * TEXT else f"{text[: 2 * TEXT]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def failure(error: BaseException, most: int = 2 * TEXT) -> str:
    """An error and its type as one printable line."""
    return line(f"{type(error).__name__}: {error}")[:most]


def printable(given: object) -> bool:
    """Whether this is a short text without control characters."""
    return isinstance(given, str) and given.isprintable() and len(given) <= TEXT


def read_text(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{path} cannot be read: {reason}.") from None
