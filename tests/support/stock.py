"""A packed cache and mlx-lm's own cache side by side, given the same operations.

The stock cache is fed what the packed one should remember of each token: quantized and
dequantized by the float64 oracle, back in the original domain. Every token is recognisable in
both, so after an operation the two must hold the same tokens in the same places.

Of the newest tokens, the exact tail, ``Pair.tails`` says what must be in it. Attention is compared
with a softmax in float64 over what each query must read: the token as it is, or what rows keep.
"""

import copy
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from mlx_kvq import ops
from mlx_kvq.caches import attention
from mlx_kvq.caches.attention import packed_attention
from mlx_kvq.caches.rotating import PackedRotatingKVCache
from mlx_kvq.caches.seams import rewind
from mlx_kvq.caches.single import PackedKVCache
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from tests.support import oracle

HEADS = 2  # KV heads
QUERY_HEADS = 4
K_DIM, V_DIM = 64, 32  # differ, so that keys taken for values show
TOLERANCE = 1e-4  # of attention in fp32
NUDGE = 1e-5  # far above fp32 round-off, far below a step of the codes


class Tokens:
    """Recognisable tokens: what a model computes for each, and what the cache keeps of it.

    Tokens near a rounding boundary are left out, so that every backend stores the same bytes.

    Args:
        spec (str): A spec string.
        calibrated (bool): Give the format random centres and scales.
        dtype (mx.Dtype): Of the model's keys and values.
        count (int): How many tokens.
    """

    def __init__(
        self,
        spec: str = "int4-srft",
        *,
        calibrated: bool = False,
        dtype: mx.Dtype = mx.float32,
        count: int = 2048,
    ):
        rng = np.random.default_rng(1)
        parsed = Spec.parse(spec)
        k_params, v_params = (
            _calibration(rng, D) if calibrated else (None, None, None) for D in (K_DIM, V_DIM)
        )
        self.format = make_format(
            parsed,
            K_DIM,
            V_DIM,
            keys=Calibration(*_arrays(k_params)) if calibrated else None,
            values=Calibration(*_arrays(v_params)) if calibrated else None,
        )
        self.dtype = dtype
        self.count = count
        lay = self.format.layout
        made = 3 * count
        sides = []
        clear = np.ones(made, bool)
        for D, bits, group, stream, params in (
            (K_DIM, lay.k_bits, lay.k_group, oracle.KEYS, k_params),
            (V_DIM, lay.v_bits, lay.v_group, oracle.VALUES, v_params),
        ):
            x = mx.array(rng.standard_normal((HEADS, made, D))).astype(dtype)
            way = (parsed.rotation, parsed.seed, stream, *params)
            y = oracle.forward(np.array(x.astype(mx.float32)), *way)
            if (kept := ops.tail_dtype(dtype)) != mx.float32:  # codes are made of what a tail has
                near = [_in(y + off, kept) for off in (-1e-6, 0.0, 1e-6)]
                clear &= (near[0] == near[2]).all(axis=(0, 2))
                y = near[1]
            codes, scales, y_hat = oracle.quantize(y, bits, group, parsed.scale)
            if bits == 4 and parsed.scale == "search":
                clear &= _decided(y, group)
            for nudged in (y - NUDGE, y + NUDGE, y * (1 - NUDGE), y * (1 + NUDGE)):
                c, s, _ = oracle.quantize(nudged, bits, group, parsed.scale)
                clear &= (c == codes).all(axis=(0, 2)) & (s == scales).all(axis=(0, 2))
            sides.append((np.array(x.astype(mx.float32)), oracle.backward(y_hat, *way), y, y_hat))
            sides.append((codes, scales))
        chosen = np.flatnonzero(clear)[:count]
        assert len(chosen) == count, f"{clear.sum()} of {made} tokens are clear, not {count}"

        k, k_quantized, v, v_quantized = ([a[:, chosen] for a in side] for side in sides)
        self.exact_k, self.exact_v = k[0], v[0]  # [H, count, D]
        self.kept_k, self.kept_v = k[1].astype(np.float32), v[1].astype(np.float32)
        # What a tail holds of a token that came in whole, and of one that came back from its row.
        self.rotated, self.rounded = (np.concatenate([k[i], v[i]], axis=-1) for i in (2, 3))
        self.rows = oracle.pack_row(*k_quantized, *v_quantized, lay.k_bits, lay.v_bits)
        self._by_key = _index(self.kept_k)
        self._by_row = _index(self.rows)
        self._queries = rng.standard_normal((4, QUERY_HEADS, 1024, K_DIM)).astype(np.float32)

    def exact(self, ids) -> tuple[mx.array, mx.array]:
        """What a model computes: ids [B, L] -> [B, H, L, Dk] and [B, H, L, Dv]."""
        k, v = (_take(t, ids).astype(self.dtype) for t in (self.exact_k, self.exact_v))
        return k, v

    def kept(self, ids) -> tuple[mx.array, mx.array]:
        """What the cache should remember of it, in the original domain, fp32."""
        return _take(self.kept_k, ids), _take(self.kept_v, ids)

    def queries(self, B: int, L: int) -> mx.array:
        """[B, Hq, L, Dk]"""
        return mx.array(self._queries[:B, :, :L]).astype(self.dtype)

    def ids_in_stock(self, keys: mx.array, values: mx.array) -> np.ndarray:
        """[B, T]: which tokens a stock cache's arrays hold, in order."""
        ids = _lookup(self._by_key, np.array(keys))
        assert (ids >= 0).all(), f"the stock cache holds what is no token: {ids.tolist()}"
        assert np.array_equal(keys, np.swapaxes(self.kept_k[:, ids], 0, 1))
        assert np.array_equal(values, np.swapaxes(self.kept_v[:, ids], 0, 1))
        return ids

    def check_rows(self, rows, ids: np.ndarray) -> None:
        """Assert that rows [B, H, T, W] are, word for word, those of the tokens ids [B, T]."""
        found = np.array(rows)
        assert found.dtype == np.uint32
        expected = np.swapaxes(self.rows[:, ids], 0, 1)
        if not np.array_equal(found, expected):
            # -1 is no token's row.
            assert _lookup(self._by_row, found).tolist() == ids.tolist()
            raise AssertionError("the tokens are right in the first head and wrong in another")


