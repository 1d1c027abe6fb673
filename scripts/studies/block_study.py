"""What a block of a prompt costs: seconds of prefill for several sizes of `attention.BLOCK`.

    python scripts/studies/block_study.py --shape qwen2.5-1.5b --contexts 2048 8192 32768

Random weights, one sequence in mlx-lm's chunks of 2048; medians and quartiles of rounds that fp16
and a packed cache take in turn. The first prompt of a length stands apart: on CUDA cuDNN plans the
attention of each number of keys that is new to the process, and MLX keeps so many plans
(MLX_CUDA_SDPA_CACHE_SIZE). A server reads at most a block and `recent` tokens again where two
prompts part.
"""

import argparse
import itertools
import time
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

import mlx_kvq
from mlx_kvq.caches import attention
from mlx_kvq.calibration.automatic import random_tokens
from mlx_kvq.calibration.fit import calibrate_tokens
from mlx_kvq.measure import model_speed, shapes
from mlx_kvq.measure.timing import speedup, spread

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
    parser.add_argument("--blocks", type=int, nargs="+", default=[256, 512, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    args = parser.parse_args()
    model = shapes.random_model(args.shape, getattr(mx, args.dtype), None)
    calibration = calibrate_tokens(model, [random_tokens(model)], progress=False)
    device = mx.device_info().get("device_name", "CPU")
    print(f"{args.shape}, {args.dtype}, {device}, mlx {version('mlx')}")
    print("| tokens | block | fp16, s | first of fp16, s | s | first, s | × fp16 |")
    print("|--:" * 7 + "|")
    for T, block in itertools.product(args.contexts, args.blocks):
        tokens = model_speed.prompts(model, 1, T)[0]
        attention.BLOCK = block
        times: dict[str, list[float]] = {"fp16": [], "int4-srft": []}
        for spec in times:
            mlx_kvq.enable(model, spec, calibration=calibration, verbose=False)
            prefill(model, tokens[: 2 * STEP])  # compiles the kernels
        for _ in range(args.rounds + 1):
            for spec, found in times.items():
                mlx_kvq.enable(model, spec, calibration=calibration, verbose=False)
                prefill(model, tokens[:1])  # makes the tables of new formats, once a process else
                found.append(prefill(model, tokens))
        first = {spec: found.pop(0) for spec, found in times.items()}
        own, packed = (spread(found) for found in times.values())
        x = speedup(times["fp16"], times["int4-srft"])
        print(
            f"| {T} | {block} | {own.median:.4f} | {first['fp16']:.2f} | {packed.median:.4f} | "
            f"{first['int4-srft']:.2f} | {x.median:.3f} ({x.low:.3f}–{x.high:.3f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
