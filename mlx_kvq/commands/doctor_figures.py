"""What doctor measures besides errors: compile times, timings beside fp16, replayed launches."""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import qwen2

from .. import ops
from ..caches.attention import packed_attention
from ..caches.single import PackedKVCache
from ..calibration.automatic import random_tokens
from ..calibration.fit import calibrate_tokens
from ..format.format import make_format
from ..format.spec import Spec
from ..measure import op_speed
from ..measure.timing import copy_bandwidth
from ..model.enable import enable
from ..ops import compiling

LAYERS, TOKENS = 2, 20
PROMPT, BATCH = 600, [300, 200, 280]
CONTEXTS = [1024, 8192]


@contextmanager
def replay(asked: str) -> Iterator[None]:
    """Inside, launches are replayed (``"1"``) or called (``"0"``)."""
    before = os.environ.get("MLX_KVQ_REPLAY")
    os.environ["MLX_KVQ_REPLAY"] = asked
    ops.forget()
    try:
        yield
    finally:
        del os.environ["MLX_KVQ_REPLAY"]
        if before is not None:
            os.environ["MLX_KVQ_REPLAY"] = before
        ops.forget()


def small(dtype: mx.Dtype = mx.float16) -> qwen2.Model:
    """Random weights; attention is that of Qwen2.5-1.5B, two layers of it, and all else small."""
    model = qwen2.Model(
        qwen2.ModelArgs(
            model_type="qwen2", hidden_size=1536, num_hidden_layers=LAYERS, intermediate_size=64,
            num_attention_heads=12, num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=64,
        )
    )  # fmt: skip
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def compiled() -> list[compiling.Compiled]:
    """Kernels from loading a model to its twentieth token, alone and in a batch, with trials."""
    model = small(mx.bfloat16)
    calibration = calibrate_tokens(model, [random_tokens(model)[:64]], progress=False)
    with replay("0"), compiling.noted() as found:
        enable(model, "int4-srft", calibration=calibration, verbose=False)
        for _ in generate_step(mx.ones((PROMPT,), mx.int32), model, max_tokens=TOKENS):
            pass
        server = BatchGenerator(model, max_tokens=TOKENS)
        server.insert([[1] * n for n in BATCH])
        while any(server.next()):
            pass
        server.close()
    return found


def replayed(steps: int = 40) -> tuple[bool, float, float]:
    """Whether replayed launches give the bits of called ones, over lengths at which the number of
    splits changes, and milliseconds of a step in either way: called, replayed."""
    fmt = make_format(_spec(), 128)
    q = mx.random.normal((1, 12, 1, 128)).astype(mx.float16)
    k = mx.random.normal((1, 2, 700, 128)).astype(mx.float16)
    mx.eval(q, k)

    def decode(asked: str, prompt: int) -> tuple[list[mx.array], float]:
        with replay(asked):
            cache, found, taken = PackedKVCache(fmt), [], []
            cache.update_and_fetch(k[:, :, :prompt], k[:, :, :prompt])
            for i in range(steps):
                one = k[:, :, i : i + 1]
                start = time.perf_counter()
                keys, values = cache.update_and_fetch(one, one)
                found.append(packed_attention(q, keys, values, 0.09))
                mx.eval(found[-1])
                taken.append(time.perf_counter() - start)
        return found, sorted(taken)[len(taken) // 2]

    same, times = True, {"0": 0.0, "1": 0.0}
    for prompt in (110, 500):  # one split, then several; and several
        outputs = {}
        for asked in times:
            outputs[asked], times[asked] = decode(asked, prompt)
        pairs = zip(outputs["0"], outputs["1"], strict=True)
        same = same and all(mx.array_equal(a, b) for a, b in pairs)
    return same, 1e3 * times["0"], 1e3 * times["1"]


def beside_fp16(contexts: list[int], rounds: int = 5) -> Iterator[list[dict]]:
    """Attention of a token, and storing one and a prompt, as mlx-lm's caches do it in fp16 and with
    int4: rows of ``mlx_kvq benchmark``."""
    on_cpu = ops.language() is None
    args = argparse.Namespace(
        heads=op_speed.HEADS, kv_cache=["fp16", "int4-srft"], dtype="float16", batch_size=[1],
        contexts=contexts, vectors=4096 if on_cpu else 65536, ops=["attend", "quantize"],
        beyond=1 if on_cpu else 128, cpu_time=on_cpu, tokens=32, rounds=rounds,
    )  # fmt: skip
    yield from op_speed.measure(args, copy_bandwidth(args.beyond))


def _spec() -> Spec:
    spec = Spec.parse("int4-srft")
    assert spec is not None
    return spec
