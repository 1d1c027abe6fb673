"""The caches a benchmark compares, filled as decoding fills them.

Attention is timed over what ``update_and_fetch`` of the cache class that users get returns: its
strides, its capacity, its mask. Which kernel runs depends on them. MLX on CUDA decodes through
cuDNN only where K and V are slices of buffers with a capacity that is a multiple of 256, each
filling one buffer, and where there is no array mask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from .. import ops
from ..caches import seams
from ..caches.packed import PENDING
from ..caches.single import PackedKVCache
from ..format.format import make_format
from ..format.spec import Spec

CHUNK = 2048  # tokens of a prompt that mlx-lm reads at once
DECODED = 4  # newest tokens of a cache, stored one by one
PADDING = 8  # sequences of a batch are up to so many tokens shorter than the longest
PLAIN = {"fp16": mx.float16, "bf16": mx.bfloat16, "fp32": mx.float32}
# A batch of one length in a KVCache, without a mask: no server has it, but fp16 is fastest so.
EVEN = "fp16-even"
GROUP = 64  # of mlx-lm's quantized cache


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
    """A cache that holds tokens, and what a decode step's attention is given of it.

    Args:
        cache: Of the class that users get.
        keys, values: What the last ``update_and_fetch`` returned.
        mask: The mask of that decode step: ``None``, or an array [B, 1, 1, T] of a batch.
    """

    cache: Any
    keys: Any
    values: Any
    mask: mx.array | None


@dataclass
class Contender:
    """One cache at one shape.

    Args:
        dtype: Of queries, keys and values.
        make: Makes an empty cache for one sequence.
        store: (k, v) [B, Hkv, L, D] -> arrays; what the cache computes of new tokens.
        dequantize: (held, after) -> keys and values as arrays, once ``after`` is computed;
            ``None`` where they are arrays already.
        merges: Whether a batch is in the merged cache of mlx-lm's ``BatchGenerator``.
    """

    dtype: mx.Dtype
    make: Callable[[], Any]
    store: Callable[[mx.array, mx.array], Any]
    dequantize: Callable[[Held, list], list] | None = None
    merges: bool = True

    def attend(self, q: mx.array, held: Held) -> mx.array:
        """Attention as mlx-lm's models call it, q [B, Hq, 1, D] -> [B, Hq, 1, D]."""
        return base.scaled_dot_product_attention(
            q, held.keys, held.values, held.cache, q.shape[-1] ** -0.5, held.mask
        )


def contender(name: str, heads: Heads, dtype: mx.Dtype) -> Contender:
    """``fp16``, ``bf16`` or ``fp32`` (plain arrays), ``fp16-even`` (sequences of one length without
    a mask), ``kv4`` or ``kv8`` (mlx-lm's, group 64), or a spec; the last two kinds with queries,
    keys and values of ``dtype``.

    Raises:
        ValueError: If ``name`` is none of these or cannot pack this head size.
    """
    if name in PLAIN:
        return Contender(PLAIN[name], KVCache, lambda k, v: (k, v))

    if name == EVEN:
        return Contender(mx.float16, KVCache, lambda k, v: (k, v), merges=False)

    if name in ("kv4", "kv8"):
        bits = int(name[2:])

        def store(k, v):
            return mx.quantize(k, GROUP, bits), mx.quantize(v, GROUP, bits)

        def back(held, after):
            k, v = held.keys, held.values
            if after:
                k = (mx.depends(k[0], after), *k[1:])
            return [mx.dequantize(w, s, b, group_size=GROUP, bits=bits) for w, s, b in (k, v)]

        return Contender(dtype, lambda: QuantizedKVCache(GROUP, bits), store, back)

    spec = Spec.parse(name)
    if spec is None:
        raise ValueError(f"{name!r} is no cache to compare.")
    seams.install()
    fmt = make_format(spec, heads.dim)
    recent = fmt.recent
    before: dict[int, tuple[mx.array, mx.array]] = {}  # batch size -> tail, pending rows

    def pack(k, v):
        if not recent:
            return ops.quantize_pack(k, v, fmt)[0]
        if k.shape[2] > 1:
            return ops.quantize_pack(k, v, fmt, None, recent)[0]
        if (B := k.shape[0]) not in before:
            tail = random(heads.kv, B, recent, 2 * heads.dim, dtype)
            rows = mx.zeros((B, heads.kv, min(recent, PENDING), fmt.layout.words), mx.uint32)
            mx.eval(tail, rows)
            before[B] = tail, rows
        tail, rows = before[B]
        pending = rows if rows.shape[2] > 1 else None
        return ops.quantize_pack(k, v, fmt, tail, recent, pending)

    def unpack(held, after):
        rows = held.cache.rows
        rows = mx.depends(rows, after) if after else rows
        return list(ops.restore(ops.Packed(rows, held.keys.shape[2], fmt), dtype))

    return Contender(dtype, lambda: PackedKVCache(fmt), pack, unpack)


