"""Kernels that one decode step evaluates per layer on Metal, from the traced graph.

    python -m tests.support.launches            # the tables of docs/performance.md

No GPU is needed: MLX records the calls of Metal kernels on any system while a function is traced
by ``mx.export_function``. What counts is a primitive that runs a kernel; one that only describes
its input anew (a reshape, a slice, a broadcast) does not. What a layer costs is the difference
between models of three and of two such layers.

Three things are not in the graph and are taken from MLX's sources (0.32):

- ``mx.fast`` functions and ``mx.quantize`` are primitives of their own only on GPUs. While tracing
  a stand-in takes their place, one kernel each.
- ``mx.fast.scaled_dot_product_attention`` of up to 8 queries runs two kernels instead of one
  (mlx/backend/metal/scaled_dot_product_attention.cpp): on Max and Ultra chips from 1024 keys on,
  on others from 4096 if KV heads are shared. A query that is not contiguous is copied first, which
  is left out here, as is a cache that grows (every 256 tokens).
- ``SliceUpdate`` of a cache that nobody else holds copies the new rows only: one kernel
  (mlx/backend/metal/indexing.cpp). With an exact tail int4-srft has one every 64 tokens, after
  a kernel that packs them, which are not counted here.

Functions compiled with ``mx.compile`` are traced part by part, so "the rest of the layer" is an
upper bound; it is the same for fp16 and int4-srft. (mlx-lm's kv4 also scales the query, a kernel
that is counted there.)
"""

import argparse
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx_lm.models import gemma3_text, qwen2
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.models.cache import make_prompt_cache as stock_cache

import mlx_kvq
from mlx_kvq import ops
from mlx_kvq.caches import attention
from mlx_kvq.ops import trial
from mlx_kvq.ops.gpu import machine

VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Reshape",
    "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
_CUSTOM = re.compile(
    r"custom_kernel_(standin_(?P<name>sdpa|rope|rms_norm|quantize)|kvq_(?P<ours>\w+?)_[0-9a-f]{12})_"
)
CHIPS = {"g": "M1 to M5 and Pro", "s": "Max and Ultra"}
# What storing tokens and attending to them consists of, whatever the cache.
OURS = {"quantize_pack", "keep_exact", "attend_finish", "attend_store", "combine"}
# Quantized products are of mlx-lm's attention only: no model here has quantized weights.
STORING = OURS | {"sdpa", "quantize", "SliceUpdate", "QuantizedMatmul", "Softmax"}


def qwen(layers: int):
    """Attention as in Qwen2.5-1.5B, everything else small."""
    return qwen2.Model(
        qwen2.ModelArgs(
            model_type="qwen2", hidden_size=1536, num_hidden_layers=layers, intermediate_size=64,
            num_attention_heads=12, num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=64,
        )
    )  # fmt: skip


def gemma(sliding: bool) -> Callable:
    """Attention as in Gemma 3 1B; the third layer sliding, or none."""

    def build(layers: int):
        return gemma3_text.Model(
            gemma3_text.ModelArgs(
                model_type="gemma3_text", hidden_size=64, num_hidden_layers=layers,
                intermediate_size=64, vocab_size=64,
                sliding_window_pattern=2 if sliding else 1,
            )
        )  # fmt: skip

    return build


MODELS: dict[str, Callable] = {
    "Qwen2.5-1.5B (12 q / 2 kv, D = 128)": qwen,
    "Gemma 3 1B, full layer (4 q / 1 kv, D = 256)": gemma(sliding=False),
    "Gemma 3 1B, sliding layer (window 512)": gemma(sliding=True),
}


def sdpa_kernels(queries: tuple, keys: tuple, chip: str) -> int:
    """Of a call with so shaped q and k, up to 8 queries, head sizes that have a vector kernel."""
    large, shared = chip in "sd", keys[1] < queries[1]
    return 2 if (large and keys[2] >= 1024) or (shared and keys[2] >= 4096) else 1


def _stand_in(name: str, shapes: list, dtypes: list, *inputs: mx.array) -> list[mx.array]:
    names = [f"x{i}" for i in range(len(inputs))]
    kernel = mx.fast.metal_kernel(
        name=f"standin_{name}",
        input_names=names,
        output_names=[f"y{i}" for i in range(len(shapes))],
        source="y0[0] = x0[0];",
    )
    return kernel(
        inputs=list(inputs),
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )


