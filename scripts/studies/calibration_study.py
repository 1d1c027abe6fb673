"""What calibration is worth: KL of caches on models as they are and with key outliers.

Every window is fed in chunks, so that each chunk but the first, which is not scored, attends to
what the cache remembers; all windows of a text are one batch. Figures are added to ``--json``
text by text and model by model, calibrations are kept beside it, and what is there already is not
made again:

    python scripts/studies/calibration_study.py --model tiny-qwen2 --model tiny-llama \\
        --calibration-text novels.txt --text heldout.txt --text wiki.txt --json study.json
    python scripts/studies/calibration_study.py --json study.json --report  # tables, in Markdown

``kv4`` and ``kv8`` are mlx-lm's affine quantization on every layer, groups of 64, rounded when
written and kept unpacked: mlx-lm itself has no such cache for sliding layers.
"""

import argparse
import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

import mlx.core as mx
from mlx_lm import load
from outliers import make_outlier
from texts import windows_of
from tqdm import tqdm

import mlx_kvq
from mlx_kvq.calibration.set import CalibrationSet
from mlx_kvq.files import replacing
from mlx_kvq.measure.baselines import KV_BITS, KV_GROUP, candidate, own
from mlx_kvq.measure.quality import Estimate, measure, summarize

OURS = {
    "paper": "int4-srft:group_size={g},scale=paper,calibrate=off,recent=0",
    "off": "int4-srft:group_size={g},calibrate=off,recent=0",
    "int4": "int4-srft:group_size={g},recent=0",
    "k8v4": "k8v4-srft:group_size={g},recent=0",
    "int8": "int8-srft:group_size={g},recent=0",
}
TITLES = {
    "paper": "int4, paper's rule",
    "off": "int4, `calibrate=off`",
    "int4": "**int4**",
    "k8v4": "k8v4",
    "int8": "int8",
    "kv4": "mlx-lm kv4",
    "kv8": "mlx-lm kv8",
}


def affine(model, bits, dtype=mx.float16):
    """Makes the model's own caches, each of which rounds what it is given as mlx-lm would in a
    model of this dtype, in which scales and biases are kept."""

    def rounded(x):
        parts = mx.quantize(x.astype(dtype), KV_GROUP, bits)
        return mx.dequantize(*parts, KV_GROUP, bits).astype(x.dtype)

    def make():
        caches = own(model).make()
        for cache in caches:
            update = cache.update_and_fetch
            cache.update_and_fetch = lambda k, v, update=update: update(rounded(k), rounded(v))
        return caches

    return make


def makers_of(model, names, calibration):
    """Name -> makes caches, the baseline first."""
    makers = {"own": own(model).make}
    for name in names:
        cache, group = name.split(" ")
        if cache in KV_BITS:
            makers[name] = affine(model, KV_BITS[cache])
        else:
            spec = OURS[cache].format(g=group)
            makers[name] = candidate(model, spec, calibration=calibration).make
    return makers


