"""What a command says on stderr, and how it ends."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def say(line: str) -> None:
    print(f"[mlx_kvq] {line}", file=sys.stderr, flush=True)


def quiet() -> bool:
    return os.environ.get("MLX_KVQ_QUIET", "") not in ("", "0")


class PackingError(ValueError):
    """The model cannot have the cache that was asked for."""


@contextmanager
def one_line(is_server: bool) -> Iterator[None]:
    """End the command with one line where what was asked for cannot be had; a server answers the
    request with it and goes on."""
    try:
        yield
    except ValueError as error:
        if is_server:
            raise PackingError(str(error)) from error
        sys.exit(f"[mlx_kvq] error: {error}")
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
