"""Batches of packed caches: what mlx-lm's BatchGenerator asks of them, and texts that do not
depend on the other sequences."""

import copy
import functools

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import batch_generate, stream_generate
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
    make_prompt_cache,
)

import mlx_kvq
from mlx_kvq import ops
from mlx_kvq.caches import attention
from mlx_kvq.caches.batch import PackedBatchKVCache
from mlx_kvq.caches.batch_rotating import PackedBatchRotatingKVCache
from mlx_kvq.caches.rotating import PackedRotatingKVCache
from mlx_kvq.caches.single import PackedKVCache
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from tests.support.float32 import NAMES, WINDOW, load_float32, prompts
from tests.support.stock import Pair
from tests.support.stock_batch import BatchPair, PaddedTokens

padded = functools.cache(PaddedTokens)


@pytest.fixture(scope="module")
def tokens():
    return padded("int4-srft")


@pytest.fixture(scope="module")
def plain():
    """Without an exact tail."""
    return PaddedTokens("int4-srft:recent=0,first=0")


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    model, tokenizer = load_float32(request.param, WINDOW)
    mlx_kvq.enable(model, "int4-srft", verbose=False)
    return model, tokenizer


def fresh(lengths, first=0):
    """Different tokens for each sequence."""
    return [np.arange(n) + first + 300 * i for i, n in enumerate(lengths)]


def new_batches(tokens, B):
    yield BatchPair.growing(tokens, [0] * B)
    for max_size in (8, 20, 300):
        yield BatchPair.rotating(tokens, max_size, [0] * B)


def test_they_know_all_of_the_stock_protocol():
    for ours, stock in (
        (PackedBatchKVCache, BatchKVCache),
        (PackedBatchRotatingKVCache, BatchRotatingKVCache),
    ):
        protocol = {n for n in dir(stock) if not n.startswith("_")} - {"to_quantized"}
        assert protocol <= set(dir(ours))


@pytest.mark.parametrize("lengths", [[5], [5, 5], [1, 7, 3], [30, 2, 2, 9], [1, 1]])
@pytest.mark.parametrize("step", [2048, 4])
def test_prompts_of_different_lengths_then_decode(tokens, lengths, step):
    for pair in new_batches(tokens, len(lengths)):
        pair.prompt(fresh(lengths), step)
        for i in range(12):
            pair.step([[100 + i + 300 * b] for b in range(len(lengths))])
        pair.prompt(fresh(lengths, 150), step)
        pair.step([[200 + 300 * b] for b in range(len(lengths))])


def test_sequences_come_and_go(tokens):
    for pair in new_batches(tokens, 3):
        pair.prompt(fresh([5, 12, 1]))
        pair.filter([2, 0])
        other = next(
            p for p in new_batches(tokens, 2)
            if getattr(p.ours, "max_size", None) == getattr(pair.ours, "max_size", None)
        )  # fmt: skip
        other.prompt(fresh([9, 2], 900))
        other.step([[950], [1250]])
        pair.extend(other)
        pair.step([[20], [320], [620], [920]])
        for i in range(4):
            single = pair.extract(i)
            single.step([[40]])
            single.step([[41, 42, 43]])
        again = BatchPair.merge([pair.extract(i) for i in (3, 1)])
        again.step([[60], [61]])


def test_batches_that_were_trimmed_to_nothing_join():
    """They have rows, but no token, and so no tail."""
    fmt = make_format(Spec.parse("int4-srft:recent=3"), 64)
    for make in (PackedBatchKVCache, lambda *a: PackedBatchRotatingKVCache(a[0], 8, a[1])):
        first, second = make(fmt, [0]), make(fmt, [0])
        for batch in (first, second):
            batch.update_and_fetch(mx.ones((1, 2, 1, 64)), mx.ones((1, 2, 1, 64)))
            batch.trim(1)
        first.extend(second)
        assert first.tail is None
        again = type(first).from_state(first.state)
        views = again.update_and_fetch(mx.ones((2, 2, 1, 64)), mx.ones((2, 2, 1, 64)))
        assert views[0].tail.shape == (2, 2, 3, 128)


