"""The option ``--kv-cache``: a module ``argparse`` whose parsers know it, and what it was given."""

import argparse
import os
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..commands.options import cache, length, size
from ..format.spec import OFF
from ..stock_names import missing
from .lines import say

HELP = (
    "Keep keys and values packed: 'int4' (short for 'int4-srft', 4.25 bits per value), 'k5v4' "
    "(4.75), 'int5', 'k8v4', 'int8', 'k4v3' (3.9), 'int3' (3.5); 'fp16' is the model's own "
    "cache. Options follow a colon, as in 'int4:recent=64,skip=first': recent (newest tokens read "
    "exactly, default 64), first (first tokens likewise, 4), group_size (channels that share a "
    "scale, default 64, of 3 bits 32), skip (layers left alone: numbers, first, last, joined by "
    "+), high (layers in 8 bits, likewise), budget (bits per value to spend on the layers that "
    "need them: int3:budget=3.5), calibrate=off, rounding=nearest|feedback, "
    "scale=search|absmax|paper, seed. Numbers of tokens may be written as 32K. From mlx_kvq."
)


@dataclass
class Wanted:
    """What this process was asked for."""

    spec: str | None = None  # --kv-cache; "fp16" where --kv-bits is given
    option: str = ""  # as it was written
    folder: str | None = None  # --prompt-cache-dir of the server
    folder_bytes: int = 8 << 30  # and its bound
    lacking: str = ""  # what the module that loads models lacks: [program:]module.name


wanted = Wanted()


def asked() -> str | None:
    """``--kv-cache`` of this process, or else ``MLX_KVQ_SPEC``, for programs without the option."""
    return wanted.spec if wanted.spec is not None else os.environ.get("MLX_KVQ_SPEC") or None


def typed() -> bool:
    """Whether the option is on the command line, parsed or not."""
    return any(word.partition("=")[0] == "--kv-cache" for word in sys.argv)


class Parser(argparse.ArgumentParser):
    """Adds the option last, below the command's own."""

    lacking = ""  # what the command's module lacks
    is_server = False
    _ours: argparse.Action | None = None

    def _add_kv_cache(self) -> None:
        self.register("type", int, length)
        if "--kv-cache" not in self._option_string_actions:
            self._ours = self.add_argument(
                "--kv-cache", dest="mlx_kvq_cache", type=cache(), metavar="SPEC", help=HELP
            )
            if self.is_server:
                self._add_folder()

    def _add_folder(self) -> None:
        self.add_argument(
            "--prompt-cache-dir",
            dest="mlx_kvq_folder",
            metavar="DIR",
            help="Keep the caches of prompts of 512 tokens and more in files of this folder, also "
            "beyond this process. From mlx_kvq.",
        )
        self.add_argument(
            "--prompt-cache-dir-bytes",
            dest="mlx_kvq_folder_bytes",
            type=size,
            default=Wanted.folder_bytes,
            metavar="SIZE",
            help="Bytes of these files, such as 20GB (default: 8GB); the least recently used go.",
        )

    def format_help(self) -> str:
        self._add_kv_cache()
        return super().format_help()

    def parse_known_args(self, args=None, namespace=None):
        self._add_kv_cache()
        parsed, rest = super().parse_known_args(args, namespace)
        wanted.folder = getattr(parsed, "mlx_kvq_folder", None)
        wanted.folder_bytes = getattr(parsed, "mlx_kvq_folder_bytes", Wanted.folder_bytes)
        if self._ours is None:
            say(
                f"warning: {self.prog} has an option --kv-cache that is not mlx_kvq's; "
                "mlx_kvq.enable(model, …) packs a cache from Python"
            )
        spec = None if self._ours is None else parsed.mlx_kvq_cache
        bits = getattr(parsed, "kv_bits", None)
        if spec is not None and bits is not None:
            self.error("--kv-cache and --kv-bits are two ways to quantize the cache: give one")
        if spec is not None and spec.strip() != OFF:
            self._check(getattr(parsed, "max_kv_size", None))
        wanted.spec, wanted.option = spec, f"--kv-cache {spec}"
        if bits is not None:  # quantizes the model's own cache
            wanted.spec, wanted.option = OFF, f"--kv-bits {bits}"
        return parsed, rest

    def _check(self, max_kv_size: object) -> None:
        """End the command where it cannot do what is asked."""
        if isinstance(max_kv_size, int) and max_kv_size < 1:
            self.error(f"--max-kv-size is at least 1, got {max_kv_size}")
        try:
            for name in filter(None, (self.lacking, wanted.lacking)):
                program, _, rest = name.rpartition(":")
                raise missing(rest, program or "mlx_lm")
            from .. import stock_names

            stock_names.check()
            from ..caches.seams import install

            install()
        except ValueError as error:
            self.exit(1, f"[mlx_kvq] error: {error}\n")


class Argparse(ModuleType):
    """The module ``argparse`` with our parser in it; ``lacking`` is a name that the command's
    module lacks."""

    def __init__(self, lacking: str = "", is_server: bool = False):
        super().__init__("argparse")
        own = {"lacking": lacking, "is_server": is_server}
        self.ArgumentParser = type("ArgumentParser", (Parser,), own)

    def __getattr__(self, name: str) -> Any:
        return getattr(argparse, name)
