"""The command ``mlx_kvq``: one module of the package for each of its commands."""

import argparse
import sys
from importlib import import_module
from typing import Any

from . import __version__, stock_names
from .commands.options import NAMES, length

# name -> what --help says. Module commands.<name>, with _ for -, has `add_arguments(parser)` and
# `run(args)`, which returns the exit status or None; a ValueError or OSError from it becomes one
# line and status 1, Ctrl-C one line and status 130.
COMMANDS: dict[str, str] = {
    "benchmark": "Time packed caches beside the model's own and mlx-lm's quantized ones.",
    "cache": "List or delete what was kept: automatic calibrations and passed trials of kernels.",
    "calibrate": "Make a calibration file for a model from text.",
    "convert": "Convert a model repository and add a calibrated KV cache, or add it in place.",
    "doctor": "Check every kernel on this machine against the reference; first timings.",
    "evaluate": "Compare caches on your text: perplexity, KL, exact recall, bytes per token.",
    "fit": "Say how much context fits into a machine's memory, from a config.json alone.",
    "inspect": "Say what a converted repository, local or on the hub, brings along.",
    "pack-cache": "Pack a prompt-cache file that was written without --kv-cache.",
}
# A command's module, where it is not named like the command: inspect is the standard library's.
MODULES = {"inspect": "inspection"}


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    command = next((f" {word}" for word in arguments if word in COMMANDS), "")
    try:
        sys.exit(_run(arguments))
    except OSError as error:
        where = f"'{error.filename}': " if error.filename is not None else ""
        reason = f"{where}{error.strerror or error}"
    except ValueError as error:
        reason = str(error)
    except ImportError as error:
        if not (error.name or "").startswith("mlx_lm"):
            raise
        from mlx_lm import __version__ as version

        reason = f"mlx_lm {version} is not supported: {error}"
    except KeyboardInterrupt:
        print(f"mlx_kvq{command}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(f"mlx_kvq{command}: error: {reason}")


def _run(arguments: list[str]) -> Any:
    parser = argparse.ArgumentParser(
        prog="mlx_kvq",
        description="A rotated int4 key/value cache for mlx-lm. Use it as "
        "'mlx_lm.generate --kv-cache int4'.",
        epilog=f"Caches:\n{NAMES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mlx_kvq {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=bool(COMMANDS))
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        sub.register("type", int, length)
        if name in arguments:  # the others need not be imported
            if name != "doctor":
                stock_names.check()
            _module(name).add_arguments(sub)
    args = parser.parse_args(arguments)
    if args.command is None:
        return parser.print_help()
    return _module(args.command).run(args)


def _module(command: str) -> Any:
    return import_module(
        f"{__package__}.commands.{MODULES.get(command, command.replace('-', '_'))}"
    )