@pytest.mark.parametrize("spec", ["int4-srft:recent=3", "int4-srft:recent=16"])
@pytest.mark.parametrize("max_size, keep", [(8, 4), (8, 7), (20, 4), (12, 1)])
def test_rings_that_keep_their_first_tokens_join_a_batch(spec, max_size, keep):
    """A batch does not know of the gap after them: of their exact tokens only those after it go
    along, and before these the tail has what rows keep."""
    tokens = padded(spec)
    recent = tokens.format.recent
    singles, lengths = [], [[30], [30, 1, 1], [max_size], [3], [max_size - 1, 1, 1], [9] * 3, []]
    for i, length in enumerate(lengths):
        single, at = Pair.rotating(tokens, max_size, keep), 250 * i
        for L in length:
            single.update([list(range(at, at + L))])
            at += L
        singles.append(single)
    first, second = singles[:4], singles[3:]
    for several in (first, second, singles[::-2], singles[1:2], [singles[4], singles[3]]):
        batch = BatchPair.merge([p.fork() for p in several])
        for single, prompt, exact in zip(several, batch.ours.prompt, batch.ours.exact, strict=True):
            ours = single.ours
            full = ours.offset > ours.size()
            most = 0 if ours.empty() else ours._length() - (keep if full else 0)
            assert (prompt, exact) == (ours.prompt[0], min(ours.exact[0], most))
        for i in range(recent + 2):
            batch.step([[1750 + i]] * len(several))
        one = batch.extract(0)
        one.step([[1800]])
        one.step([[1801, 1802, 1803]])


def test_a_sequence_without_tokens_leaves_a_batch(tokens):
    """Its cache is a new one, and goes on as one."""
    for make in (Pair.growing, lambda t: Pair.rotating(t, 8), lambda t: Pair.rotating(t, 20)):
        for n in (5, 30):
            filled, empty = make(tokens), make(tokens)
            filled.update([list(range(n))])
            batch = BatchPair.merge([filled, empty])
            for _ in range(2):
                single = batch.extract(1)
                assert single.ours.empty()
                assert (single.ours.tail, single.ours.offset) == (None, 0)
                assert (single.ours.prompt, single.ours.exact) == ([0], [0])
                single.step([list(range(40, 52))])
                single.step([[52]])
                batch.ours.filter([0, 1])
            nothing = batch.ours.extract(1)
            nothing = type(nothing).from_state(nothing.state)
            assert nothing.empty()
            again = nothing.merge([nothing, batch.ours.extract(0)])
            assert again.offset.tolist() == [0, n]


def test_right_padding_without_lengths(tokens):
    """mlx-lm's growing batch takes it: which tokens are padding is not known until the end, and
    then the tail is what rows keep."""
    recent = tokens.format.recent
    padding = [2, 0, 3]
    for chunk in (12, 5):
        pair = BatchPair.growing(tokens, [0] * 3)
        for cache in (pair.ours, pair.stock):
            cache.prepare(right_padding=padding)
        assert pair.ours._lengths is None
        ids = np.array(
            [[*range(300 * i, 300 * i + 12 - n), *[1023] * n] for i, n in enumerate(padding)]
        )
        for at in range(0, 12, chunk):
            pair.update(ids[:, at : at + chunk])
        for cache in (pair.ours, pair.stock):
            cache.finalize()
        held = pair._in_order()
        pair.tails = [
            [(-1, False)] * (recent - 12 + n) + [(int(t), t in begin) for t in row[n:][-recent:]]
            for row, n, begin in zip(held, padding, pair.firsts, strict=True)
        ]
        pair.check()
        assert pair.ours.exact == [0, 0, 0]
        assert pair.ours._right_padding is None
        for i in range(recent + 3):
            pair.step([[400 + i], [700 + i], [950 + i]])
            assert pair.ours.exact == [min(recent, i + 1)] * 3
        pair.ours.finalize()  # once
        pair.check()


