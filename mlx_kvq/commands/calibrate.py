"""``mlx_kvq calibrate``: a calibration file for a model, from text."""

import argparse
import sys

from ..caches import seams
from ..calibration.fit import LENGTH, TOKENS, calibrate
from ..model.loading import load
from .options import cache, length


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Local model directory or repository.")
    parser.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="A UTF-8 text file of what the model is to read; repeatable. Without one: the "
        "built-in sample text.",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="The calibration, a .safetensors file."
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help="At most (default %(default)s).")
    parser.add_argument(
        "--length", type=int, default=LENGTH, help="Tokens in a window (default %(default)s)."
    )
    parser.add_argument(
        "--positions",
        type=length,
        metavar="TOKENS",
        help="The longest context that is read later, such as 8K (default: as many as the model "
        "takes, but 8K to 32K); shorter ones count as well.",
    )
    parser.add_argument(
        "--lambda",
        dest="spec",
        type=cache(),
        metavar="SPEC",
        help="Also λ of the keys, for this cache's rotation and seed and no other's: about 2 %% "
        "less KL.",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Let the model's repository run its own code.",
    )


def run(args: argparse.Namespace) -> None:
    if not args.output.endswith(".safetensors"):
        raise ValueError(f"--output is a .safetensors file, got '{args.output}'.")
    texts = None
    if args.text is not None:
        # No character is more than some tokens: what cannot be used is not read.
        texts = [_read(name, 32 * args.tokens) for name in args.text]
    model, tokenizer = load(args.model, trust=args.trust_remote_code)
    seams.install()  # without it mlx-lm refuses models with attention sinks
    found = calibrate(
        model,
        tokenizer,
        texts,
        tokens=args.tokens,
        length=args.length,
        positions=args.positions,
        spec=args.spec,
    )
    found.save(args.output)
    print(
        f"{args.output}: {len(found.layers)} layers from {found.metadata['tokens']} tokens, for "
        f"contexts of up to {found.metadata['positions']}",
        file=sys.stderr,
    )


def _read(name: str, characters: int) -> str:
    try:
        with open(name, encoding="utf-8") as file:
            return file.read(characters)
    except UnicodeDecodeError:
        raise ValueError(f"'{name}' is not UTF-8 text.") from None
    except OSError as error:
        raise ValueError(f"'{name}' cannot be read: {error.strerror}.") from None
