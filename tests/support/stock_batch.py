"""A packed batch cache and mlx-lm's own, given the same operations; see ``tests.support.stock``."""

import copy

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache

from mlx_kvq.caches.attention import packed_attention
from mlx_kvq.caches.batch import PackedBatchKVCache
from mlx_kvq.caches.batch_rotating import PackedBatchRotatingKVCache
from mlx_kvq.caches.single import PackedKVCache
from tests.support.stock import K_DIM, TOLERANCE, Pair, Tokens, _index, same_mask


class PaddedTokens(Tokens):
    """Tokens and, as the number ``count``, the zeros that a batch is padded with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("exact_k", "exact_v", "kept_k", "kept_v", "rows", "rotated", "rounded"):
            table = getattr(self, name)
            zero = np.zeros_like(table[:, :1])
            setattr(self, name, np.concatenate([table, zero], axis=1))
        self._by_key = _index(self.kept_k)
        self._by_row = _index(self.rows)


class BatchPair(Pair):
    """A packed batch cache and its stock counterpart.

    Args:
        tokens (PaddedTokens): What they are fed with.
        ours, stock: The two caches.
    """

    @classmethod
    def growing(  # type: ignore[override]
        cls, tokens: PaddedTokens, left_padding: list[int]
    ) -> "BatchPair":
        ours = PackedBatchKVCache(tokens.format, left_padding)
        return cls(tokens, ours, BatchKVCache(left_padding))

    @classmethod
    def rotating(  # type: ignore[override]
        cls, tokens: PaddedTokens, max_size: int, left_padding: list[int]
    ) -> "BatchPair":
        ours = PackedBatchRotatingKVCache(tokens.format, max_size, left_padding)
        stock = BatchRotatingKVCache(max_size, left_padding)
        return cls(tokens, ours, stock)

    @classmethod
    def merge(cls, pairs: list[Pair]) -> "BatchPair":
        """By the method of the single caches, as mlx-lm does."""
        ours = pairs[0].ours.merge([p.ours for p in pairs])
        # mlx-lm's rotating merge cannot take a cache that was trimmed to nothing.
        stocks = [p.stock if p.stock.size() else _emptied(p.stock) for p in pairs]
        pair = cls(pairs[0].tokens, ours, stocks[0].merge(stocks))
        if any(p.tails for p in pairs):
            pair.tails = pair._last([t for p in pairs for t in p.tails or [None]])
        if any(p.firsts for p in pairs):
            none = [-1] * pair.tokens.format.first
            pair.firsts = [
                list(none if p._lost_after_first() else p.firsts[0]) if p.firsts else list(none)
                for p in pairs
            ]
        pair.check()
        return pair

    def _last(self, tails: list[list | None]) -> list[list]:
        """Tails of one length, the longest. Of a ring that kept its first tokens, those before them
        come from rows: a batch does not know that others were between."""
        size, held = max(len(t) for t in tails if t), self._in_order()
        last = []
        for tail, ids in zip(tails, held, strict=True):
            tail = (tail or [])[-len(ids) :] if len(ids) else []  # no row is older
            tail = [(-1, False)] * (size - len(tail)) + tail
            for age in range(1, min(size, len(ids)) + 1):
                # Padding on the left, which nobody sees, or what filled up the right side: mlx-lm's
                # rotating batch may evict a token for that, which the tail still has.
                if ids[-age] in (self.tokens.count, self.filler):
                    tail[-age] = (-1, False)
                elif tail[-age][0] not in (-1, ids[-age]):
                    tail[-age] = (int(ids[-age]), False)
            last.append(tail)
        return last

    @property
    def filler(self) -> int:
        """The token that prompts are padded with on the right."""
        return self.tokens.count - 1

    @property
    def size(self) -> int:
        return self.stock.offset.shape[0]

    @property
    def sequences(self) -> list[int]:
        """Tokens of each sequence so far."""
        return self.stock.offset.tolist()

    def check(self) -> None:
        ours, stock = self.ours, self.stock
        for name in ("offset", "left_padding"):
            assert np.array_equal(getattr(ours, name), getattr(stock, name)), name
        for name in ("_idx", "_offset", "rotated", "max_size"):
            assert getattr(ours, name, None) == getattr(stock, name, None), name
        assert ours.size() == stock.size()
        assert ours.empty() == stock.empty()
        assert ours.is_trimmable() == stock.is_trimmable()
        if stock.empty():
            assert ours.nbytes == stock.nbytes == 0
            return
        assert ours.stored.array.shape[:3] == stock.keys.shape[:3]
        self._check_stored()

    def _first_places(self, T: int) -> list[tuple[int, int]]:
        return [(T - n, self.tokens.format.first) for n in self.sequences]

    def _order(self, T: int) -> np.ndarray:
        at = np.arange(T)
        return np.roll(at, -self.stock._idx) if getattr(self.stock, "rotated", False) else at

    def step(  # type: ignore[override]
        self, ids, ends: list[int] | None = None, **mask_arguments
    ) -> mx.array:
        """Mask, update, attend; only queries that may attend to something, and are no padding to
        the right, are compared.
        """
        B, L = np.shape(ids)
        mask = self.make_mask(L, **mask_arguments)
        views, held, exact = self.update(ids, ends)
        q = self.tokens.queries(B, L)
        out = packed_attention(q, *views, scale=K_DIM**-0.5, mask=mask)
        expected = self.expected(q, held, exact, mask)
        sees = np.array(mask).any(axis=-1) & self._real(ends, L)
        sees = np.broadcast_to(sees, (B, 1, L))[..., None]
        sees = np.broadcast_to(sees, expected.shape)
        assert out.dtype == q.dtype
        out = np.array(out.astype(mx.float32))
        assert np.isfinite(out).all()
        tolerance = TOLERANCE if q.dtype == mx.float32 else 2e-2
        np.testing.assert_allclose(out[sees], expected[sees], rtol=0, atol=tolerance)
        return mx.array(out)

    def _real(self, ends: list[int] | None, L: int) -> np.ndarray:
        """[B, 1, L]"""
        ends = [L] * self.size if ends is None else ends
        return np.arange(L) < np.array(ends)[:, None, None]

    def make_mask(self, N: int, **arguments):
        ours, stock = (cache.make_mask(N, **arguments) for cache in (self.ours, self.stock))
        same_mask(ours, stock)
        return ours

    def prompt(self, ids: list, chunk: int = 2048, *, attend: bool = True) -> None:
        """What the server does with prompts ids[i] of different lengths: right padding."""
        lengths = [len(i) for i in ids]
        longest = max(lengths)
        padding = [longest - n for n in lengths]
        padded = np.array([[*i, *[self.filler] * p] for i, p in zip(ids, padding, strict=True)])
        if max(padding):
            for cache in (self.ours, self.stock):
                cache.prepare(lengths=lengths, right_padding=padding)
        for at in range(0, longest, chunk):
            piece = padded[:, at : at + chunk]
            ends = [min(max(n - at, 0), piece.shape[1]) for n in lengths] if max(padding) else None
            _ = self.step(piece, ends) if attend else self.update(piece, ends)
        if max(padding):
            for cache in (self.ours, self.stock):
                cache.finalize()
        self.check()

    def filter(self, keep: list[int]) -> None:
        self.ours.filter(keep)
        self.stock.filter(keep)
        self.tails = self.tails and [self.tails[i] for i in keep]
        self.firsts = self.firsts and [self.firsts[i] for i in keep]
        self.check()

    def extend(self, other: "BatchPair") -> None:
        """``other`` is used up."""
        self.ours.extend(other.ours)
        sizes = [self.size, other.size]
        self.stock.extend(other.stock)
        if self.tails or other.tails:
            both = zip((self, other), sizes, strict=True)
            self.tails = self._last([t for p, n in both for t in p.tails or [None] * n])
        if self.firsts or other.firsts:
            none = [-1] * self.tokens.format.first
            both = zip((self, other), sizes, strict=True)
            self.firsts = [list(t) for p, n in both for t in p.firsts or [none] * n]
        self.check()

    def extract(self, i: int) -> Pair:
        """One sequence as a pair of single caches."""
        single = Pair(self.tokens, self.ours.extract(i), self.stock.extract(i))
        if self.stock.offset[i].item() == 0:  # mlx-lm's holds arrays of no token
            single.stock = _emptied(single.stock)
        elif self.tails:
            single.tails = [self.tails[i]]
        if self.firsts and self.stock.offset[i].item():
            single.firsts = [list(self.firsts[i])]
        single.check()
        return single

    def fork(self) -> "BatchPair":
        kept = self.ours, self.stock, self.tails, self.firsts
        copied = BatchPair(self.tokens, *copy.deepcopy(kept))
        copied.check()
        return copied

    def _whole(self) -> None:
        # mlx-lm's state leaves these out, and then they are missing.
        if isinstance(self.stock, BatchKVCache):
            self.stock._right_padding = None
        else:
            self.stock._lengths = None

    def state_round_trip(self) -> None:
        super().state_round_trip()
        self._whole()

    def save_and_load(self, path) -> None:
        super().save_and_load(path)
        self._whole()


def _emptied(stock):
    if isinstance(stock, RotatingKVCache):
        return RotatingKVCache(stock.max_size, stock.keep)
    return KVCache()


def same_kind(a: Pair, b: Pair) -> bool:
    """Whether the two may share a batch."""
    return (
        a.tokens is b.tokens
        and isinstance(a.ours, PackedKVCache) == isinstance(b.ours, PackedKVCache)
        and type(a.ours) is type(b.ours)
        and getattr(a.ours, "max_size", None) == getattr(b.ours, "max_size", None)
    )