def block(model, tokenizer, calibration, text, names, args):
    """Name -> the figures of this cache on one text."""
    windows = windows_of(tokenizer, text, args.windows, args.tokens)
    makers = makers_of(model, names, calibration)
    steps = len(makers) * -(-args.tokens // args.chunk)
    with tqdm(total=steps, desc="chunks", leave=False) as bar:
        scores = measure(model, makers, windows, args.chunk, bar.update, batch=args.windows)
    return {name: asdict(summarize(name, scores[name], scores["own"], 0)) for name in makers}


def save(found, path):
    with replacing(path) as part:
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")


def calibrated(model, tokenizer, key, args):
    """The calibration of this model and outlier, kept beside the figures."""
    _, model_name, outlier = key.split(" ")
    stem = Path(args.json).with_suffix("")
    path = Path(f"{stem}-{model_name}-{outlier}.safetensors")
    if not path.exists():
        given = args.calibration_text and Path(args.calibration_text).read_text("utf-8")
        options = {"tokens": args.calibration_tokens, "length": args.calibration_length}
        mlx_kvq.calibrate(model, tokenizer, given or None, **options).save(path)
    return CalibrationSet.load(path)


def run(args, found):
    wanted = []
    for text, outlier, name in product(args.text, args.outliers, args.model):
        key = f"{Path(text).name} {Path(name).name} {outlier}"
        names = [f"{c} {g}" for g in args.group_size for c in args.caches if c in OURS]
        names += [f"{c} {KV_GROUP}" for c in args.caches if c in KV_BITS]
        if missing := [n for n in names if n not in found.get(key, {})]:
            wanted.append((key, text, name, outlier, missing))
    models = {}
    for key, text, name, outlier, missing in tqdm(wanted, desc="blocks"):
        if (name, outlier) not in models:
            model, tokenizer = load(name)[:2]
            model.set_dtype(mx.float32)
            make_outlier(model, outlier)
            models[name, outlier] = model, tokenizer, calibrated(model, tokenizer, key, args)
        figures = block(*models[name, outlier], text, missing, args)
        found.setdefault(key, {}).update(figures)
        save(found, args.json)
        for cache in missing:
            f = figures[cache]
            tqdm.write(f"{key} {cache:8} {f['kl']['mean']:.4f} {f['change']['mean']:+.2%}")


def report(found):
    """Markdown: for every text and group the KL of all caches, then more about int4."""
    cells: dict = {}  # (text, group) -> column -> name -> figures
    for key, figures in found.items():
        text, model, outlier = key.split(" ")
        column = model.removeprefix("tiny-") + ("" if outlier == "none" else f", {outlier}")
        for full, f in figures.items():
            if full == "own":
                continue
            name, group = full.split(" ")
            cells.setdefault((text, group), {}).setdefault(column, {})[name] = f
    for (text, _), columns in cells.items():
        for column, caches in columns.items():  # mlx-lm's caches beside every group size
            beside = cells.get((text, str(KV_GROUP)), {}).get(column, {})
            caches |= {name: beside[name] for name in KV_BITS if name in beside}
    for (text, group), columns in cells.items():
        print(f"\n### {text}, groups of {group}\n")
        columns = {c: columns[c] for c in sorted(columns, key=lambda c: c.split(",")[0])}

        def row(title, show, columns=columns):
            print(f"| {title} |", " | ".join(show(c) for c in columns.values()), "|")

        def ratio(c, name):
            return f"{kl_of(c, 'int4') / kl_of(c, name):.2f}" if name in c else "–"

        print("| KL |", " | ".join(columns), "|")
        print("|---|" + "--:|" * len(columns))
        for name, title in TITLES.items():
            if any(name in c for c in columns.values()):
                row(title, lambda c, name=name: kl(kl_of(c, name)) if name in c else "–")
        if any("paper" in c for c in columns.values()):
            row("int4 / paper's rule", lambda c: ratio(c, "paper"))
        if any("kv4" in c for c in columns.values()):
            row("int4 / kv4", lambda c: ratio(c, "kv4"))
        row("int4: 99th percentile", lambda c: f"{c['int4']['kl_p99']:.3f}")
        row("int4: top-1", lambda c: f"{c['int4']['top1']:.1%}")
        row("int4: perplexity", lambda c: change(Estimate(**c["int4"]["change"])))


def kl_of(column, name):
    return column[name]["kl"]["mean"]


def kl(value):
    return f"{value:.2g}" if value < 0.001 else f"{value:.4f}"


def change(e):
    return f"{100 * e.mean:+.1f} ± {50 * (e.high - e.low):.1f} %"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", help="Local model directory, not quantized.")
    parser.add_argument("--text", action="append", help="A text file; repeatable.")
    parser.add_argument("--calibration-text", help="Without one: the built-in sample text.")
    parser.add_argument("--calibration-tokens", type=int, default=32768, help="At most.")
    parser.add_argument("--calibration-length", type=int, default=1024, help="Of its windows.")
    parser.add_argument("--outliers", nargs="+", default=["none", "scale", "bias"])
    parser.add_argument("--caches", nargs="+", default=[*TITLES], choices=[*TITLES])
    parser.add_argument("--group-size", nargs="+", type=int, default=[64, 32])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024, help="Tokens in a window.")
    parser.add_argument("--chunk", type=int, default=128, help="Tokens fed at a time.")
    parser.add_argument("--json", required=True, help="Where the figures are, and are added.")
    parser.add_argument("--report", action="store_true", help="Print the tables, measure nothing.")
    args = parser.parse_args()
    path = Path(args.json)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if args.report:
        report(found)
    elif not args.model or not args.text:
        parser.error("--model and --text are needed to measure.")
    else:
        run(args, found)


if __name__ == "__main__":
    main()
