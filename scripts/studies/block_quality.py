"""What the size of a block of a prompt costs in quality: `attention.BLOCK` on a real model.

    python scripts/studies/block_quality.py --model M --text wikitext.txt --lengths 1024 4096

Documents of the text are read side by side, with the model's own cache and with one packed cache
for each size of a block: a prompt in chunks, then tokens one at a time, as decoding reads them. A
row says, for the tokens of either part, the mean KL from the own cache in nats (each document's in
brackets) and the perplexity. The model runs in float32; without the rounding of kernels and of
TF32: MLX_KVQ_BACKEND=reference MLX_ENABLE_TF32=0.
"""

import argparse
import json
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

import mlx_kvq
from mlx_kvq.caches import attention
from mlx_kvq.measure.quality import Scores, compare

APART = 7000  # tokens from the start of a document to that of the next


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", help="default: the automatic one, as users get it")
    parser.add_argument("--spec", default="int4-srft")
    parser.add_argument("--blocks", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="of a prompt")
    parser.add_argument("--chunk", type=int, default=2048, help="of a prompt, as in mlx_lm")
    parser.add_argument("--decoded", type=int, default=64, help="tokens after a prompt")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer, *_ = load(args.model)
    model.set_dtype(mx.float32)
    mlx_kvq.enable(model, args.spec, calibration=args.calibration, tokenizer=tokenizer)
    make_packed = model.make_cache
    mlx_kvq.disable(model)
    starts = [d * APART for d in range(args.documents)]
    needed = starts[-1] + max(args.lengths) + args.decoded + 1
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8")[: 8 * needed])
    if len(ids) < needed:
        raise SystemExit(f"{args.text} has {len(ids)} tokens, {needed} are needed.")
    rows = []
    for length in args.lengths:
        total = length + args.decoded + 1
        started = time.perf_counter()
        caches = {"own": make_prompt_cache(model)} | {b: make_packed() for b in args.blocks}
        tokens = mx.array([ids[at : at + total] for at in starts])
        scores = read(model, caches, tokens, length, args.chunk)
        for (part, name), found in scores.items():
            row = {
                "model": Path(args.model).name, "spec": args.spec, "length": length,
                "chunk": args.chunk, "part": part, "block": name,
                "documents": [float(x) for x in np.concatenate(found.kl, axis=1).mean(axis=1)],
                "kl": float(np.concatenate(found.kl, axis=1).mean()),
                "top1": float(np.concatenate(found.same, axis=1).mean()),
                "perplexity": float(np.exp(np.concatenate(found.loss, axis=1).mean())),
            }  # fmt: skip
            rows.append(row)
            print(line(row), flush=True)
        print(f"{length} tokens: {time.perf_counter() - started:.0f} s", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def read(model, caches: dict, tokens: mx.array, length: int, chunk: int) -> dict:
    """Feed [B, T + 1] tokens, of which ``length`` are a prompt, to every cache in step; scores of
    each part and cache, the first of which the others are compared with."""
    ends = [*range(chunk, length, chunk), *range(length, tokens.shape[1])]
    scores = {(part, name): Scores() for part in ("prompt", "decoded") for name in caches}
    for start, end in zip([0, *ends], ends, strict=False):
        part, own = "prompt" if end <= length else "decoded", None
        for name, cache in caches.items():
            if name != "own":
                attention.BLOCK = name
            logits = model(tokens[:, start:end], cache=cache)
            own = logits if own is None else own
            mx.eval(logits, [c.state for c in cache] if part == "prompt" else [])
            found = scores[part, name]
            figures = [
                figures_of(*x)
                for x in zip(own, logits, tokens[:, start + 1 : end + 1], strict=True)
            ]
            for kept, values in zip(
                (found.kl, found.same, found.loss), zip(*figures, strict=True), strict=True
            ):
                kept.append(np.stack(values))
        mx.clear_cache()
    return scores


def figures_of(own: mx.array, logits: mx.array, targets: mx.array) -> list[np.ndarray]:
    """Of one document: KL, whether the top token is the same, loss, [L] each."""
    exact, got = (nn.log_softmax(x.astype(mx.float32), axis=-1) for x in (own, logits))
    return [np.array(x) for x in compare(exact, got, targets)]


def line(row: dict) -> str:
    parts = ", ".join(f"{x:.5f}" for x in row["documents"])
    return (
        f"{row['model']}, {row['length']} tokens, chunks of {row['chunk']}, {row['part']}, "
        f"block {row['block']}: KL {row['kl']:.5f} ({parts}), top-1 {row['top1']:.4f}, "
        f"perplexity {row['perplexity']:.4f}"
    )


if __name__ == "__main__":
    main()
