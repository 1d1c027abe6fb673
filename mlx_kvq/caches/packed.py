"""What packed caches share: mlx-lm's protocol over :class:`Rows`, :class:`Tail` and
:class:`FirstTokens`."""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

from .. import ops
from ..format.format import Format, parse_signature
from . import attention
from .attention import DECODE_QUERIES
from .first import FirstTokens
from .rows import Rows
from .tail import Tail
from .view import PackedView

_NAMES = {mx.float16: "float16", mx.bfloat16: "bfloat16", mx.float32: "float32"}


class Merge:
    """``merge`` of a single cache: a batch of copies of such. Caches of a model that fails in a
    batch have none, by which mlx-lm's server knows to answer one request at a time."""

    batch: Any = None  # its class, set by :func:`batch_of`

    def __get__(self, cache, owner):
        if self.batch is None or cache is not None and cache.alone:
            raise AttributeError("this model does not run in a batch")
        return self.batch.merge


def batch_of(single: Any) -> Callable[[type], type]:
    """Declares the decorated class the batch of the class ``single``."""

    def declared(batch: type) -> type:
        vars(single)["merge"].batch = batch
        return batch

    return declared


class PackedCache(_BaseCache, ABC):
    """What single and batched, growing and rotating caches share.

    Args:
        fmt (Format): From :func:`mlx_kvq.format.format.make_format`.
        sequences (int): Of the batch.

    Attributes:
        stored (Rows): The packed rows of all tokens.
        newest (Tail): The exact tail, and how each sequence was read.
        oldest (FirstTokens): The exact first tokens.
        reading (int): Tokens of a prompt that are still to come (``prompts``). A chunk of more than
            ``DECODE_QUERIES`` tokens is one of a prompt in any case.
        as_arrays (bool): For a model that computes its attention itself: keys and values as arrays,
            unpacked one layer at a time.
        alone (bool): For a model that does not run in a batch.
        model (str): Identity of the model it was made for, if known.
        tokens (array): Ids of the first tokens that it holds, as many as were noted (``prompts``).
    """

    step = 256  # rows by which it grows, as in mlx-lm
    numbers: tuple[str, ...] = ()  # attributes that a saved cache has besides
    alone = False
    reading = 0
    tokens = array("q")  # never changed in place
    _prompted = False  # whether the last update was a chunk of a prompt
    # Of each sequence of a batch, its tokens once chunks with padding on the right are read.
    _lengths: list[int] | None = None

    def __init__(self, fmt: Format, sequences: int = 1):
        self.format = fmt
        self.stored, self.newest, self.oldest = Rows(fmt), Tail(fmt, sequences), FirstTokens(fmt)
        self.as_arrays = False
        self.model = ""
        self._dtype = "float16"  # a name, because mx.Dtype cannot be copied

    @property
    def dtype(self) -> mx.Dtype:
        """Of the model's keys and values."""
        return getattr(mx, self._dtype)

    @property
    def rows(self) -> mx.array | None:
        """The packed rows of all tokens, uint32 [B, Hkv, capacity, W]."""
        return self.stored.whole()

    @rows.setter
    def rows(self, rows: mx.array | None) -> None:
        self.stored = Rows(self.format, rows)

    keys = rows  # mlx-lm's pipeline-parallel models tie a send to the cache through this name

    @property
    def tail(self) -> mx.array | None:
        """The exact tail, rotated, [B, Hkv, R, Dk + Dv]."""
        return self.newest.array

    @property
    def prompt(self) -> list[int]:
        return self.newest.prompt

    @property
    def exact(self) -> list[int]:
        return self.newest.exact

    # mlx-lm routes caches that have these two to quantized attention.
    @property
    def bits(self) -> int:
        if self.as_arrays:
            raise AttributeError("a cache that returns arrays has no bits")
        return self.format.layout.k_bits

    @property
    def group_size(self) -> int:
        return self.format.layout.k_group

    @abstractmethod
    def _length(self) -> int:
        """Rows that hold tokens."""

    @abstractmethod
    def _positions(self, L: int = 0) -> list[int]:
        """Of the next token of each sequence, after L more rows; below 0 in padding."""

    @abstractmethod
    def _next_positions(self) -> tuple[list[int], list[int] | None]:
        """Of the next row of each sequence, below 0 in padding; and those at which padding on the
        right begins, if there is any."""

    def _first(self) -> ops.First | None:
        """The exact first tokens, where they are in the order of the rows' tokens."""
        return self.oldest.seen(self.format.first, 0)

    def _counts(self, L: int) -> list[int]:
        """Of L new rows, those of tokens of each sequence."""
        return [L]

    def _ring(self) -> tuple[int, int] | None:
        """Where the rows of a rotating cache begin (``ops.Packed``)."""
        return None

    def _reach(self) -> int:
        """Tokens before its own that a query may see."""
        limit = self._limit()
        return limit - 1 if limit else attention.BLOCK

    def _limit(self) -> int:
        """Tokens that a rotating cache keeps; 0 of a growing one."""
        return 0

    def _held(self, L: int = 0) -> int:
        """Rows of a growing cache after L more."""
        return L + (0 if self.empty() else self._length())

    def _in_place(self, L: int) -> bool:
        """Whether L new rows go to where there is room, one by one."""
        return L == 1 and not self.reading

    # An update: pack the new tokens, or let one wait, put rows where they belong, return views.

    def _next(self, keys: mx.array, values: mx.array, at: int) -> bool:
        """Keep the token of a usual decode step, which waits for row ``at`` with others before and
        after it: as :meth:`_pack` and ``Rows.write``, in less of the host's time. False where they
        must do it."""
        rows, tail = self.stored, self.newest
        if not rows.goes_on(at) or (old := tail.array) is None:
            return False
        if not self._in_place(keys.shape[2]) or at + 1 >= tail.until:
            return False
        if self.oldest.filling or old.dtype != ops.tail_dtype(keys.dtype):
            return False
        tail.array = ops.keep_exact(keys, values, self.format, old, tail.recent)
        rows.waiting, rows.count = tail.array, rows.count + 1
        if tail.filling:
            tail.got(tail.recent, self._counts(1))
        return True

    def _pack(
        self, keys: mx.array, values: mx.array, tokens: int | None = None
    ) -> tuple[mx.array, dict]:
        """Rows of new tokens, or the tail from which the one new token will be packed
        (``Rows.write``), and what :class:`PackedView` takes of them; moves the tail on.

        Rows that do not fit into a growing array after ``tokens`` ones come with zeros for more.
        """
        fmt, tail, L = self.format, self.newest, keys.shape[2]
        self._prompted = L > DECODE_QUERIES or self.reading > 0
        self._dtype = _NAMES.get(keys.dtype, self._dtype)
        if not fmt.recent:
            rows = ops.quantize_pack(keys, values, fmt)[0]  # which checks them
            self._read_first(keys, values)
            return rows, {}
        if tail.array is not None and tail.array.dtype != (dtype := ops.tail_dtype(keys.dtype)):
            tail.array = tail.array.astype(dtype)
            if self.oldest.array is not None:
                self.oldest.array = self.oldest.array.astype(dtype)
        tail.reach(self._held(L), self._limit(), self._in_order, self._first)
        old, new = tail.array, self._counts(L)
        before = tail.recent if old is None else tail.size
        size = self._tail_size(L)
        if old is not None:
            size = min(size, before + L)
        made = size if self._lengths is None else before + L
        all_new: mx.array | None
        if old is not None and self._waits(L):
            rows = all_new = ops.keep_exact(keys, values, fmt, old, made)
        else:
            capacity = None if tokens is None else self.stored.growth(tokens, L, self.step)
            if old is None and self.oldest.begins(L, *self._next_positions()):
                rows, all_new, first = ops.pack_start(keys, values, fmt, made, capacity)
                self.oldest.got(first)
            else:
                rows, all_new = ops.quantize_pack(keys, values, fmt, old, made, capacity)
        self._read_first(keys, values)
        tail.array = all_new
        if self._lengths is not None:
            tail.without_padding(L, size, new)
        if not self._prompted or self.as_arrays:
            tail.got(size, new)
            return rows, {"tail": all_new}
        places = self._places(new)
        tail.got(size, new)
        return rows, {"tail": old, "chunk": (keys, values), "places": places}

    def _read_first(self, keys: mx.array, values: mx.array) -> None:
        if self.oldest.filling:
            self.oldest.read(keys, values, *self._next_positions())

    def _waits(self, L: int) -> bool:
        """Whether L tokens after others may wait to be packed: attention reads them from the tail
        until then."""
        return self._in_place(L) and self.format.recent > 1 and not self.as_arrays

    def _places(self, new: list[int]) -> tuple[tuple[int, int], ...]:
        """Where a chunk with ``new`` tokens of each sequence begins (:class:`PackedView`); notes
        which sequences it goes on with as with all of a prompt."""
        places, tail, reach = [], self.newest, self._reach()
        for i, at in enumerate(self._positions()):
            into = at % attention.BLOCK
            known = min(into, tail.exact[i])
            if tail.prompt[i] == max(at, 0) and (at < 0 or known >= min(into, reach)):
                tail.prompt[i] += new[i]
            places.append((into, known))
        if all(new):
            return tuple(places)
        # Nobody reads what comes out of padding: it need not be worked on apart.
        real = next((p for p, n in zip(places, new, strict=True) if n), places[0])
        return tuple(p if n else real for p, n in zip(places, new, strict=True))

    def _tail_size(self, L: int) -> int:
        """Tokens that the tail keeps after L more rows."""
        recent = self.newest.recent
        if not self._prompted:
            # Each of a few tokens reads `recent` of them, and then all but one may be taken back.
            return recent + L - 1
        return recent if self.as_arrays else self.tail_after_prompt(L)

    def tail_after_prompt(self, L: int = 0) -> int:
        """Tokens of the tail if a chunk of a prompt ends L rows from here: those that decoding
        reads, or the unfinished block."""
        ends = [max(0, end) % attention.BLOCK for end in self._positions(L)]
        recent = self.reads(self._held(L))
        return max(recent, min(max(ends, default=0), self._reach()))

    def _updated(self, L: int, view: dict, *more: mx.array) -> tuple:
        """The end of an update: with what attention reads, everything is evaluated that a step may
        leave unread, ``more`` too."""
        self.reading = max(0, self.reading - L)
        tail, chunk = self.tail, view.get("chunk", ())
        decodes = view.get("tail") is tail
        if self.oldest.changed and self.oldest.array is not None:
            more = (*more, self.oldest.array)
            self.oldest.changed = False
        if tail is not None:
            # Attention on a chunk reads neither its rows nor the new tail.
            self.newest.array, *chunk = mx.depends([tail, *chunk], [self.stored.filled(), *more])
        elif more:
            (self.stored.array,) = mx.depends([self.stored.filled()], [*more])
        if chunk:
            view["chunk"] = tuple(chunk)
        elif decodes:
            view["tail"] = self.tail
        return self._fetch(**view)

    def _fetch(
        self,
        tail: mx.array | None = None,
        chunk: tuple[mx.array, mx.array] | None = None,
        places: tuple[tuple[int, int], ...] = ((0, 0),),
    ) -> tuple:
        """What attention gets of an update (:class:`PackedView`)."""
        if self.as_arrays:
            return self._arrays(tail)
        rows, lay, ring = self.stored.filled(), self.format.layout, self._ring()
        shared = rows, self._length(), self.format, tail, ring, self._first(), self._dtype
        first = second = PackedView(*shared, lay.k_dim)
        if lay.k_dim != lay.v_dim:
            second = PackedView(*shared, lay.v_dim)
        if chunk is not None:
            first.chunk, first.places = chunk, places
        if limit := self._limit():
            first.recent = self.format.recent_at(limit)
            if ring is not None:
                first.max_size = limit
        return first, second

    def _arrays(self, tail: mx.array | None) -> tuple[mx.array, mx.array]:
        """What the views stand for, in the model's own domain. Of a prompt all comes from rows: one
        array cannot have a token exact for some queries and not for others."""
        rows, length, fmt = self.stored.written(), self._length(), self.format
        keep, idx = self._ring() or (0, length)
        # In a ring that keeps no token the first ones have gone, or are among padding.
        begin = self._first() if idx == length or keep else None
        n = 0 if self._prompted or tail is None else min(length - keep, tail.shape[2])
        last = tail[:, :, -n:] if tail is not None and n > 0 else None
        if last is None or idx == length:
            return ops.restore(ops.Packed(rows, length, fmt, last, None, begin), self.dtype)
        # The newest tokens are before row idx, and before them those at the end.
        n = min(self.reads(length), length - keep)
        here = min(n, idx - keep)
        k, v = ops.restore(ops.Packed(rows, length, fmt, None, None, begin), self.dtype)
        exact = ops.restore(ops.Packed(rows, n, fmt, last[:, :, -n:]), self.dtype)
        for x, y in zip((k, v), exact, strict=True):
            x[:, :, idx - here : idx] = y[:, :, n - here :]
            x[:, :, length - (n - here) : length] = y[:, :, : n - here]
        return k, v

    def keys_and_values(self) -> tuple:
        """For layers that read another layer's cache: of a prompt all from rows."""
        self.stored.whole()
        return self._fetch(None if self._prompted else self.tail)

    def _nothing(self, keys: mx.array) -> tuple:
        """An update by no tokens."""
        if self.stored.array is None:
            self.rows = mx.zeros((*keys.shape[:2], 0, self.format.layout.words), mx.uint32)
        return self._fetch(self.tail)

    # What is taken back, and where a prompt may go on.

    def _drop(self, n: int, length: int) -> None:
        """Take the newest n tokens off the tail. ``length`` rows are left, in the order of their
        tokens."""
        if n:
            self.tokens = self.tokens[:length]
            self.oldest.filling = self.format.first > 0
            left = [max(0, at) for at in self._positions()]
            self.newest.drop(n, left, self.stored, length, self._first())
            if length == 0:
                self.oldest.array = None
            self._start()

    def _start(self) -> None:
        """Begin to evaluate what was changed outside of a model's step: later steps, perhaps in
        another thread, find it done."""
        own = [a for a in vars(self).values() if isinstance(a, mx.array)]
        rows = self.stored.array, self.stored.waiting, self.newest.array, self.oldest.array
        mx.async_eval(own + [a for a in rows if a is not None])

    def reads(self, tokens: int) -> int:
        """Newest tokens that the last of ``tokens`` reads exactly."""
        return self.format.recent_at(self._limit() or tokens)

    def goes_on(self, at: int, end: int) -> bool:
        """Whether tokens ``at`` to ``end`` of a prompt find what they would if it were read at
        once: all before were read as a prompt, and what is to be read exactly is in the tail."""
        needed = max(0, min(at, self.reads(end) - (end - at)))  # by the last token
        if end - at > 1:
            needed = max(needed, min(at % attention.BLOCK, self._reach()))
        return at < end and self.prompt[0] >= at and self.exact[0] >= needed

    def has_decoded(self, at: int) -> bool:
        """Whether the last of ``at`` tokens was decoded, and none was taken back since."""
        return self.prompt[0] < at and self.exact[0] >= min(at, self.format.recent)

    # Between single caches and batches.

    def _for_batch(self) -> tuple[int, int]:
        """``prompt`` and ``exact`` in a batch."""
        return self.prompt[0], self.exact[0]

    def _last(self, B: int, size: int, heads: int, dtype: mx.Dtype) -> mx.array:
        """The last ``size`` tokens, for a batch."""
        return self.newest.last(B, size, heads, dtype)

    def _begins(self) -> mx.array:
        """Where each sequence begins in :meth:`_in_order`, int32 [B]."""
        return mx.zeros((1,), mx.int32)

    @abstractmethod
    def _in_order(self) -> mx.array:
        """Rows in the order of their tokens, without an unused end."""

    def _first_for_batch(self, B: int, heads: int, size: int, dtype: mx.Dtype) -> mx.array:
        """The first ``size`` tokens, for a batch; without a token, what nobody reads."""
        if self.empty() or not self._length():
            lay = self.format.layout
            return mx.zeros((B, heads, size, lay.k_dim + lay.v_dim), ops.tail_dtype(dtype))
        return self.oldest.of(size, self._in_order(), self._begins(), dtype)

    def adopt(self, fmt: Format) -> None:
        """Keep as many first tokens exactly as ``fmt``, another format for the same rows, says, and
        no more of the newest ones than it does. First ones that were not are taken from rows."""
        same_first = fmt.first == self.format.first
        if fmt.recent < self.format.recent:
            self.format = self.newest.format = self.stored.format = self.oldest.format = fmt
        if same_first:
            return
        array = None
        if fmt.first and not self.empty() and self._length():
            B, heads = self.stored.filled().shape[:2]
            array = self._first_for_batch(B, heads, fmt.first, self.dtype)
        self.format, self.oldest = fmt, FirstTokens(fmt)
        self.newest.format = self.stored.format = fmt
        self.oldest.array = array
        self._start()

    def _made_like(self, other: "PackedCache"):
        self.as_arrays, self.model, self._dtype = other.as_arrays, other.model, other._dtype
        return self

    # What a saved cache consists of: rows, ``numbers``, and what says what they are.

    @property
    def state(self) -> tuple:
        fmt = self.format
        numbers = [getattr(self, name) for name in self.numbers]
        state = [self.as_arrays, self.model, self._dtype, fmt.signature, fmt.arrays]
        if fmt.recent:
            state += [self.prompt, self.exact, self.tail]
        if fmt.first:
            state += [self.oldest.array]
        return self.rows, *numbers, *state

    @state.setter
    def state(self, v) -> None:
        n = 1 + len(self.numbers)
        self.tokens = array("q")
        for name, value in zip(self.numbers, v[1:n], strict=True):
            setattr(self, name, value)
        self._restored()
        self.as_arrays, self.model, dtype, signature, arrays, *more = v[n:]
        if dtype not in _NAMES.values():
            raise ValueError(f"The cache's dtype is {dtype!r}, which is not one of a model.")
        self._dtype = dtype
        self.format = parse_signature(signature, arrays)
        words = self.format.layout.words
        self.rows = rows = v[0]
        if rows is not None and (
            rows.dtype != mx.uint32 or rows.ndim != 4 or rows.shape[3] != words
        ):
            raise ValueError(
                f"The cache holds {rows.dtype} {rows.shape}, not the uint32 rows of "
                f"{words} words that {signature!r} describes."
            )
        self.newest, self.oldest = tail, first = Tail(self.format), FirstTokens(self.format)
        if self.format.first:  # what a cache without a token has not is not in its file
            more = [*more, *[None] * (3 * (self.format.recent > 0) + 1 - len(more))]
            first.array = more.pop()
        # Files of version 0.1.0 do not say what was read how.
        more = [*more, None] if len(more) > 1 else [[], [], *more, None]
        tail.prompt, tail.exact, tail.array = more[:3]
        if not isinstance(getattr(self, "offset", 0), str | float):  # which the loader refuses
            held = rows if rows is not None and self._length() > 0 else None
            tail.check(held, self.dtype, [max(0, p) for p in self._positions()])
            first.check(held, self.dtype)
        mx.async_eval([a for a in arrays or () if a is not None])
        self._start()  # a file is read when its arrays are evaluated

    def _restored(self) -> None:
        """Called when ``numbers`` were read from a file."""

    def empty(self) -> bool:
        return self.stored.array is None

    def to_batch(self, left_padding: list[int]) -> "PackedCache":
        """An empty batch of such caches, as mlx-vlm asks for one."""
        batch = self.merge([self] * len(left_padding))  # type: ignore[attr-defined]
        batch.prepare(left_padding=left_padding)
        return batch

    @property
    def nbytes(self) -> int:
        rows = self.stored.array
        return self.exact_nbytes + (0 if rows is None else rows.nbytes)

    @property
    def exact_nbytes(self) -> int:
        """Of the tail and the first tokens."""
        return sum(a.nbytes for a in (self.newest.array, self.oldest.array) if a is not None)
