"""What the packed caches of one sequence share: rows, rows not yet written, the exact tail."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

from .. import ops
from ..format.format import Format, parse_signature
from . import attention
from .attention import DECODE_QUERIES, PackedView

HELD = 16  # rows that wait to be written
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
    """What the growing and the rotating cache share."""

    step = 256
    alone = False  # of a model that does not run in a batch
    # A decode step writes no row: the newest rows wait in an array of HELD that quantize_pack moves
    # on, and go to their places together, when it is full or when someone asks for ``rows``. Until
    # then attention reads their tokens from the tail. One kernel less for a layer and token.
    _rows: mx.array | None = None
    _held: mx.array | None = None
    _waiting = 0  # the last so many of _held, for the rows from number _place on
    _place = 0
    _prompted = False  # whether the last update was a chunk of a prompt
    # Tokens of a prompt that are still to come (``prompts``). A chunk of more than DECODE_QUERIES
    # tokens is one of a prompt in any case.
    reading = 0
    _filling = True  # whether a sequence has fewer exact tokens than decoding reads

    def __init__(self, fmt: Format):
        self.format = fmt
        self.tail: mx.array | None = None
        # For a model that computes its attention itself: keys and values as arrays, unpacked one
        # layer at a time.
        self.as_arrays = False
        self.model = ""  # identity of the model it was made for, if known
        self._dtype = "float16"  # a name, because mx.Dtype cannot be copied
        # For each sequence: its first tokens that were read as a prompt, and its newest tokens
        # that the tail has as they are.
        self.prompt: list[int] = [0]
        self.exact: list[int] = [0]

    @property
    def dtype(self) -> mx.Dtype:
        """Of the model's keys and values."""
        return getattr(mx, self._dtype)

    @property
    def rows(self) -> mx.array | None:
        """The packed rows of all tokens, uint32 [B, Hkv, capacity, W]."""
        self._write_waiting()
        return self._rows

    @rows.setter
    def rows(self, rows: mx.array | None) -> None:
        self._rows, self._held, self._waiting = rows, None, 0

    def _write_waiting(self) -> None:
        if n := self._waiting:
            assert self._rows is not None and self._held is not None
            self._waiting = 0
            self._rows[:, :, self._place : self._place + n, :] = self._held[:, :, -n:]

    def _write(self, new: mx.array, at: int, L: int) -> None:
        """Write L new rows, or hold one: ``new`` is then the newest rows, the new one last."""
        if new.shape[2] == L:
            rows = self.rows
            assert rows is not None
            rows[:, :, at : at + L, :] = new
            return
        if self._waiting and at != self._place + self._waiting:
            self._write_waiting()  # the ring begins anew
        if not self._waiting:
            self._place = at
        self._held, self._waiting = new, self._waiting + 1
        if self._waiting == new.shape[2]:
            self._write_waiting()

    def _one_more(self, keys: mx.array, values: mx.array, at: int) -> mx.array | None:
        """The usual decode step, for row ``at``, if there is one, and rows wait before it and after
        it: as :meth:`_pack` and :meth:`_write`, in less of the host's time. The tail, or ``None``
        where they must do it."""
        rows, held, tail, n = self._rows, self._held, self.tail, self._waiting
        if n == 0 or at != self._place + n or keys.shape[2] != 1 or self.reading:
            return None
        assert rows is not None and held is not None and tail is not None  # as rows wait
        if at >= rows.shape[2] or n + 1 == held.shape[2]:
            return None
        if tail.dtype != ops.tail_dtype(keys.dtype):
            return None
        fmt = self.format
        self._held, self.tail = ops.quantize_pack_tail(
            keys, values, fmt, tail, fmt.spec.recent, held
        )
        self._waiting = n + 1
        if self._filling:
            self._has_exact(fmt.spec.recent, [1])
        return self.tail

    def _in_place(self, L: int) -> bool:
        """Whether L new rows go to where there is room, one by one."""
        return L == 1 and not self.reading

    # Of each sequence of a batch, its tokens once chunks with padding on the right are read.
    _lengths: list[int] | None = None

    @abstractmethod
    def _positions(self, L: int = 0) -> list[int]:
        """Of the next token of each sequence, after L more rows; below 0 in padding."""

    def _counts(self, L: int) -> list[int]:
        """Of L new rows, those of tokens of each sequence."""
        return [L]

    def _has_exact(self, size: int, new: list[int]) -> None:
        """Note that a tail of ``size`` tokens has got ``new`` ones."""
        self.exact = [min(size, n + m) for n, m in zip(self.exact, new, strict=True)]
        self._filling = min(self.exact, default=0) < self.format.recent

    # mlx-lm sends a cache with these two to its quantized attention function.
    @property
    def bits(self) -> int:
        if self.as_arrays:
            raise AttributeError("a cache that returns arrays has no bits")
        return self.format.layout.k_bits

    @property
    def group_size(self) -> int:
        return self.format.layout.k_group

    # mlx-lm's pipeline-parallel models tie a send to the cache through this name.
    @property
    def keys(self) -> mx.array | None:
        return self.rows

    @keys.setter
    def keys(self, rows: mx.array) -> None:
        self.rows = rows

    @abstractmethod
    def _length(self) -> int:
        """Rows that hold tokens."""

    def _pack(
        self, keys: mx.array, values: mx.array, prev: int | None = None
    ) -> tuple[mx.array, dict]:
        """Rows of new tokens, and what :class:`PackedView` takes of them; moves the tail on.

        Rows that do not fit into a growing array after ``prev`` ones come with zeros for more.
        """
        fmt, recent, L = self.format, self.format.recent, keys.shape[2]
        self._prompted = L > DECODE_QUERIES or self.reading > 0
        self._dtype = _NAMES.get(keys.dtype, self._dtype)
        if not recent:
            return ops.quantize_pack(keys, values, fmt), {}  # which checks them
        if self.tail is not None and self.tail.dtype != (dtype := ops.tail_dtype(keys.dtype)):
            self.tail = self.tail.astype(dtype)
        old, new = self.tail, self._counts(L)
        before = recent if old is None else old.shape[2]
        held = None
        if old is not None and self._in_place(L) and self._may_wait(keys.dtype):
            if (held := self._held) is None:
                shape = (*keys.shape[:2], min(recent, HELD), fmt.layout.words)
                held = mx.zeros(shape, mx.uint32)
            held = held if held.shape[2] > 1 else None
        capacity = None
        if held is None and prev is not None and self._is_full(prev, L):
            capacity = self._step_for(L) if self._end(prev) == prev else None
        size = self._tail_size(L)
        if old is not None:
            size = min(size, before + L)
        keep = size if self._lengths is None else before + L
        rows, tail = ops.quantize_pack_tail(keys, values, fmt, old, keep, held, capacity)
        self.tail = tail
        if self._lengths is not None:
            self.tail = self._without_padding(tail, L, size, new)
        if not self._prompted or self.as_arrays:
            self._has_exact(size, new)
            return rows, {"tail": tail}
        places = self._places(new)
        self._has_exact(size, new)
        return rows, {"tail": old, "chunk": (keys, values), "places": places}

    def _places(self, new: list[int]) -> tuple[tuple[int, int], ...]:
        """Where a chunk with ``new`` tokens of each sequence begins (:class:`PackedView`); notes
        which sequences it goes on with as with all of a prompt."""
        places = []
        for i, at in enumerate(self._positions()):
            into = at % attention.BLOCK
            known = min(into, self.exact[i])
            if self.prompt[i] == max(at, 0) and (at < 0 or known >= min(into, self._reach())):
                self.prompt[i] += new[i]
            places.append((into, known))
        # Nobody reads what comes out of padding: it need not be worked on apart.
        real = next((p for p, n in zip(places, new, strict=True) if n), places[0])
        return tuple(p if n else real for p, n in zip(places, new, strict=True))

    def _may_wait(self, dtype: mx.Dtype) -> bool:
        """Whether rows may wait: what attention then reads instead must be evaluated with it, and
        of plain operations rows would be left."""
        return not self.as_arrays and not ops.is_reference(self.format, dtype)

    def _tail_size(self, L: int) -> int:
        """Tokens that the tail keeps after L more rows."""
        recent = self.format.recent
        if not self._prompted:
            # Each of a few tokens reads `recent` of them, and then all but one may be taken back.
            return recent + L - 1
        return recent if self.as_arrays else self.tail_after_prompt(L)

    def tail_after_prompt(self, L: int = 0) -> int:
        """Tokens of the tail if a chunk of a prompt ends L rows from here: those that decoding
        reads, or the unfinished block."""
        ends = [max(0, end) % attention.BLOCK for end in self._positions(L)]
        return max(self.format.recent, min(max(ends, default=0), self._reach()))

    def _reach(self) -> int:
        """Tokens before its own that a query may see."""
        return attention.BLOCK

    def _without_padding(self, tail: mx.array, L: int, size: int, new: list[int]) -> mx.array:
        """The last ``size`` tokens of each sequence, where L rows hold ``new`` tokens each."""
        first = tail.shape[2] - L - size
        if first < 0:
            tail, first = mx.pad(tail, [(0, 0), (0, 0), (-first, 0), (0, 0)]), 0
        return mx.stack([tail[i, :, first + n : first + n + size] for i, n in enumerate(new)])

    def _drop_tail(self, n: int, length: int) -> None:
        """Take the newest n tokens off the tail. ``length`` rows are left, in the order of their
        tokens; what the tail then lacks comes from there."""
        if n == 0:
            return
        left = [max(0, at) for at in self._positions()]
        self.prompt = [min(m, at) for m, at in zip(self.prompt, left, strict=True)]
        self.exact = [max(0, m - n) for m in self.exact]
        self._filling = True
        if self.tail is None:
            return
        size = max(self.tail.shape[2] - n, 0)
        tail = self.tail[:, :, :size]
        if length == 0:
            self.tail = None
        elif (lacking := self.format.recent - size) <= 0:
            self.tail = tail
        else:
            assert self.rows is not None
            older = self._as_tail(self.rows[:, :, : max(0, length - size)], lacking)
            self.tail = mx.concatenate([older, tail], axis=2)
        self._start()

    def _start(self) -> None:
        """Begin to evaluate what was changed outside of a model's step: later steps, perhaps in
        another thread, find it done."""
        mx.async_eval([a for a in vars(self).values() if isinstance(a, mx.array)])

    def _as_tail(self, rows: mx.array, n: int) -> mx.array:
        """The last n of these rows, as a tail."""
        assert self.tail is not None
        B, heads, T, _ = rows.shape
        have = min(n, T)
        tail = mx.zeros((B, heads, n - have, self.tail.shape[3]), self.tail.dtype)
        if have:
            y = mx.concatenate(
                [*ops.dequantize(rows[:, :, T - have :], have, self.format)], axis=-1
            )
            tail = mx.concatenate([tail, y.astype(tail.dtype)], axis=2)
        return tail

    def goes_on(self, at: int, end: int) -> bool:
        """Whether tokens ``at`` to ``end`` of a prompt find what they would if it were read at
        once: all before were read as a prompt, and what is to be read exactly is in the tail."""
        recent = self.format.recent
        needed = max(0, min(at, recent - (end - at)))  # by the last token
        if end - at > 1:
            needed = max(needed, min(at % attention.BLOCK, self._reach()))
        return at < end and self.prompt[0] >= at and self.exact[0] >= needed

    def has_decoded(self, at: int) -> bool:
        """Whether the last of ``at`` tokens was decoded, and none was taken back since."""
        return self.prompt[0] < at and self.exact[0] >= min(at, self.format.recent)

    def _for_batch(self) -> tuple[int, int]:
        """``prompt`` and ``exact`` in a batch."""
        return self.prompt[0], self.exact[0]

    def _take(self, batch: "PackedCache", i: int) -> None:
        """The tail of sequence ``i`` of a batch, and what is known of it."""
        self.prompt, self.exact = [batch.prompt[i]], [batch.exact[i]]
        if batch.tail is not None:
            self.tail = mx.contiguous(batch.tail[i : i + 1])
        self._start()

    def _last(self, B: int, size: int, heads: int, dtype: mx.Dtype) -> mx.array:
        """The last ``size`` tokens of the tail, for a batch; zeros where there are fewer, which
        nothing reads."""
        lay, dtype = self.format.layout, ops.tail_dtype(dtype)
        have = 0 if self.tail is None else min(size, self.tail.shape[2])
        zeros = mx.zeros((B, heads, size - have, lay.k_dim + lay.v_dim), dtype)
        if self.tail is None:
            return zeros
        return mx.concatenate([zeros, self.tail[:, :, -have:].astype(dtype)], axis=2)

    def _fetch(
        self,
        tail: mx.array | None = None,
        chunk: tuple[mx.array, mx.array] | None = None,
        places: tuple[tuple[int, int], ...] = ((0, 0),),
    ) -> tuple:
        """What attention gets of an update (:class:`PackedView`)."""
        assert self._rows is not None
        if self.as_arrays:
            return self._arrays(tail)
        lay = self.format.layout
        shared = (self._rows, self._length(), self.format, self._dtype)
        keys = values = None
        if chunk is not None:
            # Attention on the chunk reads neither its rows nor the new tail.
            assert self.tail is not None
            keys, values = mx.depends([*chunk], [self._rows, self.tail])
        more = self._ring(), tail
        first = PackedView(*shared, lay.k_dim, *more, keys, places)
        if chunk is None and lay.k_dim == lay.v_dim:  # nothing tells them apart
            return first, first
        return first, PackedView(*shared, lay.v_dim, *more, values, places)

    def _updated(self, L: int, view: dict, *more: mx.array) -> tuple:
        """The end of an update: everything is evaluated with what attention reads."""
        self.reading = max(0, self.reading - L)
        decodes = view.get("tail") is self.tail
        self._settle(*more)
        return self._fetch(**(view | {"tail": self.tail} if decodes else view))

    def _settle(self, *more: mx.array) -> None:
        """Evaluate with the tail, which every step reads, what a step may leave unread."""
        if self.tail is not None:
            assert self._rows is not None
            (self.tail,) = mx.depends([self.tail], [self._rows, *more])
        elif more:
            assert self._rows is not None
            (self._rows,) = mx.depends([self._rows], [*more])

    def _ring(self) -> tuple[int, int, int] | None:
        """Where the rows of a rotating cache begin (``attention.PackedView``)."""
        return None

    def _arrays(self, tail: mx.array | None) -> tuple[mx.array, mx.array]:
        """What the views stand for, in the model's own domain. Of a prompt all comes from rows: one
        array cannot have a token exact for some queries and not for others."""
        length, fmt = self._length(), self.format
        assert self.rows is not None
        keep, idx, _ = self._ring() or (0, length, 0)
        n = min(length - keep, 0 if tail is None else tail.shape[2])
        if self._prompted or n <= 0:
            return ops.restore(self.rows, length, fmt, self.dtype)
        last = tail[:, :, -n:]  # type: ignore[index]
        if idx == length:
            return ops.restore(self.rows, length, fmt, self.dtype, last)
        # The newest tokens are before row idx, and before them those at the end.
        n = min(fmt.recent, length - keep)
        here = min(n, idx - keep)
        k, v = ops.restore(self.rows, length, fmt, self.dtype)
        exact = ops.restore(self.rows, n, fmt, self.dtype, last[:, :, -n:])
        for x, y in zip((k, v), exact, strict=True):
            x[:, :, idx - here : idx] = y[:, :, n - here :]
            x[:, :, length - (n - here) : length] = y[:, :, : n - here]
        return k, v

    def _is_full(self, prev: int, L: int) -> bool:
        return self._rows is None or prev + L > self._rows.shape[2]

    def _step_for(self, L: int) -> int:
        """Rows by which an array grows for L tokens, as in mlx-lm."""
        return (self.step + L - 1) // self.step * self.step

    def _end(self, prev: int) -> int:
        """Where an array grows that holds ``prev`` tokens, as in mlx-lm."""
        return prev if self._rows is None or prev % self.step else self._rows.shape[2]

    def _grow_and_write(self, new: mx.array, prev: int, L: int) -> None:
        """Write L rows at ``prev``, in an array that grows in steps; ``new`` may be a step."""
        if self._is_full(prev, L):
            step, rows, end = self._step_for(L), self.rows, self._end(prev)
            whole = new.shape[2] == step and end == prev
            grown = new if whole else self._zeros(new, step)
            if rows is not None:
                grown = mx.concatenate([rows[..., :end, :], grown], axis=2)
            self.rows = grown
            if whole:
                return
        self._write(new, prev, L)

    def keys_and_values(self) -> tuple:
        """For layers that read another layer's cache: of a prompt all from rows."""
        self._write_waiting()
        return self._fetch(None if self._prompted else self.tail)

    def _zeros(self, like: mx.array, tokens: int) -> mx.array:
        return mx.zeros((*like.shape[:2], tokens, like.shape[3]), mx.uint32)

    def _nothing(self, keys: mx.array) -> tuple:
        """An update by no tokens."""
        if self._rows is None:
            self.rows = mx.zeros((*keys.shape[:2], 0, self.format.layout.words), mx.uint32)
        return self._fetch(self.tail)

    # Strings and the calibration go along, so that a saved cache says what it is.
    @property
    def _format_state(self) -> list:
        fmt = self.format
        state = [self.as_arrays, self.model, self._dtype, fmt.signature, fmt.arrays]
        return [*state, self.prompt, self.exact, self.tail] if fmt.recent else state

    @_format_state.setter
    def _format_state(self, v: list) -> None:
        self.as_arrays, self.model, dtype, signature, arrays, *more = v
        if dtype not in _NAMES.values():
            raise ValueError(f"The cache's dtype is {dtype!r}, which is not one of a model.")
        self._dtype = dtype
        self.format = parse_signature(signature, arrays)
        words = self.format.layout.words
        if self.rows is not None and (
            self.rows.dtype != mx.uint32 or self.rows.ndim != 4 or self.rows.shape[3] != words
        ):
            raise ValueError(
                f"The cache holds {self.rows.dtype} {self.rows.shape}, not the uint32 rows of "
                f"{words} words that {signature!r} describes."
            )
        # Files of version 0.1.0 do not say what was read how.
        self.prompt, self.exact, self.tail, *_ = (
            [*more, None] if len(more) > 1 else [[], [], *more, None]
        )
        self._check_tail()
        mx.async_eval([a for a in arrays or () if a is not None])
        self._start()  # a file is read when its arrays are evaluated

    def _check_tail(self) -> None:
        fmt, rows, tail = self.format, self.rows, self.tail
        if not fmt.recent or rows is None or self._length() <= 0:
            fits = tail is None
        else:
            wanted = (*rows.shape[:2], fmt.layout.k_dim + fmt.layout.v_dim)
            fits = (
                tail is not None
                and tail.ndim == 4
                and (*tail.shape[:2], tail.shape[3]) == wanted
                and tail.shape[2] >= fmt.recent
                and tail.dtype in (self.dtype, ops.tail_dtype(self.dtype))
            )
        if not fits:
            found = "none" if tail is None else f"{tail.dtype} {tail.shape}"
            raise ValueError(f"The cache's tail, {found}, is not what {fmt.signature!r} describes.")
        if tail is not None:  # version 0.1.0 kept it in the keys' dtype
            self.tail = tail.astype(ops.tail_dtype(self.dtype))
        if isinstance(getattr(self, "offset", 0), str | float):
            return  # whoever loads a file says what is wrong with its numbers
        size = 0 if tail is None else tail.shape[2]
        at = self._positions()
        self.prompt, self.exact = self.prompt or [0] * len(at), self.exact or [0] * len(at)
        for name, most in (("prompt", [max(0, p) for p in at]), ("exact", [size] * len(at))):
            counts = getattr(self, name)
            if len(counts) != len(at) or any(
                type(n) is not int or not 0 <= n <= m for n, m in zip(counts, most, strict=True)
            ):
                raise ValueError(
                    f"The cache counts {counts} {name} tokens, which it does not hold."
                )

    def _made_like(self, other: "PackedCache"):
        self.as_arrays, self.model, self._dtype = other.as_arrays, other.model, other._dtype
        return self

    def empty(self) -> bool:
        return self._rows is None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self._rows, self.tail, self._held) if a is not None)
