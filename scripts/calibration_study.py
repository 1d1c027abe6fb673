"""KL of calibrated and uncalibrated caches, on a model as it is and with key outliers.

Every window is fed in chunks, so that each chunk but the first attends to packed history; all
windows of a text are one batch. Prints one line per text, outlier and cache:

    python scripts/calibration_study.py --model MODEL --calibration-text novels.txt \\
        --text heldout.txt --text wiki.txt --json study.json
"""

import argparse
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache
from outliers import make_outlier
from tqdm import tqdm

import mlx_kvq

SPECS = [
    "int4-srft:group_size=64,scale=paper,calibrate=off",
    "int4-srft:group_size=64,calibrate=off",
    "int4-srft:group_size=64",
    "int4-srft:group_size=64,rounding=feedback",
    "k8v4-srft:group_size=64",
]


def log_probabilities(model, windows, caches, chunk):
    """windows [N, T] -> log-probabilities [N, chunk, V], chunk by chunk."""
    for i in range(0, windows.shape[1], chunk):
        logits = model(windows[:, i : i + chunk], cache=caches).astype(mx.float32)
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(logits)
        yield logits


def measure(model, windows, exact, caches, chunk):
    """Mean KL per token with its standard error over windows, and the change of perplexity."""
    N, T = windows.shape
    following = mx.concatenate([windows[:, 1:], windows[:, :1]], axis=1)
    kl, loss = [], []
    for i, (p, q) in enumerate(
        zip(exact, log_probabilities(model, windows, caches, chunk), strict=True)
    ):
        kl.append((mx.exp(p) * (p - q)).sum(axis=-1))
        target = following[:, i * chunk : (i + 1) * chunk, None]
        loss.append(mx.take_along_axis(p - q, target, axis=-1)[..., 0])
        mx.eval(kl[-1], loss[-1])
    per_window = np.array(mx.concatenate(kl, axis=1).mean(axis=1))
    change = mx.concatenate(loss, axis=1)[:, : T - 1].mean().item()
    return per_window.mean(), per_window.std(ddof=1) / np.sqrt(N), np.expm1(change)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Local model directory, not quantized.")
    parser.add_argument("--text", required=True, action="append", help="A text file; repeatable.")
    parser.add_argument("--calibration-text", help="Without one: the built-in sample text.")
    parser.add_argument("--calibration-length", type=int, default=2048)
    parser.add_argument("--outliers", nargs="+", default=["none", "scale", "bias"])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024, help="Tokens in a window.")
    parser.add_argument("--chunk", type=int, default=128, help="Tokens fed at a time.")
    parser.add_argument("--json", help="Write the figures here, too.")
    parser.add_argument("specs", nargs="*", default=SPECS, metavar="SPEC")
    args = parser.parse_args()

    def read(name):
        return Path(name).read_text(encoding="utf-8")

    rows = []
    for outlier in args.outliers:
        model, tokenizer = load(args.model)
        model.set_dtype(mx.float32)
        make_outlier(model, outlier)
        texts = None if args.calibration_text is None else read(args.calibration_text)
        calibration = mlx_kvq.calibrate(model, tokenizer, texts, length=args.calibration_length)
        for name in args.text:
            n = args.windows * args.tokens
            tokens = mx.array(tokenizer.encode(read(name)[: 16 * n])[:n])
            windows = tokens.reshape(args.windows, args.tokens)
            exact = list(log_probabilities(model, windows, make_prompt_cache(model), args.chunk))
            for spec in tqdm(args.specs, desc=f"{outlier}, {Path(name).name}", leave=False):
                given = None if "calibrate=off" in spec else calibration
                caches = mlx_kvq.make_prompt_cache(model, spec, calibration=given)
                kl, error, change = measure(model, windows, exact, caches, args.chunk)
                rows.append(
                    [Path(args.model).name, outlier, Path(name).name, spec, kl, error, change]
                )
                print(
                    f"{outlier:6} {Path(name).name:22} {spec:52} "
                    f"{kl:.4f} ± {error:.4f} {change:+.2%}",
                    flush=True,
                )
    if args.json:
        names = ["model", "outlier", "text", "cache", "kl", "standard_error", "perplexity"]
        Path(args.json).write_text(
            json.dumps([dict(zip(names, map(_plain, row), strict=True)) for row in rows], indent=1)
        )


def _plain(value):
    return value if isinstance(value, str) else float(value)


if __name__ == "__main__":
    main()