def test_padding_without_tokens_is_not_counted(tokens):
    for pair in new_batches(tokens, 3):
        cache = pair.ours
        cache.prepare(left_padding=[2, 12, 0])
        cache.reading = 20
        at = 0
        for L, read in ((12, [10, 0, 12]), (8, [18, 8, 20])):
            ids = np.arange(at, at + L) + 300 * np.arange(3)[:, None]
            cache.update_and_fetch(*tokens.exact(ids))
            at += L
            assert cache.prompt == read
            assert cache.exact == [min(n, cache.tail.shape[2]) for n in read]


def test_one_mask_for_sequences_without_a_common_block(tokens, monkeypatch):
    """As a model may make it, [1, 1, L, T], [B, 1, L, T] or [L, T]."""
    monkeypatch.setattr(attention, "BLOCK", 16)
    singles = []
    for i, n in enumerate((5, 22, 30)):
        single = PackedKVCache(tokens.format)
        single.reading = n
        single.update_and_fetch(*tokens.exact([list(range(300 * i, 300 * i + n))]))
        singles.append(single)
    batch = PackedKVCache.merge(singles)
    views = batch.update_and_fetch(*tokens.exact(np.arange(9) + 300 * np.arange(1, 4)[:, None]))
    assert len(set(views[0].places)) == 3
    q = tokens.queries(3, 9)
    mask = mx.tril(mx.ones((9, 39), mx.bool_), 30) & (mx.arange(39) >= 25)
    outs = [
        attention.packed_attention(q, *views, 0.125, m)
        for m in (mask, mask[None, None], mx.broadcast_to(mask, (3, 1, 9, 39)))
    ]
    for out in outs[1:]:
        np.testing.assert_array_equal(np.array(out), np.array(outs[0]))
    # A sequence's own part of a mask.
    parts = mx.stack([mask & (mx.arange(39) != 30 + i) for i in range(3)])[:, None]
    apart = attention.packed_attention(q, *views, 0.125, parts)
    for i in range(3):
        alone = attention.packed_attention(q, *views, 0.125, parts[i, 0])
        np.testing.assert_array_equal(np.array(apart[i]), np.array(alone[i]))


@pytest.mark.parametrize("max_size", [None, 40])
def test_what_was_read_how_goes_with_its_sequence(tokens, max_size):
    def single(read, decoded):
        fmt = tokens.format
        cache = PackedKVCache(fmt) if max_size is None else PackedRotatingKVCache(fmt, max_size)
        cache.reading = read
        for L in (read, *[1] * decoded):
            cache.update_and_fetch(*tokens.exact([list(range(L))]))
        return cache

    merge = PackedKVCache.merge if max_size is None else PackedRotatingKVCache.merge
    batch = merge([single(9, 2), single(3, 0)])
    other = merge([single(12, 0), single(5, 1)])
    assert (batch.prompt, batch.exact) == ([9, 3], [11, 3])
    batch.extend(other)
    assert (batch.prompt, batch.exact) == ([9, 3, 12, 5], [11, 3, 12, 6])
    batch.filter([3, 0, 2])
    assert (batch.prompt, batch.exact) == ([5, 9, 12], [6, 11, 12])
    one = batch.extract(1)
    assert (one.prompt, one.exact, one.offset) == ([9], [11], 11)


@pytest.mark.parametrize("L", [1, 6, 30])
def test_a_sequence_that_joins_attends_as_it_would_alone(tokens, L):
    """Although the others have a history."""
    old, young = Pair.growing(tokens), Pair.growing(tokens)
    old.update([list(range(40))])
    pair = BatchPair.merge([old, young])
    ids = np.stack([np.arange(L) + 100, np.arange(L) + 200])
    together = pair.step(ids)
    views = young.update(ids[1:])[0]
    q = tokens.queries(2, L)[1:]
    alone = attention.packed_attention(q, *views, 0.125, "causal" if L > 1 else None)
    np.testing.assert_allclose(np.array(together[1:]), np.array(alone), atol=1e-5)


