"""``mlx_kvq convert``: convert a model, add a calibrated cache."""

import argparse
from importlib import import_module

from ..calibration.fit import sample_text
from ..files import read_text
from ..measure.evaluate import read_recall
from ..repositories.convert import HELD_OUT, SAMPLE, convert
from .options import cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stock = import_module("mlx_lm.convert").configure_parser()
    for action in stock._actions:
        if not isinstance(action, argparse._HelpAction):
            parser._add_action(action)
    parser.description = (
        "Convert a model as mlx_lm.convert does and add a packed, calibrated KV cache. Without "
        "--hf-path the cache is added in place to the repository --mlx-path."
    )
    own = parser.add_argument_group("KV cache")
    own.add_argument(
        "--kv-cache",
        type=cache(),
        default="int4-srft",
        metavar="SPEC",
        help="Default: %(default)s.",
    )
    own.add_argument(
        "--calibration-text",
        nargs="+",
        metavar="FILE",
        help="Text of what the model is to read. Default: the built-in sample text.",
    )
    own.add_argument(
        "--evaluate",
        nargs="*",
        metavar="FILE",
        help="Write to the model card what the cache costs in perplexity and KL on held-out "
        "text. Without a file: on the built-in sample text.",
    )
    own.add_argument(
        "--private", action="store_true", help="Make the repository of --upload-repo private."
    )
    own.add_argument("--recall", metavar="FILE", help="Key-recall prompts, too: JSON lines.")
    own.add_argument("--recall-prompts", type=int, metavar="N", help="Only the first N.")


def run(args: argparse.Namespace) -> None:
    options = dict(vars(args))
    del options["command"]
    names, recall = options.pop("evaluate"), options.pop("recall")
    limit = options.pop("recall_prompts")
    texts = options.pop("calibration_text")
    evaluate_on = None
    if names is not None:
        # A card does not publish the names of files.
        count = len(names)
        labels = [HELD_OUT] if count == 1 else [f"{HELD_OUT} {i + 1}" for i in range(count)]
        evaluate_on = dict(zip(labels, map(read_text, names), strict=True)) or {
            SAMPLE: sample_text()
        }
    convert(
        **options,
        calibration_text=None if texts is None else [read_text(n) for n in texts],
        evaluate_on=evaluate_on,
        recall=read_recall(recall, limit) if recall else (),
    )
