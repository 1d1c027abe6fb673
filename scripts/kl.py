"""KL of packed caches from a model's own fp32 cache, over held-out text.

Every window is fed in chunks, so that each chunk attends to compressed history. Usage:

    python scripts/kl.py --model examples/models/tiny-qwen2-8bit --text novel.txt \\
        int4-srft int4-srft:group_size=64 k8v4-srft
"""

import argparse

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

import mlx_kvq


def logits(model, tokens, cache, chunk):
    """tokens [T] -> logits [T, vocabulary], fed ``chunk`` tokens at a time."""
    out = []
    for i in range(0, tokens.shape[0], chunk):
        out.append(model(tokens[None, i : i + chunk], cache=cache)[0].astype(mx.float32))
        mx.eval(out[-1])
    return mx.concatenate(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Local model directory or repository.")
    parser.add_argument("--text", required=True, help="A text file.")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="Tokens in a window.")
    parser.add_argument("--chunk", type=int, default=128, help="Tokens fed at a time.")
    parser.add_argument("specs", nargs="+", metavar="SPEC")
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    model.set_dtype(mx.float32)
    with open(args.text, encoding="utf-8") as file:
        # A token is a character at least; a few more characters than that are needed.
        text = file.read(16 * args.windows * args.tokens)
    tokens = mx.array(tokenizer.encode(text)[: args.windows * args.tokens])
    if tokens.size < args.windows * args.tokens:
        parser.error(f"{args.text} has {tokens.size} tokens, {args.windows * args.tokens} needed")
    windows = tokens.reshape(args.windows, args.tokens)
    mx.eval(windows)

    kl = {spec: [] for spec in args.specs}
    same = {spec: [] for spec in args.specs}
    loss = {spec: [] for spec in ["fp32", *args.specs]}
    for window in tqdm(windows, desc="windows"):
        exact = nn.log_softmax(logits(model, window, make_prompt_cache(model), args.chunk))
        loss["fp32"].append(nn.losses.nll_loss(exact[:-1], window[1:]))
        for spec in args.specs:
            cache = mlx_kvq.make_prompt_cache(model, spec)
            got = nn.log_softmax(logits(model, window, cache, args.chunk))
            kl[spec].append((mx.exp(exact) * (exact - got)).sum(axis=-1).mean())
            same[spec].append((exact.argmax(axis=-1) == got.argmax(axis=-1)).mean())
            loss[spec].append(nn.losses.nll_loss(got[:-1], window[1:]))
            mx.eval(kl, same, loss)

    def mean(values):
        return mx.stack(values).mean().item()

    perplexity = {spec: mx.exp(mx.stack(losses).mean()).item() for spec, losses in loss.items()}
    print(f"{'cache':32} {'KL':>8} {'top-1':>7} {'perplexity':>10}")
    print(f"{'fp32':32} {0:8.4f} {1:7.1%} {perplexity['fp32']:10.2f}")
    for spec in args.specs:
        print(f"{spec:32} {mean(kl[spec]):8.4f} {mean(same[spec]):7.1%} {perplexity[spec]:10.2f}")


if __name__ == "__main__":
    main()