@pytest.mark.parametrize("cuts", [[70], [16, 33, 1, 70], [5] * 14])
def test_prompts_in_a_batch_are_read_as_alone(tokens, monkeypatch, cuts):
    """Sequences that are at different places of their blocks, padded on either side."""
    monkeypatch.setattr(attention, "BLOCK", 16)
    lengths = [70, 3, 40, 33]
    for max_size in (None, 20, 100):

        def single(n, max_size=max_size):
            if max_size is None:
                return PackedKVCache(tokens.format)
            return PackedRotatingKVCache(tokens.format, max_size)

        def read(cache, ids):
            """The outputs of a chunk of prompts [B, L]."""
            mask = cache.make_mask(ids.shape[1], return_array=False, window_size=None)
            views = cache.update_and_fetch(*tokens.exact(ids))
            q = np.stack([tokens._queries[0][:, row % 1024] for row in ids])
            return np.array(attention.packed_attention(mx.array(q), *views, 0.125, mask))

        # Every sequence begins with a history of its own length.
        before = [0, 21, 5, 33]
        history = [np.arange(n) + 400 * i for i, n in enumerate(before)]
        prompts = [np.arange(n) + 400 * i + 200 for i, n in enumerate(lengths)]
        alone = []
        singles = [single(n) for n in before]
        for cache, old in zip(singles, history, strict=True):
            cache.reading = 1000
            if len(old):
                read(cache, old[None])
        batch = singles[0].merge([copy.deepcopy(c) for c in singles])
        for cache, ids in zip(singles, prompts, strict=True):
            alone.append(read(cache, ids[None])[0])
        padding = [max(lengths) - n for n in lengths]
        batch.prepare(lengths=lengths, right_padding=padding)
        batch.reading = 1000
        padded = np.stack([np.pad(p, (0, n)) for p, n in zip(prompts, padding, strict=True)])
        outs, at = [], 0
        for L in cuts:
            if L := min(L, 70 - at):
                outs.append(read(batch, padded[:, at : at + L]))
                at += L
        batch.finalize()
        together = np.concatenate(outs, axis=2)
        for i, n in enumerate(lengths):
            np.testing.assert_allclose(together[i, :, :n], alone[i], rtol=0, atol=1e-5)
            one = batch.extract(i)
            kept = min(one.size(), singles[i].size(), 12)
            rows = [c._in_order()[:, :, -kept:] for c in (one, singles[i])]
            assert mx.array_equal(*rows)
            assert (one.prompt, one.offset) == (singles[i].prompt, singles[i].offset)


def test_a_padded_prompt_may_end_in_a_chunk_of_one_token(tokens):
    """mlx-lm's rotating batch raises there; ours is as if the chunks were others."""
    caches = []
    k, v = tokens.exact(np.arange(2 * 9).reshape(2, 9))
    for cuts in ([0, 8, 9], [0, 5, 9]):
        cache = PackedBatchRotatingKVCache(tokens.format, 6, [0, 0])
        cache.prepare(lengths=[3, 9], right_padding=[6, 0])
        for a, b in zip(cuts, cuts[1:], strict=False):
            mask = cache.make_mask(b - a)
            views = cache.update_and_fetch(k[:, :, a:b], v[:, :, a:b])
            assert mask.shape[-1] == views[0].length
        cache.finalize()
        caches.append(cache)
    singles = [[c.extract(i) for c in caches] for i in (0, 1)]
    for one, other in singles:
        assert one.offset == other.offset
        kept = min(one.rows.shape[2], other.rows.shape[2], 5)
        assert mx.array_equal(one.rows[:, :, -kept:], other.rows[:, :, -kept:])
    assert [pair[0].offset for pair in singles] == [3, 9]


def test_rows_are_moved_not_unpacked(tokens, monkeypatch):
    pairs = list(new_batches(tokens, 2))
    for pair in pairs:
        pair.prompt(fresh([3, 7]))
    for name in ("quantize_pack", "dequantize", "attend"):
        monkeypatch.setattr(ops, name, None)
    for pair in pairs:
        cache = pair.ours
        cache.prepare(lengths=[0, 0], right_padding=[1, 2])
        cache.finalize()
        cache.extend(copy.deepcopy(cache))
        cache.filter([1, 2, 3])
        assert type(cache).merge([cache.extract(i) for i in range(3)]).rows.dtype == mx.uint32