def token_bytes(c: Contender, heads: Heads) -> int:
    """Bytes that one token takes in all KV heads of a buffer."""
    kv = mx.zeros((1, heads.kv, 2, heads.dim), c.dtype)
    return nbytes(c.store(kv, kv)) // 2


def make_cache(c: Contender, B: int) -> Any:
    """The empty cache of ``B`` sequences that users get: for a batch the merged one of mlx-lm's
    ``BatchGenerator``. A ``QuantizedKVCache`` has none (mlx-lm does not batch with ``kv_bits``)
    and holds the sequences itself."""
    cache = c.make()
    if B == 1 or not c.merges or not hasattr(cache, "merge"):
        return cache
    return cache.merge([c.make() for _ in range(B)])


def paddings(B: int, tokens: int) -> list[int]:
    """By how much each sequence of a batch is shorter than ``tokens``."""
    return [b % min(PADDING, tokens) for b in range(B)]


def fill(c: Contender, heads: Heads, B: int, T: int) -> Held:
    """A cache of ``B`` sequences and ``T`` random tokens: a prompt in chunks, padded as
    ``BatchGenerator`` pads it, then a few tokens one by one."""
    cache = make_cache(c, B)
    prompt = max(0, T - DECODED)
    n = min(max(prompt, 1), CHUNK)
    # Every chunk is the same: no operation's time depends on the content.
    k, v = (random(heads.kv, B, n, heads.dim, c.dtype) for _ in "kv")
    padding = paddings(B, prompt) if prompt and hasattr(cache, "prepare") else [0]
    if max(padding) > 0:
        cache.prepare(lengths=[prompt - p for p in padding], right_padding=padding)
    for done in range(0, prompt, CHUNK):
        L = min(CHUNK, prompt - done)
        cache.update_and_fetch(k[:, :, :L], v[:, :, :L])
        mx.eval(cache.state)
    if max(padding) > 0:
        cache.finalize()
        mx.eval(cache.state)
    del k, v
    q = mx.zeros((B, heads.queries, 1, heads.dim), c.dtype)
    for _ in range(T - prompt):
        one = [random(heads.kv, B, 1, heads.dim, c.dtype) for _ in "kv"]
        mask = base.create_attention_mask(mx.zeros((B, 1, 1)), cache)
        keys, values = cache.update_and_fetch(*one)
        held = Held(cache, keys, values, mask)
        mx.eval(c.attend(q + 1, held))  # as a step does: nothing asks for the state
    return held


def random(heads: int, B: int, L: int, D: int, dtype: mx.Dtype) -> mx.array:
    return mx.random.normal((B, heads, L, D)).astype(dtype)


def nbytes(arrays) -> int:
    """Bytes of a nest of arrays."""
    return sum(x.nbytes for x in leaves(arrays))


def leaves(arrays) -> list[mx.array]:
    """Its arrays."""
    return [arrays] if isinstance(arrays, mx.array) else [x for b in arrays for x in leaves(b)]
