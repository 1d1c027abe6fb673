"""The caches of one attention layer that a benchmark compares, filled as decoding fills them.

Attention is timed over what ``update_and_fetch`` of the cache class that users get returns: its
strides, its capacity, its mask. Which kernel runs depends on them. MLX on CUDA decodes through
cuDNN only where K and V are slices of buffers with a capacity that is a multiple of 256, each
filling one buffer, and where there is no array mask.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache

from .. import ops
from ..caches import seams
from ..caches.rows import WAITING
from ..caches.single import PackedKVCache
from ..format.format import Format, make_format
from ..format.spec import Spec
from ..format.transform import Calibration
from .baselines import KV_BITS, KV_GROUP, PLAIN, Contender, affine, padded

CHUNK = 2048  # tokens of a prompt that mlx-lm reads at once
DECODED = 4  # newest tokens of a cache, stored one by one
# A batch of one length in a KVCache, without a mask: no server has it, but fp16 is fastest so.
EVEN = "fp16-even"


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
class Held:
    """A cache that holds tokens, and the operands of a decode step's attention."""

    cache: Any  # of the class that users get
    keys: Any  # from the last ``update_and_fetch``
    values: Any
    mask: mx.array | None  # of that step; [B, 1, 1, T] of a batch


@dataclass(kw_only=True)
class LayerContender(Contender):
    """A contender in one layer."""

    dtype: mx.Dtype  # of queries, keys and values
    # (k, v) [B, Hkv, L, D] -> the arrays that the cache computes of new tokens.
    store: Callable[[mx.array, mx.array], Any]
    # (held, after) -> keys and values, once ``after`` is computed; None where they are arrays.
    dequantize: Callable[[Held, list], list] | None = None

    def attend(self, q: mx.array, held: Held) -> mx.array:
        """Attention as mlx-lm's models call it, q [B, Hq, 1, D] -> [B, Hq, 1, D]."""
        return base.scaled_dot_product_attention(
            q, held.keys, held.values, held.cache, q.shape[-1] ** -0.5, held.mask
        )


def contender(name: str, heads: Heads, dtype: mx.Dtype) -> LayerContender:
    """``fp16``, ``bf16`` or ``fp32`` (plain arrays), ``fp16-even`` (sequences of one length without
    a mask), ``kv4`` or ``kv8`` (mlx-lm's, group 64), or a spec; the last two kinds with queries,
    keys and values of ``dtype``. Raises ValueError if ``name`` is none of these or cannot pack this
    head size."""
    if name in PLAIN or name == EVEN:
        own = PLAIN.get(name, mx.float16)
        made = LayerContender(name, lambda: [KVCache()], dtype=own, store=lambda k, v: (k, v))
        made.merges = name != EVEN
        return made
    if name in KV_BITS:
        return _affine(name, dtype)
    if (spec := Spec.parse(name)) is None:
        raise ValueError(f"{name!r} is no cache to compare.")
    return _packed(name, spec, heads, dtype)


def _affine(name: str, dtype: mx.Dtype) -> LayerContender:
    bits = KV_BITS[name]

    def store(k, v):
        return mx.quantize(k, KV_GROUP, bits), mx.quantize(v, KV_GROUP, bits)

    def dequantize(held, after):
        k, v = held.keys, held.values
        if after:
            k = (mx.depends(k[0], after), *k[1:])
        return [mx.dequantize(w, s, b, group_size=KV_GROUP, bits=bits) for w, s, b in (k, v)]

    return LayerContender(
        name, lambda: [affine(KVCache(), name)], dtype=dtype, store=store, dequantize=dequantize
    )