def spied(monkeypatch):
    calls = []

    def attend(q, packed, scale, mask, sinks):
        array = mask.causal or None if mask.array is None else mask.array
        calls.append((array, mask.starts, mask.window))
        return real(q, packed, scale, mask, sinks)

    real = ops.attend
    monkeypatch.setattr(ops, "attend", attend)
    return calls


def test_decoding_hands_over_starts_and_no_mask(tokens, monkeypatch):
    calls = spied(monkeypatch)
    for pair in new_batches(tokens, 2):
        pair.prompt(fresh([3, 7]))
        calls.clear()
        pair.step([[50], [350]])
        ((mask, starts, window),) = calls
        ring = pair.ours
        if isinstance(ring, PackedBatchRotatingKVCache) and ring.max_size == 8:
            assert (mask, starts.tolist(), window) == (None, [4, 0], 8)
        elif isinstance(ring, PackedBatchRotatingKVCache):
            assert (mask, starts.tolist(), window) == (None, [4, 0], ring.max_size)
        else:
            assert (mask, starts.tolist(), window) == (None, [4, 0], None)
        calls.clear()
        pair.step([[51, 52], [351, 352]])
        if getattr(pair.ours, "max_size", 0) == 8:  # full: each query over its own 8 rows
            assert [(mask, window) for mask, _, window in calls] == [(None, 8)] * 2
            assert [starts.tolist() for _, starts, _ in calls] == [[3, 0], [2, -1]]
            continue
        ((mask, starts, _),) = calls
        assert mask is True  # causal
        assert starts.dtype == mx.int32


def test_a_changed_mask_is_used_as_it_is(plain, monkeypatch):
    tokens = plain
    pair = BatchPair.growing(tokens, [0, 0])
    pair.prompt(fresh([3, 7]))
    calls = spied(monkeypatch)
    mask = pair.make_mask(1)
    views, *_ = pair.update([[50], [350]])
    arrays = pair.stock.keys_and_values()
    changed = mask & (mx.arange(8) != 5)
    q = tokens.queries(2, 1)
    out = attention.packed_attention(q, *views, 0.125, changed)
    assert calls[0][0] is changed
    assert calls[0][1] is None
    expected = mx.fast.scaled_dot_product_attention(q, *arrays, scale=0.125, mask=changed)
    np.testing.assert_allclose(np.array(out), np.array(expected), atol=1e-4)


@pytest.mark.parametrize("max_size", [None, 16])
def test_a_sequence_leaves_between_padded_chunks(tokens, max_size):
    """The others are read as in a batch without it."""

    def batch(lengths):
        padding = [max(lengths) - n for n in lengths]
        none = [0] * len(lengths)
        if max_size is None:
            cache = PackedBatchKVCache(tokens.format, none)
        else:
            cache = PackedBatchRotatingKVCache(tokens.format, max_size, none)
        cache.prepare(lengths=lengths, right_padding=padding)
        return cache

    def read(cache, ids):
        cache.update_and_fetch(*tokens.exact(ids))

    first = np.arange(12) + 300 * np.arange(3)[:, None]
    some = batch([20, 9, 16])
    read(some, first)
    some.filter([2, 0])
    alone = batch([16, 20])
    read(alone, first[[2, 0]])
    for cache in (some, alone):
        read(cache, np.arange(12, 20) + 300 * np.array([[2], [0]]))
        cache.finalize()
    assert some.left_padding.tolist() == alone.left_padding.tolist()
    assert (some.prompt, some.exact) == (alone.prompt, alone.exact)
    for i in range(2):
        a, b = some.extract(i), alone.extract(i)
        assert a.offset == b.offset
        assert mx.array_equal(a._in_order(), b._in_order())
        n = min(a.exact[0], tokens.format.recent)
        if n:
            assert mx.array_equal(a.tail[:, :, -n:], b.tail[:, :, -n:])


