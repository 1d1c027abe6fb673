"""``mlx_kvq pack-cache``: a prompt-cache file of mlx_lm.cache_prompt, packed."""

import argparse
import os
import sys
from typing import Any

from ..caches import prompt_file, seams
from ..caches.prompt_file import tokenizer_options
from ..files import line, replacing
from ..format.spec import Spec
from ..model import pack
from ..model.loading import load
from .options import cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a file from mlx_lm.cache_prompt without --kv-cache")
    parser.add_argument("target", help="the packed file to write")
    parser.add_argument(
        "--kv-cache", type=cache(), default="int4-srft", metavar="SPEC", help="%(default)s"
    )
    parser.add_argument("--model", help="where the model is now, if not where the file says")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that the model's repository brings along, for model and tokenizer",
    )


def run(args: argparse.Namespace) -> None:
    from mlx_lm.models import cache as stock

    spec = Spec.parse(args.kv_cache)
    if spec is None:
        raise ValueError("'fp16' is what the file is already.")
    seams.install()
    try:
        caches, metadata = stock.load_prompt_cache(args.source, return_metadata=True)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    prompt_file.check_unpacked(caches)
    named = _model(args.source, metadata)
    if named is not None:
        print(f"[mlx_kvq] '{args.source}' names the model '{named}'", file=sys.stderr, flush=True)
    if (path := args.model or named) is None:
        raise ValueError(f"'{args.source}' does not say of which model it is: give --model.")
    target = args.target if args.target.endswith(".safetensors") else f"{args.target}.safetensors"
    try:
        with replacing(target) as part:  # which is found out before the model is loaded
            model, tokenizer = load(path, trust=args.trust_remote_code)
            packed = pack.pack(caches, model, spec, tokenizer=tokenizer)
            stock.save_prompt_cache(str(part), packed, metadata)
    except OSError as error:
        raise ValueError(f"'{target}' cannot be written: {error.strerror or error}.") from error
    before, after = os.path.getsize(args.source), os.path.getsize(target)
    print(f"{target}: {after} bytes, {before / after:.2f} times smaller")


def _model(source: str, metadata: Any) -> str | None:
    """The model that a file names."""
    try:
        tokenizer_options(metadata)  # mlx-lm will read it from the packed file
        named = metadata.get("model")
        if named is not None and not (isinstance(named, str) and named and named.isprintable()):
            raise ValueError(f"it names the model {line(repr(named))}, which is no name")
    except ValueError as error:
        raise ValueError(f"The prompt cache '{source}' cannot be used: {error}.") from None
    return named
