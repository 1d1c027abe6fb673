"""What a block of a prompt costs: seconds of prefill for several sizes of `attention.BLOCK`.

    python scripts/block_study.py --shape qwen2.5-1.5b --contexts 2048 8192 32768

Random weights, one sequence in mlx-lm's chunks of 2048; medians of interleaved rounds, in one run
on one machine. A server reads at most a block and `recent` tokens again where two prompts part.
"""

import argparse
import statistics
import time

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

import mlx_kvq
from mlx_kvq.caches import attention
from mlx_kvq.calibration.automatic import random_tokens
from mlx_kvq.calibration.fit import calibrate_tokens
from mlx_kvq.measure import shapes

STEP = 2048  # tokens of a chunk, as in mlx_lm


def prefill(model, tokens: mx.array) -> float:
    """Seconds for a prompt [T]."""
    cache = make_prompt_cache(model)
    mx.synchronize()
    start = time.perf_counter()
    for at in range(0, tokens.size, STEP):
        model(tokens[None, at : at + STEP], cache=cache)
        mx.eval([c.state for c in cache])
    mx.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128, 256, 512, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    args = parser.parse_args()
    model = shapes.random_model(args.shape, getattr(mx, args.dtype), None)
    calibration = calibrate_tokens(model, [random_tokens(model)], progress=False)
    device = mx.device_info().get("device_name", "CPU")
    print(f"{args.shape}, {args.dtype}, {device}, mlx {mx.__version__}")
    print("| tokens | fp16 s | " + " | ".join(f"block {b}: × fp16" for b in args.blocks) + " |")
    print("|--:" * (2 + len(args.blocks)) + "|")
    for T in args.contexts:
        tokens = mx.random.randint(0, 1000, (T,))
        times: dict[object, list[float]] = {None: [], **{b: [] for b in args.blocks}}
        for i in tqdm(range(args.rounds + 1), desc=str(T), unit="round", leave=False):
            for block, found in times.items():
                if block is None:
                    mlx_kvq.disable(model)
                else:
                    mlx_kvq.enable(model, "int4-srft", calibration=calibration, verbose=False)
                    attention.BLOCK = block
                seconds = prefill(model, tokens)
                if i:  # the first round compiles
                    found.append(seconds)
        own = times.pop(None)
        quotients = [
            statistics.median(a / b for a, b in zip(own, t, strict=True)) for t in times.values()
        ]
        print(
            f"| {T} | {statistics.median(own):.4f} | "
            + " | ".join(f"{q:.3f}" for q in quotients)
            + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
