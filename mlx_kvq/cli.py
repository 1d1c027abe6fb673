"""The command ``mlx_kvq``."""

import argparse

from . import __version__, spec


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="mlx_kvq",
        description="A rotated int4 key/value cache for mlx-lm. Use it as "
        "'mlx_lm.generate --kv-cache int4-srft'.",
        epilog=f"Caches: {', '.join(spec.names())}.",
    )
    parser.add_argument("--version", action="version", version=f"mlx_kvq {__version__}")
    parser.parse_args(argv)
    parser.print_help()
