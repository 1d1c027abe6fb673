"""``mlx_kvq evaluate``: compare caches on a text."""

import argparse
from pathlib import Path

import mlx.core as mx

from ..caches.attention import DECODE_QUERIES
from ..calibration.set import CalibrationSet
from ..files import read_text
from ..format.spec import Spec
from ..measure import plots
from ..measure.baselines import KV_BITS, OTHERS
from ..measure.evaluate import evaluate, load_model, read_recall
from ..measure.rivals import Rival
from .options import cache

DEFAULT = (
    "fp16", "kv8", "kv4", "int8-srft", "k8v4-srft", "int5-srft", "k5v4-srft", "int4-srft",
    "k4v3-srft", "int3-srft",
)  # fmt: skip
PROMPT_CHUNK = 512
DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Local model directory or repository.")
    parser.add_argument(
        "--kv-cache",
        nargs="+",
        type=_cache,
        default=list(DEFAULT),
        metavar="SPEC",
        help="Caches to compare with the model's own: spec strings, fp16, kv4 and kv8 for "
        "mlx-lm's --kv-bits, and kivi and kvarn, which round as these schemes do but store plain "
        "arrays (fake-quantized; options bits, block, residual, first: kivi:first=4). "
        f"Default: {' '.join(DEFAULT)}.",
    )
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="Held-out text.")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="From 'mlx_kvq calibrate'; without it specs are calibrated on a built-in text.",
    )
    parser.add_argument("--recall", metavar="FILE", help="Key-recall prompts, JSON lines.")
    parser.add_argument("--recall-prompts", type=int, metavar="N", help="Only the first N.")
    parser.add_argument("--windows", type=int, default=16, help="Windows per text. Default: 16.")
    parser.add_argument("--tokens", type=int, default=1024, help="Per window. Default: 1024.")
    parser.add_argument(
        "--chunk",
        type=int,
        help=f"Tokens at a time. Default: {DECODE_QUERIES}, read as in decoding; more are read as "
        f"a prompt. With --decode {PROMPT_CHUNK}.",
    )
    parser.add_argument(
        "--decode",
        type=int,
        default=0,
        metavar="N",
        help="As in generation: all of a window but N tokens is a prompt, which is not scored, "
        "then N tokens are fed one at a time.",
    )
    parser.add_argument("--batch", type=int, default=1, help="Windows side by side. Default: 1.")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="Compute in this dtype; float32 takes the model's own rounding out. Default: the "
        "model's own, or float32 on a CPU, which only emulates half precision.",
    )
    parser.add_argument("--json", metavar="FILE", help="Write every figure there.")
    parser.add_argument("--plot", metavar="FILE", help="Draw quality against bytes (.png, .svg).")
    parser.add_argument("--markdown", action="store_true", help="Print a Markdown table.")


def _cache(text: str) -> str:
    try:
        rival = Rival.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return str(rival) if rival else cache(*OTHERS)(text)


def run(args: argparse.Namespace) -> None:
    # Whatever can be wrong is found before the minutes of work.
    texts = [read_text(path) for path in args.text]
    recall = read_recall(args.recall, args.recall_prompts) if args.recall else []
    calibration = _calibration(args.calibration)
    for path in (args.json, args.plot):
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no such directory to write to.")
    if args.plot:
        plots.check(args.plot)
    model, tokenizer = load_model(args.model)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if kind := args.dtype or ("float32" if on_cpu else None):
        model.set_dtype(getattr(mx, kind))
    evaluation = evaluate(
        model,
        tokenizer,
        args.kv_cache,
        texts,
        windows=args.windows,
        tokens=args.tokens,
        chunk=args.chunk or (PROMPT_CHUNK if args.decode else DECODE_QUERIES),
        decode=args.decode,
        batch=args.batch,
        recall=recall,
        calibration=calibration,
    )
    evaluation.setting.update(model=Path(args.model).name, texts=[Path(t).name for t in args.text])
    print(evaluation.table(args.markdown))
    if any(_keeps_tokens(name) for name in args.kv_cache):
        print(
            f"\nbytes/token contain what is kept exactly, shared out over {args.tokens} tokens: "
            "the longer the context, the fewer."
        )
    if args.json:
        evaluation.save(args.json)
    if args.plot:
        plots.draw_quality(evaluation, args.plot)


def _calibration(path: str | None) -> CalibrationSet | None:
    try:
        return CalibrationSet.load(path) if path else None
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None


def _keeps_tokens(name: str) -> bool:
    """Whether a cache keeps some tokens exactly beside the others."""
    if Rival.parse(name):
        return True
    spec = None if name in KV_BITS else Spec.parse(name)
    return spec is not None and spec.exact != ""