@contextmanager
def as_on_metal() -> Iterator[None]:
    """Inside, what is traced is what Metal would be given."""
    replaced: list[tuple] = []

    def replace(owner, name, value):
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def same(name):
        return lambda x, *args, **kwargs: _stand_in(name, [x.shape], [x.dtype], x)[0]

    def sdpa(q, k, v, **kwargs):
        return _stand_in("sdpa", [(*q.shape[:3], v.shape[3])], [q.dtype], q, k, v)[0]

    def quantize(w, group_size=64, bits=4, **kwargs):
        groups = (*w.shape[:-1], w.shape[-1] // group_size)
        shapes = [(*w.shape[:-1], w.shape[-1] * bits // 32), groups, groups]
        return _stand_in("quantize", shapes, [mx.uint32, w.dtype, w.dtype], w)

    try:
        for name in ("rms_norm", "rope"):
            replace(mx.fast, name, same(name))
        replace(mx.fast, "scaled_dot_product_attention", sdpa)
        replace(mx, "quantize", quantize)
        replace(machine, "language", lambda: "metal")
        replace(attention, "_compute_dtype", lambda dtype: dtype)
        # The first launch is otherwise tried, and evaluated.
        replace(trial, "works", lambda *_: True)
        ops.forget()
        yield
    finally:
        ops.forget()
        for owner, name, value in reversed(replaced):
            setattr(owner, name, value)


@functools.cache
def traced(build: Callable, layers: int, name: str, T: int, L: int) -> list[dict]:
    """The graph of a step of L tokens after T."""
    model = _in_half(build, layers)
    cache = caches(model, name, T, decodes=L == 1)
    graph: list[dict] = []
    with as_on_metal():
        mx.export_function(graph.append, lambda y: model(y, cache=cache), mx.ones((1, L), mx.int32))
    return graph


def counted(graph: list[dict], chip: str, L: int) -> Counter:
    """Kernels of a graph by primitive, custom kernels by name."""
    found: Counter = Counter()
    for node in graph:
        if node["type"] != "primitive" or node["name"] in VIEWS:
            continue
        name = node["name"]
        count = 1
        if name == "CustomKernel":
            name = next(filter(None, _CUSTOM.match(node["arguments"][0]).group("name", "ours")))
            if name == "sdpa":
                q, k = (shape for _, shape, _ in node["inputs"][:2])
                count = sdpa_kernels(q, k, chip) if L <= 8 else 1
        if name == "Concatenate":
            count = len(node["inputs"])  # a copy of each
        found[name] += count
    return found


def caches(model, name: str, T: int, decodes: bool = True) -> list:
    """Caches of ``model`` that hold T tokens, and one more if they are to decode."""
    if name == "kv4":
        made = [QuantizedKVCache(64, 4) for _ in model.layers]
    elif name == "fp16":
        made = stock_cache(model)
    else:
        made = mlx_kvq.make_prompt_cache(model, f"{name}{',' if ':' in name else ':'}calibrate=off")
    args = model.args
    Hkv = args.num_key_value_heads
    D = getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads
    for cache in made:
        # Of alike arrays a trace would count only one.
        k, v = (mx.random.normal((1, Hkv, T, D)).astype(mx.float16) for _ in "kv")
        cache.update_and_fetch(k, v)
        mx.eval(cache.state)
        if decodes:  # the first single token after several makes room, or puts a ring in order
            cache.update_and_fetch(k[:, :, :1], v[:, :, :1])
            mx.eval(cache.state)
    return made


@functools.cache
def _in_half(build: Callable, layers: int):
    model = build(layers)
    model.set_dtype(mx.float16)
    mx.eval(model.parameters())
    return model


def per_layer(build: Callable, name: str, T: int, chip: str = "g", L: int = 1) -> Counter:
    """Kernels of one layer in a decode step after T tokens, or in a prompt's chunk of L, by
    primitive."""
    three, two = (counted(traced(build, layers, name, T, L), chip, L) for layers in (3, 2))
    three.subtract(two)
    return +three


def storing(counts: Counter) -> int:
    """Kernels of the cache and of attention in a layer's counts."""
    return sum(n for name, n in counts.items() if name in STORING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", nargs="+", type=int, default=[500, 2000, 8000])
    args = parser.parse_args()
    for title, build in MODELS.items():
        print(f"\n{title}\n")
        heads = [f"fp16, {chips}" for chips in CHIPS.values()] + ["kv4", "int4-srft"]
        print(f"| tokens | {' | '.join(heads)} | int4-srft runs | rest of the layer |")
        print("|---" * (len(heads) + 3) + "|")
        for T in args.contexts:
            cells = [str(storing(per_layer(build, "fp16", T, chip))) for chip in CHIPS]
            # mlx-lm cannot quantize a sliding layer.
            cells.append("" if "sliding" in title else str(storing(per_layer(build, "kv4", T))))
            counts = per_layer(build, "int4-srft", T)
            cells.append(str(storing(counts)))
            cells.append(", ".join(f"{n} {k}" for k, n in counts.items() if k in STORING))
            print(f"| {T} | {' | '.join(cells)} | {counts.total() - storing(counts)} |")
        fp16, int4 = (
            per_layer(build, name, 2048, L=2048).total() for name in ("fp16", "int4-srft")
        )
        print(
            f"\nA layer in a prompt's second chunk of 2048: {fp16} with fp16, {int4} with int4-srft"
        )


if __name__ == "__main__":
    main()
