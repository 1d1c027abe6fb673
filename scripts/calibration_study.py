"""What calibration is worth: KL of caches on models as they are and with key outliers.

Every window is fed in chunks, so that each chunk but the first, which is not scored, attends to
what the cache remembers; all windows of a text are one batch. Figures are added to ``--json``
block by block, and what is there already is not measured again:

    python scripts/calibration_study.py --model tiny-qwen2 --model tiny-llama \\
        --calibration-text novels.txt --text heldout.txt --text wiki.txt --json study.json
    python scripts/calibration_study.py --json study.json --report   # the tables, in Markdown

``kv4`` and ``kv8`` are mlx-lm's affine quantization on every layer, groups of 64, rounded when
written and kept unpacked: mlx-lm itself has no such cache for sliding layers.
"""

import argparse
import json
import os
from dataclasses import asdict
from itertools import product
from pathlib import Path

import mlx.core as mx
from mlx_lm import load
from outliers import make_outlier
from tqdm import tqdm

import mlx_kvq
from mlx_kvq.baselines import KV_BITS, KV_GROUP, candidate, own
from mlx_kvq.quality import Estimate, measure, summarize

OURS = {
    "paper": "int4-srft:group_size={g},scale=paper,calibrate=off",
    "off": "int4-srft:group_size={g},calibrate=off",
    "int4": "int4-srft:group_size={g}",
    "k8v4": "k8v4-srft:group_size={g}",
    "int8": "int8-srft:group_size={g}",
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


def affine(model, bits):
    """Makes the model's own caches, each of which rounds what it is given as mlx-lm would."""

    def rounded(x):
        parts = mx.quantize(x.astype(mx.float16), KV_GROUP, bits)
        return mx.dequantize(*parts, KV_GROUP, bits).astype(x.dtype)

    def make():
        caches = own(model).make()
        for cache in caches:
            update = cache.update_and_fetch
            cache.update_and_fetch = lambda k, v, update=update: update(rounded(k), rounded(v))
        return caches

    return make


def contenders(model, group, calibration):
    """Name -> makes caches, the baseline first; mlx-lm's beside groups of its own size."""
    makers = {"own": own(model).make}
    for name, spec in OURS.items():
        makers[name] = candidate(model, spec.format(g=group), calibration=calibration).make
    if group == KV_GROUP:
        makers |= {name: affine(model, bits) for name, bits in KV_BITS.items()}
    return makers


def block(model, tokenizer, calibration, text, group, args):
    """The figures of every cache on one text."""
    n = args.windows * args.tokens
    ids = tokenizer.encode(Path(text).read_text(encoding="utf-8")[: 16 * n])[:n]
    windows = mx.array(ids).reshape(args.windows, args.tokens)
    makers = contenders(model, group, calibration)
    steps = len(makers) * -(-args.tokens // args.chunk)
    with tqdm(total=steps, desc="chunks", leave=False) as bar:
        scores = measure(model, makers, windows, args.chunk, bar.update, batch=args.windows)
    return [asdict(summarize(name, scores[name], scores["own"], 0)) for name in makers]


def save(found, path):
    part = Path(f"{path}.part")
    part.write_text(json.dumps(found, indent=1), encoding="utf-8")
    os.replace(part, path)


def run(args, found):
    def key_of(model, outlier, text, group):
        return f"{Path(model).name} {outlier} {Path(text).name} {group}"

    wanted = [
        (group, text, model, outlier)
        for group, text, model, outlier in product(
            args.group_size, args.text, args.model, args.outliers
        )
        if key_of(model, outlier, text, group) not in found
    ]
    models = {}
    for group, text, name, outlier in tqdm(wanted, desc="blocks"):
        if (name, outlier) not in models:
            model, tokenizer = load(name)
            model.set_dtype(mx.float32)
            make_outlier(model, outlier)
            given = args.calibration_text and Path(args.calibration_text).read_text("utf-8")
            options = {"tokens": args.calibration_tokens, "length": args.calibration_length}
            calibration = mlx_kvq.calibrate(model, tokenizer, given or None, **options)
            models[name, outlier] = model, tokenizer, calibration
        figures = block(*models[name, outlier], text, group, args)
        found[key_of(name, outlier, text, group)] = figures
        save(found, args.json)
        for f in figures[1:]:
            line = f"{name} {outlier:5} {group} {f['name']:6} {f['kl']['mean']:.4f}"
            tqdm.write(f"{line} {f['change']['mean']:+.2%}")


def report(found):
    """Markdown: for each text and group a table of KL, with its ratios, and one of the rest."""
    keys = [key.split(" ") for key in found]
    for text, group in dict.fromkeys((k[2], k[3]) for k in keys):
        columns = [k for k in keys if k[2:] == [text, group]]
        cells = [{f["name"]: f for f in found[" ".join(k)]} for k in columns]
        print(f"\n### {text}, groups of {group}\n")
        head = [m.removeprefix("tiny-") + ("" if o == "none" else f", {o}") for m, o, *_ in columns]
        print("| KL |", " | ".join(head), "|")
        print("|---|" + "--:|" * len(head))
        for name, title in TITLES.items():
            row = [kl(c[name]) if name in c else "–" for c in cells]
            if any(x != "–" for x in row):
                print(f"| {title} |", " | ".join(row), "|")
        row = [f"{c['int4']['kl']['mean'] / c['paper']['kl']['mean']:.2f}" for c in cells]
        print("| int4 / paper's rule |", " | ".join(row), "|")
        if all("kv4" in c for c in cells):
            row = [f"{c['int4']['kl']['mean'] / c['kv4']['kl']['mean']:.2f}" for c in cells]
            print("| int4 / kv4 |", " | ".join(row), "|")
        print("\n| int4 |", " | ".join(head), "|")
        print("|---|" + "--:|" * len(head))
        for title, show in {
            "KL 99 %": lambda f: f"{f['kl_p99']:.3f}",
            "top-1": lambda f: f"{f['top1']:.1%}",
            "perplexity": lambda f: change(Estimate(**f["change"])),
        }.items():
            print(f"| {title} |", " | ".join(show(c["int4"]) for c in cells), "|")


def kl(f):
    return f"{f['kl']['mean']:.2g}" if f["kl"]["mean"] < 0.001 else f"{f['kl']['mean']:.4f}"


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
