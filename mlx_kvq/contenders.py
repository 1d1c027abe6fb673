"""The caches a benchmark compares, each as its decode attention and its way to store a token."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.base import quantized_scaled_dot_product_attention

from . import ops
from .format import make_format
from .spec import Spec


@dataclass
class Heads:
    """The shape of one attention operation."""

    queries: int
    kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.queries} q / {self.kv} kv, D = {self.dim}"


@dataclass
class Contender:
    """One cache at one shape.

    Args:
        attend: (q [B, Hq, 1, D], buffer) -> output [B, Hq, 1, D].
        make: (batch, tokens) -> a buffer of that many tokens with random content.
        store: (k, v) [B, Hkv, L, D] -> the arrays kept; ``None`` where nothing is computed.
    """

    attend: Callable
    make: Callable
    store: Callable | None = None


def contender(name: str, heads: Heads, dtype: mx.Dtype) -> Contender:
    """``fp16`` (the model's dtype), ``kv4`` and ``kv8`` (mlx-lm's, group 64), or a spec.

    Raises:
        ValueError: If ``name`` is none of these or cannot pack this head size.
    """
    scale = heads.dim**-0.5

    def random(B, T):
        return mx.random.normal((B, heads.kv, T, heads.dim)).astype(dtype)

    if name in ("fp16", "bf16"):
        kind = mx.float16 if name == "fp16" else mx.bfloat16

        def attend(q, buffer):
            k, v = buffer
            return mx.fast.scaled_dot_product_attention(q.astype(kind), k, v, scale=scale)

        return Contender(
            attend, lambda B, T: (random(B, T).astype(kind), random(B, T).astype(kind))
        )

    if name in ("kv4", "kv8"):
        bits = int(name[2:])

        def attend(q, buffer):
            k, v = buffer
            return quantized_scaled_dot_product_attention(
                q, k, v, scale=scale, mask=None, group_size=64, bits=bits
            )

        def quantize(k, v):
            return (*mx.quantize(k, 64, bits), *mx.quantize(v, 64, bits))

        def make(B, T):
            arrays = quantize(random(B, T), random(B, T))
            return arrays[:3], arrays[3:]

        return Contender(attend, make, quantize)

    spec = Spec.parse(name)
    assert spec is not None
    fmt = make_format(spec, heads.dim)
    return Contender(
        lambda q, rows: ops.attend(q, rows, rows.shape[2], fmt, scale),
        lambda B, T: ops.quantize_pack(random(B, T), random(B, T), fmt),
        lambda k, v: (ops.quantize_pack(k, v, fmt),),
    )


def nbytes(buffer) -> int:
    """Bytes of a buffer or a nest of them."""
    return buffer.nbytes if isinstance(buffer, mx.array) else sum(nbytes(b) for b in buffer)