def _in(y: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """y rounded to ``dtype``, float64."""
    rounded = mx.array(y.astype(np.float32)).astype(dtype)
    return np.array(rounded.astype(mx.float32)).astype(np.float64)


class Pair:
    """A packed cache and its stock counterpart; every operation is checked on both.

    ``tails`` has, for each sequence, what the exact tail must hold, the newest token last: pairs
    of a token, -1 for none, and whether it is exact. ``None`` as long as there is no tail.
    ``firsts`` has, for each sequence, its first tokens that are kept exactly, -1 for one that is
    not.
    """

    def __init__(self, tokens: Tokens, ours, stock, tails: list[list] | None = None, firsts=None):
        self.tokens = tokens
        self.firsts: list[list[int]] | None = firsts
        self.ours = ours
        self.stock = stock
        self.tails = tails

    @classmethod
    def growing(cls, tokens: Tokens) -> "Pair":
        return cls(tokens, PackedKVCache(tokens.format), KVCache())

    @classmethod
    def rotating(cls, tokens: Tokens, max_size: int, keep: int = 0) -> "Pair":
        ours = PackedRotatingKVCache(tokens.format, max_size=max_size, keep=keep)
        return cls(tokens, ours, RotatingKVCache(max_size=max_size, keep=keep))

    def check(self) -> None:
        """Assert that both hold the same tokens and say the same of themselves."""
        ours, stock = self.ours, self.stock
        assert ours.offset == stock.offset
        assert ours.size() == stock.size()
        assert ours.empty() == stock.empty()
        assert ours.is_trimmable() == stock.is_trimmable()
        if stock.empty():
            assert ours.nbytes == stock.nbytes == 0
            return
        assert ours.stored.array.shape[2] == stock.keys.shape[2]  # capacity
        row, token = 4 * self.tokens.format.layout.words, 4 * (K_DIM + V_DIM)
        beside = sum(a.nbytes for a in (ours.tail, ours.oldest.array) if a is not None)
        assert (ours.nbytes - beside) * token == stock.nbytes * row
        self._check_stored()

    def _check_stored(self) -> None:
        """Assert that all tokens are there, without writing what waits to be written."""
        ids = self.tokens.ids_in_stock(*self.stock.keys_and_values())
        self.tokens.check_rows(self._rows()[:, :, : ids.shape[1]], ids)
        self._check_tail()
        self._check_first()
        if not self.ours.stored.count:
            self._check_views(self.ours.keys_and_values(), self.stock.keys_and_values())

    def _rows(self) -> np.ndarray:
        """All rows, those that wait in their places."""
        stored = self.ours.stored
        rows, n, at = np.array(stored.array), stored.count, stored.place
        if n:
            made = ops.pack_rotated(stored.waiting[:, :, -n:], self.ours.format)
            rows[:, :, at : at + n] = np.array(made)
        return rows

    def _check_tail(self) -> None:
        """Assert that the tail holds, number for number, what ``tails`` says."""
        tail, tokens = self.ours.tail, self.tokens
        if self.tails is None:
            assert tail is None
            return
        assert tail.dtype == ops.tail_dtype(tokens.dtype)
        ids, exact = (np.array([[e[i] for e in t] for t in self.tails]) for i in (0, 1))
        assert tail.shape == (*ids.shape[:1], HEADS, *ids.shape[1:], K_DIM + V_DIM)
        exact = exact[:, None, :, None]
        want = np.where(
            exact, *(np.swapaxes(t[:, ids], 0, 1) for t in (tokens.rotated, tokens.rounded))
        )
        known = np.broadcast_to((ids >= 0)[:, None, :, None], want.shape)
        rounding = {mx.float32: 2.0**-20, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}[tail.dtype]
        np.testing.assert_allclose(
            np.array(tail.astype(mx.float32))[known], want[known], rtol=rounding, atol=4e-6
        )

    def _check_first(self) -> None:
        """Assert that the first tokens are, number for number, what ``firsts`` says."""
        array, tokens = self.ours.oldest.array, self.tokens
        if self.firsts is None:
            assert array is None
            return
        assert array.dtype == ops.tail_dtype(tokens.dtype)
        ids = np.array(self.firsts)
        assert array.shape == (len(ids), HEADS, tokens.format.first, K_DIM + V_DIM)
        want = np.swapaxes(tokens.rotated[:, ids], 0, 1)
        known = np.broadcast_to((ids >= 0)[:, None, :, None], want.shape)
        rounding = {mx.float32: 2.0**-20, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}[array.dtype]
        np.testing.assert_allclose(
            np.array(array.astype(mx.float32))[known], want[known], rtol=rounding, atol=4e-6
        )

    def _add_to_firsts(self, ids, at: list[int], ends: list[int] | None) -> None:
        """New tokens ids [B, L], of which sequence i has ``ends[i]`` and the first one is at
        position at[i]."""
        if not (F := self.tokens.format.first):
            return
        self.firsts = self.firsts or [[-1] * F for _ in ids]
        for i, (new, n) in enumerate(zip(ids, at, strict=True)):
            end = len(new) if ends is None else ends[i]
            for column, token in enumerate(new[:end]):
                if 0 <= n + column < F:
                    self.firsts[i][n + column] = int(token)

    def _take_off_firsts(self) -> None:
        if self.firsts is not None:
            for tokens, left in zip(self.firsts, self.sequences, strict=True):
                tokens[max(0, left) :] = [-1] * len(tokens[max(0, left) :])

    def _lost_after_first(self) -> bool:
        """Whether tokens are missing after the first ones, which are there."""
        stock = self.stock
        return bool(getattr(stock, "keep", 0)) and stock.offset > stock.size()

    def _first_places(self, T: int) -> list[tuple[int, int]]:
        """Of each sequence, the place of its first token among T in their order, and how many are
        there, or have been."""
        stock, F = self.stock, self.tokens.format.first
        gone = stock.offset - T
        if gone > 0 and getattr(stock, "keep", 0):
            return [(0, min(F, stock.keep))] * len(self.firsts or ())
        return [(-gone, F)] * len(self.firsts or ())

    def _order(self, T: int) -> np.ndarray:
        """[T] where the stock cache has its tokens, the oldest first."""
        at, stock = np.arange(T), self.stock
        if isinstance(stock, RotatingKVCache) and stock._idx < min(stock.offset, T):
            return np.concatenate([at[: stock.keep], at[stock._idx :], at[stock.keep : stock._idx]])
        return at

    def _in_order(self) -> np.ndarray:
        """[B, T] tokens held, the oldest first."""
        ids = self.tokens.ids_in_stock(*self.stock.keys_and_values())
        return ids[:, self._order(ids.shape[1])]

    @property
    def sequences(self) -> list[int]:
        """Tokens of each sequence so far; below 0 while there is only padding."""
        return [self.stock.offset] * len(self.tails or self.firsts or [1])

    def _reach(self) -> int:
        """Tokens before its own that a query may see."""
        return getattr(self.stock, "max_size", attention.BLOCK + 1) - 1

    def _add_to_tails(self, ids, ends: list[int] | None = None) -> list[list] | None:
        """New tokens ids [B, L], of which sequence i has ``ends[i]``; what they attend over. Call
        it before the stock cache is updated."""
        fmt, L = self.tokens.format, len(ids[0])
        if not fmt.recent:
            return None
        recent = fmt.recent_at(getattr(self.stock, "max_size", None) or self.stock.size() + L)
        if self.tails and len(self.tails[0]) < recent:
            self._lengthen_tails(self.tails, recent)
        before = self.tails or [[(-1, False)] * recent] * len(ids)
        given = [L] * len(ids) if ends is None else ends
        if L <= 8:
            keep = recent + L - 1
        else:
            at = self.sequences if self.tails else (self.sequences * len(ids))[: len(ids)]
            into = max(max(0, p + n) % attention.BLOCK for p, n in zip(at, given, strict=True))
            keep = max(recent, min(into, self._reach()))
        if self.tails:
            keep = min(keep, len(before[0]) + L)
        else:
            before = [[(-1, False)] * max(recent, keep)] * len(ids)
        made = [t + [(int(i), True) for i in new] for t, new in zip(before, ids, strict=True)]
        self.tails = [t[: len(t) - L + n][-keep:] for t, n in zip(made, given, strict=True)]
        self.tails = [[(-1, False)] * (keep - len(t)) + t for t in self.tails]
        return made

    def _take_off_tails(self, n: int) -> None:
        """Take off the n newest tokens; what is lacking then comes back from rows."""
        if n:
            self._take_off_firsts()
        if n and not self.stock.size():
            self.firsts = None
        if self.tails is None or n == 0:
            return
        if not self.stock.size():
            self.tails = None
            return
        left = [tail[: max(0, len(tail) - n)] for tail in self.tails]
        self._lengthen_tails(left, self.tokens.format.recent)

    def _lengthen_tails(self, tails: list[list], recent: int) -> None:
        """Make these the tails, of at least ``recent`` tokens: the oldest come back from rows."""
        held = self._in_order()
        self.tails = list(tails)
        for b, tail in enumerate(tails):
            older = [(-1, False)] * recent
            begin = self.firsts[b] if self.firsts else []
            older += [(int(i), i in begin) for i in held[b, : max(0, held.shape[1] - len(tail))]]
            lacking = max(0, recent - len(tail))
            self.tails[b] = older[len(older) - lacking :] + tail

    def _exact(
        self, ids: np.ndarray, tails: list[list] | None, L: int, at: list[int]
    ) -> np.ndarray:
        """[B, L, T], of tokens ids [B, T] as they lie: what the last L of them, of which sequence
        b's first is at position at[b], read exactly.

        Up to 8 queries read the ``recent_at`` tokens up to their own, and what is after it. Of a
        prompt each token reads its own block, as far as that is in the chunk or in the tail.
        """
        B, T = ids.shape
        exact = np.zeros((B, L, T), bool)
        order = self._order(T)
        for b, (place, count) in enumerate(self._first_places(T) if self.firsts else ()):
            for t, token in enumerate(self.firsts[b][:count], place):
                if token >= 0 and 0 <= t < T and ids[b, order[t]] == token:
                    exact[b, :, order[t]] = True
        if tails is None:
            return exact
        ring = isinstance(self.stock, RotatingKVCache) and self.stock.keep
        keep = self.stock.keep if ring and self.stock.offset > T else 0
        queries, fmt = np.arange(L), self.tokens.format
        for b, tail in enumerate(tails):
            limit = getattr(self.stock, "max_size", None)
            recent = np.array([fmt.recent_at(limit or int(n)) for n in at[b] + queries + 1])
            begins = (at[b] + queries) // attention.BLOCK * attention.BLOCK
            known = True
            for age, (token, whole) in enumerate(reversed(tail[-(T - keep) :])):
                where = order[T - 1 - age]
                known = known and whole
                if L <= 8:
                    if whole and ids[b, where] == token:
                        exact[b, :, where] |= age < L - 1 - queries + recent
                elif known:
                    exact[b, :, where] |= at[b] + L - 1 - age >= begins
        return exact

    def expected(
        self, q: mx.array, ids: np.ndarray, exact: np.ndarray, mask, sinks: mx.array | None = None
    ) -> np.ndarray:
        """Attention in float64 of q [B, Hq, L, Dk] over tokens ids [B, T], of which each query
        reads those of exact [B, L, T] as they are, and of the others what their rows keep."""
        tokens, exact = self.tokens, exact[:, None]

        def both(a, b):
            tables = (np.swapaxes(t[:, ids], 0, 1).astype(np.float64) for t in (a, b))
            return [np.repeat(t, QUERY_HEADS // HEADS, axis=1) for t in tables]

        q = np.array(q.astype(mx.float32)).astype(np.float64)
        L, T = q.shape[2], ids.shape[1]
        (ke, kk), (ve, vk) = (
            both(tokens.exact_k, tokens.kept_k),
            both(tokens.exact_v, tokens.kept_v),
        )
        logits = [q @ k.swapaxes(-1, -2) * K_DIM**-0.5 for k in (ke, kk)]
        logits = np.where(exact, *logits)
        if isinstance(mask, str):
            mask = np.arange(T) <= np.arange(T - L, T)[:, None]
        if mask is not None:
            logits = np.where(np.array(mask), logits, -1e30)
        sink = np.full((QUERY_HEADS, 1, 1), -np.inf) if sinks is None else np.array(sinks)
        sink = sink.reshape(QUERY_HEADS, 1, 1)
        largest = np.maximum(logits.max(axis=-1, keepdims=True), sink)
        p = np.exp(logits - largest)
        p /= p.sum(axis=-1, keepdims=True) + np.exp(sink - largest)
        return (p * exact) @ ve + (p * ~exact) @ vk

    def _check_views(self, views, arrays) -> np.ndarray:
        for view, array in zip(views, arrays, strict=True):
            assert view.shape == array.shape
            assert view.length == array.shape[2]
            assert view.dtype == self.tokens.dtype
        ids = self.tokens.ids_in_stock(*arrays)
        length, rows = views[0].length, self._rows()
        self.tokens.check_rows(rows[:, :, :length], ids)
        # What a view does not have yet is in the tail.
        (lacking,) = np.nonzero(
            (np.array(views[0].rows) != rows)[:, :, :length].any(axis=(0, 1, 3))
        )
        order = self._order(length).tolist()
        recent = self.tokens.format.recent
        assert all(length - order.index(at) <= recent for at in lacking)
        return ids

    def tokens_held(self) -> list[list[int]]:
        return self.tokens.ids_in_stock(*self.stock.keys_and_values()).tolist()

    def update(self, ids, ends: list[int] | None = None):
        """Append the tokens ids [B, L], of which sequence i has ``ends[i]``, the others being
        padding -> the views to attend over, the tokens in them [B, T], and what each of the new
        ones must read exactly [B, L, T]."""
        at = (self.sequences * len(ids))[: len(ids)]
        views = self.ours.update_and_fetch(*self.tokens.exact(ids))
        made = self._add_to_tails(ids, ends)
        self._add_to_firsts(ids, at, ends)
        arrays = self.stock.update_and_fetch(*self.tokens.kept(ids))
        held = self._check_views(views, arrays)
        exact = self._exact(held, made, len(ids[0]), at)
        self.check()
        return views, held, exact

    def make_mask(self, N: int, **arguments):
        """The mask of both for the next N tokens."""
        # The stock growing cache takes no default for its arguments; models always give them.
        arguments = {"return_array": False, "window_size": None} | arguments
        ours, stock = (cache.make_mask(N, **arguments) for cache in (self.ours, self.stock))
        same_mask(ours, stock)
        return ours

    def step(self, ids, sinks: mx.array | None = None, **mask_arguments) -> mx.array:
        """What a model's layer does: mask, update, attend; the output [B, Hq, L, Dv]."""
        B, L = np.shape(ids)
        mask = self.make_mask(L, **mask_arguments)
        views, held, exact = self.update(ids)
        q = self.tokens.queries(B, L)
        out = packed_attention(q, *views, scale=K_DIM**-0.5, mask=mask, sinks=sinks)
        expected = self.expected(q, held, exact, mask, sinks)
        assert out.dtype == q.dtype
        assert out.shape == expected.shape
        tolerance = TOLERANCE if q.dtype == mx.float32 else 2e-2
        np.testing.assert_allclose(
            np.array(out.astype(mx.float32)), expected, rtol=0, atol=tolerance
        )
        return out

    def trim(self, n: int) -> int:
        """Trim as mlx-lm does, which asks ``is_trimmable`` first."""
        trimmed: int = trim_prompt_cache([self.ours], n)
        assert trimmed == trim_prompt_cache([self.stock], n)
        self._take_off_tails(trimmed)
        self.check()
        return trimmed

    def speculate(self, ids, n: int) -> None:
        """Append the tokens ids [1, L] and take the last n < L back, also where mlx-lm cannot: its
        cache is then given the chunk without them."""
        before = copy.deepcopy(self.stock)
        self.step(ids)
        if self.stock.is_trimmable():
            self.stock.trim(n)
        else:
            before._update_concat(*self.tokens.kept(np.asarray(ids)[:, : len(ids[0]) - n]))
            self.stock = before
        assert rewind([self.ours], n) == n
        self._take_off_tails(n)
        self.check()

    def fork(self) -> "Pair":
        kept = self.ours, self.stock, self.tails, self.firsts
        copied = Pair(self.tokens, *copy.deepcopy(kept))
        copied.check()
        return copied

    def state_round_trip(self) -> None:
        self.ours = type(self.ours).from_state(self.ours.state)
        self.stock = type(self.stock).from_state(self.stock.state)
        self.check()

    def save_and_load(self, path) -> None:
        """Through one file; mlx-lm must know the packed classes by name."""
        kinds = [type(self.ours), type(self.stock)]
        save_prompt_cache(str(path), [self.ours, self.stock])
        self.ours, self.stock = load_prompt_cache(str(path))
        assert [type(self.ours), type(self.stock)] == kinds
        self.check()


def same_mask(ours, stock) -> None:
    if not isinstance(stock, mx.array):
        assert type(ours) is type(stock)
        assert ours == stock
        return
    assert isinstance(ours, mx.array)
    assert ours.dtype == stock.dtype
    assert ours.shape == stock.shape
    assert np.array_equal(ours, stock)


def _decided(y: np.ndarray, group: int) -> np.ndarray:
    """[count], of tokens y [H, count, D], which all backends try the same scale for."""
    groups = y.reshape(*y.shape[:2], -1, group)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    found = [oracle._encode(groups, c * largest / 7.5, 4, "search") for c in oracle.tried(group)]
    first, second = (oracle._cosine(groups, n) for n in found)
    alike = (found[0] == found[1]).all(axis=-1, keepdims=True)
    return (alike | (abs(first - second) > 1e-6)).all(axis=(0, 2, 3))


def _calibration(rng, D: int) -> tuple[np.ndarray, ...]:
    mu = rng.standard_normal((HEADS, D))
    sigma, lam = np.exp(rng.uniform(-0.7, 0.7, (2, HEADS, D)))
    return tuple(a.astype(np.float32) for a in (mu, sigma, lam))


def _arrays(params: Sequence[np.ndarray | None]) -> list[mx.array | None]:
    return [None if a is None else mx.array(a) for a in params]


def _take(table: np.ndarray, ids) -> mx.array:
    return mx.array(np.swapaxes(table[:, np.asarray(ids)], 0, 1))


def _index(table: np.ndarray) -> dict[bytes, int]:
    """[H, count, n] -> the number of a token by its first head's bytes."""
    index = {token.tobytes(): i for i, token in enumerate(table[0])}
    assert len(index) == table.shape[1], "two tokens look the same"
    return index


def _lookup(index: dict[bytes, int], x: np.ndarray) -> np.ndarray:
    """[B, H, T, n] -> [B, T]; -1 for what is no token."""
    ids = [[index.get(token.tobytes(), -1) for token in sequence[0]] for sequence in x]
    return np.array(ids, np.int64).reshape(x.shape[0], x.shape[2])
