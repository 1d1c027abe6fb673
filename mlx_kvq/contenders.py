"""The caches a benchmark compares, each as its three operations on buffers of random content."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.base import quantized_scaled_dot_product_attention

from . import ops
from .format import make_format
from .spec import Spec

PIECE = 2048  # tokens of random content; a longer buffer repeats them, nothing depends on them
PLAIN = {"fp16": mx.float16, "bf16": mx.bfloat16, "fp32": mx.float32}


@dataclass(frozen=True)
class Heads:
    """The shape of one attention operation."""

    queries: int
    kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.queries} q / {self.kv} kv, D = {self.dim}"

    @classmethod
    def parse(cls, text: str) -> "Heads":
        """``"12,2,128"``: query heads, KV heads, head size."""
        try:
            heads = cls(*(int(n) for n in text.split(",")))
        except (TypeError, ValueError):
            raise ValueError(
                f"Heads are QUERIES,KV,SIZE, for example 12,2,128; got {text!r}."
            ) from None
        if min(heads.queries, heads.kv, heads.dim) < 1 or heads.queries % heads.kv:
            raise ValueError(f"{text!r}: query heads are a multiple of KV heads.")
        return heads


@dataclass
class Contender:
    """One cache at one shape. A buffer is an array or a nest of them, [B, Hkv, T, ...].

    Args:
        dtype: Of queries, keys and values.
        attend: (q [B, Hq, 1, D], buffer) -> output [B, Hq, 1, D].
        store: (k, v) [B, Hkv, L, D] -> a buffer; what the cache computes of new tokens.
        dequantize: (buffer, after) -> keys and values as arrays, once ``after`` is computed;
            ``None`` where they are arrays already.
    """

    dtype: mx.Dtype
    attend: Callable[[mx.array, Any], mx.array]
    store: Callable[[mx.array, mx.array], Any]
    dequantize: Callable[[Any, list], list] | None = None


def contender(name: str, heads: Heads, dtype: mx.Dtype) -> Contender:
    """``fp16``, ``bf16`` or ``fp32`` (plain arrays), ``kv4`` or ``kv8`` (mlx-lm's, group 64), or a
    spec; the last two kinds with queries, keys and values of ``dtype``.

    Raises:
        ValueError: If ``name`` is none of these or cannot pack this head size.
    """
    scale = heads.dim**-0.5
    if name in PLAIN:

        def plain(q, buffer):
            return mx.fast.scaled_dot_product_attention(q, *buffer, scale=scale)

        return Contender(PLAIN[name], plain, lambda k, v: (k, v))

    if name in ("kv4", "kv8"):
        bits = int(name[2:])

        def attend(q, buffer):
            k, v = buffer
            return quantized_scaled_dot_product_attention(q, k, v, scale, None, 64, bits)

        def store(k, v):
            return mx.quantize(k, 64, bits), mx.quantize(v, 64, bits)

        def back(buffer, after):
            k, v = buffer
            if after:
                k = (mx.depends(k[0], after), *k[1:])
            return [mx.dequantize(w, s, b, group_size=64, bits=bits) for w, s, b in (k, v)]

        return Contender(dtype, attend, store, back)

    spec = Spec.parse(name)
    if spec is None:
        raise ValueError(f"{name!r} is no cache to compare.")
    fmt = make_format(spec, heads.dim)

    recent = fmt.recent

    @lru_cache(maxsize=4)
    def tail(B: int) -> mx.array | None:
        return random(heads.kv, B, recent, 2 * heads.dim, dtype) if recent else None

    def attend_rows(q, rows):
        return ops.attend(q, rows, rows.shape[2], fmt, scale, tail=tail(q.shape[0]))

    def pack(k, v):
        if not recent:
            return ops.quantize_pack(k, v, fmt)
        old = tail(k.shape[0]) if k.shape[2] == 1 else None
        return ops.quantize_pack_tail(k, v, fmt, old, recent)[0]

    def unpack(rows, after):
        rows = mx.depends(rows, after) if after else rows
        return list(ops.restore(rows, rows.shape[2], fmt, dtype))

    return Contender(dtype, attend_rows, pack, unpack)


def token_bytes(c: Contender, heads: Heads) -> int:
    """Bytes that one token takes in all KV heads."""
    kv = mx.zeros((1, heads.kv, 1, heads.dim), c.dtype)
    return nbytes(c.store(kv, kv))


def make_buffers(c: Contender, heads: Heads, B: int, T: int, copies: int) -> list:
    """Buffers of ``B`` sequences of ``T`` random tokens, which share no memory."""
    n = min(T, PIECE)
    k, v = (random(heads.kv, 1, n, heads.dim, c.dtype) for _ in "kv")
    piece = c.store(k, v)
    mx.eval(piece)

    def repeat(x):
        x = mx.tile(x, (copies * B, 1, -(-T // n), 1))
        return mx.contiguous(x[:, :, :T])

    whole = tree_map(repeat, piece)
    mx.eval(whole)
    buffers = [tree_map(lambda x, i=i: x[i * B : (i + 1) * B], whole) for i in range(copies)]
    mx.eval(buffers)
    return buffers


def random(heads: int, B: int, L: int, D: int, dtype: mx.Dtype) -> mx.array:
    return mx.random.normal((B, heads, L, D)).astype(dtype)


def nbytes(buffer) -> int:
    """Bytes of a buffer."""
    return sum(x.nbytes for x in leaves(buffer))


def leaves(buffer) -> list[mx.array]:
    """Its arrays."""
    return [buffer] if isinstance(buffer, mx.array) else [x for b in buffer for x in leaves(b)]