def _packed(name: str, spec: Spec, heads: Heads, dtype: mx.Dtype) -> LayerContender:
    seams.install()
    fmt = _format(spec, heads)
    recent = fmt.recent

    @functools.cache
    def before(B: int) -> mx.array:
        """The tail of a cache before a decode step."""
        tail = random(heads.kv, B, recent, 2 * heads.dim, ops.tail_dtype(dtype))
        mx.eval(tail)
        return tail

    stored = itertools.count(1)

    def store(k, v):
        if not recent:
            return ops.quantize_pack(k, v, fmt)[0]
        if k.shape[2] > 1:
            return ops.quantize_pack(k, v, fmt, None, recent)[0]
        tail = ops.keep_exact(k, v, fmt, before(k.shape[0]), recent)
        if next(stored) % (n := min(recent, WAITING)):
            return tail
        return tail, ops.pack_rotated(tail[:, :, -n:], fmt)

    def dequantize(held, after):
        rows = held.cache.rows
        rows = mx.depends(rows, after) if after else rows
        return list(ops.restore(ops.Packed(rows, held.keys.shape[2], fmt), dtype))

    return LayerContender(
        name, lambda: [PackedKVCache(fmt)], dtype=dtype, store=store, dequantize=dequantize
    )


def _format(spec: Spec, heads: Heads) -> Format:
    """Like that of a model's layer: calibrated unless the spec says no, by numbers made up."""
    if spec.calibrate == "off":
        return make_format(spec, heads.dim)
    one = mx.ones((heads.kv, heads.dim))
    values = Calibration(mu=0 * one)
    keys = Calibration(mu=0 * one, sigma=one, metric=one[..., None] * mx.eye(heads.dim))
    fmt = make_format(spec, heads.dim, keys=keys, values=values)
    if spec.rounding == "auto" and ops.feeds_back(fmt):
        spec = replace(spec, rounding="feedback")
        fmt = make_format(spec, heads.dim, keys=keys, values=values)
    return fmt


def token_bytes(c: LayerContender, heads: Heads) -> int:
    """Bytes that one token takes in all KV heads of a buffer."""
    kv = mx.zeros((1, heads.kv, 2, heads.dim), c.dtype)
    return nbytes(c.store(kv, kv)) // 2


def fill(c: LayerContender, heads: Heads, B: int, T: int) -> Held:
    """A cache of ``B`` sequences and ``T`` random tokens: a prompt in chunks, padded as
    ``BatchGenerator`` pads it, then a few tokens one by one."""
    (cache,) = caches = c.batch(B)
    prompt = max(0, T - DECODED)
    # Every chunk is the same: no operation's time depends on the content.
    chunk = min(max(prompt, 1), CHUNK)
    k, v = random_pair(heads, B, chunk, c.dtype)
    with padded(caches, B, prompt):
        for done in range(0, prompt, CHUNK):
            L = min(CHUNK, prompt - done)
            cache.update_and_fetch(k[:, :, :L], v[:, :, :L])
            mx.eval(cache.state)
    del k, v
    q = mx.zeros((B, heads.queries, 1, heads.dim), c.dtype)
    for _ in range(T - prompt):
        one = random_pair(heads, B, 1, c.dtype)
        mask = base.create_attention_mask(mx.zeros((B, 1, 1)), cache)
        keys, values = cache.update_and_fetch(*one)
        held = Held(cache, keys, values, mask)
        mx.eval(c.attend(q + 1, held))  # as a step does: nothing asks for the state
    return held


def random(heads: int, B: int, L: int, D: int, dtype: mx.Dtype) -> mx.array:
    return mx.random.normal((B, heads, L, D)).astype(dtype)


def random_pair(heads: Heads, B: int, L: int, dtype: mx.Dtype) -> list[mx.array]:
    """Keys and values of ``L`` tokens."""
    return [random(heads.kv, B, L, heads.dim, dtype) for _ in range(2)]


def nbytes(arrays) -> int:
    """Bytes of a nest of arrays."""
    return sum(a.nbytes for a in leaves(arrays))


def leaves(arrays) -> list[mx.array]:
    """The arrays of a nest."""
    return list(dict(tree_flatten(arrays)).values())