def test_formats_and_windows_do_not_mix():
    a, b = (PackedKVCache(make_format(Spec.parse(s), 64)) for s in ("int4-srft", "int8-srft"))
    with pytest.raises(ValueError, match="different formats cannot share a batch"):
        PackedKVCache.merge([a, b])
    with pytest.raises(ValueError, match="different formats cannot share a batch"):
        PackedKVCache.merge([a]).extend(PackedKVCache.merge([b]))
    rings = [PackedRotatingKVCache(a.format, n) for n in (8, 9)]
    with pytest.raises(ValueError, match=r"one max_size, got \[8, 9\]"):
        PackedRotatingKVCache.merge(rings)


def test_left_padding_comes_first(tokens):
    for pair in new_batches(tokens, 2):
        pair.prompt(fresh([3, 7]))
        with pytest.raises(ValueError, match="only be added to an empty PackedBatch"):
            pair.ours.prepare(left_padding=[1, 0])


def test_padding_that_was_announced_outlives_a_filter(tokens):
    """mlx-lm's growing batch moves its index below zero there."""
    for pair in new_batches(tokens, 3):
        cache = pair.ours
        cache.prepare(left_padding=[2, 5, 3])
        cache.filter([0, 2])
        cache.update_and_fetch(*tokens.exact(np.arange(12).reshape(2, 6)))
        assert cache.offset.tolist() == [4, 3]
        for i, ids in enumerate(([2, 3, 4, 5], [9, 10, 11])):
            single = cache.extract(i)
            assert single.offset == len(ids)
            tokens.check_rows(single._in_order(), np.array([ids]))


def test_in_a_hybrid_layer(tokens):
    """CacheList passes everything on to its parts."""
    x, y = tokens.exact([[0, 1, 2]])
    lists = []
    for _ in range(2):
        cache = CacheList(ArraysCache(1), PackedKVCache(tokens.format))
        cache[0][0] = mx.zeros((1, 4))
        cache[1].update_and_fetch(x, y)
        lists.append(cache)
    batch = CacheList.merge(lists)
    batch.prepare(lengths=[1, 2], right_padding=[1, 0])
    batch[1].update_and_fetch(*tokens.exact([[3, 4], [5, 6]]))
    batch.finalize()
    batch.filter([1, 0])
    batch.extend(CacheList.merge(lists))
    assert [batch.extract(i)[1].offset for i in range(4)] == [5, 4, 3, 3]
    assert batch.nbytes > batch[1].nbytes > 0


LENGTHS = [1, 2, 3, 9, 40, 17, 5, 80]


def alone(loaded, prompt, n, **kwargs):
    return [s.token for s in stream_generate(*loaded, prompt, max_tokens=n, **kwargs)]


def test_batch_generate_gives_the_texts_of_single_prompts(loaded):
    many = prompts(loaded[1], LENGTHS)
    limits = [8 + i for i in range(len(many))]  # sequences leave one after another
    found = batch_generate(*loaded, many, max_tokens=limits, return_token_ids=True).token_ids
    assert found == [alone(loaded, p, n) for p, n in zip(many, limits, strict=True)]


def test_requests_that_join_a_running_batch(loaded):
    """Prompts in chunks, in small groups, while others decode, past tiny-gemma3's window."""
    model, tokenizer = loaded
    many = prompts(tokenizer, [WINDOW - 6, 3, 40, 1, 17, WINDOW + 20])
    generator = BatchGenerator(
        model, max_tokens=12, prefill_step_size=20, prefill_batch_size=2, completion_batch_size=3
    )
    found = {uid: [] for uid in generator.insert(many[:3])}
    late = list(many[3:])
    nbytes = 0
    while True:
        responses = generator.next_generated()
        nbytes = max(nbytes, generator.prompt_cache_nbytes)
        for r in responses:
            found[r.uid].append(r.token)
        if late:
            found |= {uid: [] for uid in generator.insert([late.pop(0)])}
        elif not responses:
            break
    generator.close()
    assert nbytes > 0
    expected = [alone(loaded, p, 12, prefill_step_size=20) for p in many]
    assert list(found.values()) == expected


