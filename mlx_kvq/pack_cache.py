"""``mlx_kvq pack-cache``: a prompt-cache file of mlx_lm.cache_prompt, packed."""

import argparse
import json
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a file from mlx_lm.cache_prompt without --kv-cache")
    parser.add_argument("target", help="the packed file to write")
    parser.add_argument("--kv-cache", default="int4-srft", metavar="SPEC", help="%(default)s")
    parser.add_argument("--model", help="where the model is now, if not where the file says")


def run(args: argparse.Namespace) -> None:
    from mlx_lm import load
    from mlx_lm.models import cache as stock

    from . import seams
    from .prompt_cache import pack_file
    from .spec import Spec

    if Spec.parse(args.kv_cache) is None:
        raise ValueError("'fp16' is what the file is already.")
    seams.install()
    _, metadata = stock.load_prompt_cache(args.source, return_metadata=True)
    path = args.model or metadata.get("model")
    if path is None:
        raise ValueError(f"'{args.source}' does not say of which model it is: give --model.")
    options = json.loads(metadata.get("tokenizer_config", "{}"))
    loaded = load(path, tokenizer_config=options)
    pack_file(args.source, args.target, loaded[0], args.kv_cache, tokenizer=loaded[1])
    before, after = os.path.getsize(args.source), os.path.getsize(args.target)
    print(f"{args.target}: {after} bytes, {before / after:.2f} times smaller")