def test_prompt_caches_in_and_out(loaded):
    """Conversations that go on, packed bytes reused as they are."""
    model, tokenizer = loaded
    many = prompts(tokenizer, [4, 30, 11])
    first = batch_generate(*loaded, many, max_tokens=5, return_prompt_caches=True)
    more = prompts(tokenizer, [8, 2, 19])
    before = copy.deepcopy(first.caches)
    second = batch_generate(
        *loaded, more, prompt_caches=first.caches, max_tokens=6, return_token_ids=True
    ).token_ids
    for kept, prompt, tokens in zip(before, more, second, strict=True):
        assert tokens == alone(loaded, prompt, 6, prompt_cache=kept)


def test_max_kv_size_in_a_batch(loaded):
    model, tokenizer = loaded
    many = prompts(tokenizer, [5, 40])
    generator = BatchGenerator(model, max_tokens=20, max_kv_size=24)
    generator.insert(many)
    ended = {}
    while len(ended) < 2:
        for r in generator.next_generated():
            if r.finish_reason:
                ended[r.uid] = r.prompt_cache
    generator.close()
    for caches in ended.values():
        bounded = [c for c in caches if c.max_size == 24]
        assert bounded
        assert all(c.size() <= 24 and c.rows.shape[2] <= 24 for c in bounded)


def test_a_batch_of_sequences_without_tokens_keeps_its_state(tokens):
    for pair in new_batches(tokens, 1):
        size = getattr(pair.ours, "max_size", None)
        one, empty = (
            Pair.growing(tokens) if size is None else Pair.rotating(tokens, size) for _ in range(2)
        )
        one.update([list(range(20))])
        batch = one.ours.merge([one.ours, empty.ours])
        batch.filter([1])
        again = type(batch).from_state(batch.state)
        again.update_and_fetch(*tokens.exact([[5, 6, 7]]))
        assert again.offset.tolist() == [3]
        single = again.extract(0)
        tokens.check_rows(single._in_order(), np.array([[5, 6, 7]]))


def test_a_rotating_batch_must_know_lengths(tokens):
    cache = PackedBatchRotatingKVCache(tokens.format, 8, [0, 0])
    with pytest.raises(ValueError, match="needs lengths, got none"):
        cache.prepare(right_padding=[0, 3])


def test_max_kv_size_of_a_batch_generator():
    """mlx-lm before 0.32 bounds its own classes there, and no others."""
    model, tokenizer = load_float32("tiny-qwen2-8bit")
    mlx_kvq.enable(model, "int4-srft:calibrate=off", verbose=False)
    generator = BatchGenerator(model, max_tokens=4, max_kv_size=32)
    generator.insert([tokenizer.encode("They walked along the river")])
    made = generator._unprocessed_sequences[0]
    caches = next(x for x in made if isinstance(x, list) and hasattr(x[0], "nbytes"))
    assert {getattr(c, "max_size", None) for c in caches} == {32}
    mlx_kvq.disable(model)


def test_max_kv_size_where_a_program_hands_on_caches_without_it():
    """As vllm-mlx does, which bounds those that it knows by their class."""
    model, tokenizer = load_float32("tiny-qwen2-8bit")
    mlx_kvq.enable(model, "int4-srft:calibrate=off", verbose=False)
    ids = tokenizer.encode("They walked along the river")
    used = make_prompt_cache(model)
    model(mx.array([ids]), cache=used)
    fresh = [make_prompt_cache(model) for _ in range(2)]
    sizes = {}
    for size in (32, None):
        generator = BatchGenerator(model, max_tokens=4, max_kv_size=size)
        generator.insert([ids] * 4, caches=[fresh[0], None, used, [KVCache() for _ in used]])
        sizes[size] = [
            next(x for x in made if isinstance(x, list) and hasattr(x[0], "nbytes"))
            for made in generator._unprocessed_sequences
        ]
    bounded, _, kept, own = sizes[32]
    assert {c.max_size for c in bounded} == {32}
    assert kept is used and {type(c) for c in own} == {KVCache}
    assert sizes[None][0] is fresh[0]
    mlx_kvq.disable(model)
