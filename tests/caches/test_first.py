"""First tokens that are kept exactly: where they come from, and how caches with and without them
go together."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as stock

import mlx_kvq
from mlx_kvq import ops
from mlx_kvq.caches import prompt_file
from mlx_kvq.caches.attention import packed_attention
from mlx_kvq.caches.rotating import PackedRotatingKVCache
from mlx_kvq.caches.single import PackedKVCache
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from tests.support.float32 import load_float32, prompts
from tests.support.stock import Pair, Tokens
from tests.support.stock_batch import BatchPair, PaddedTokens

D, H = 64, 2


@pytest.fixture(scope="module")
def tokens():
    return Tokens("int4-srft:recent=0,first=5", count=300)


@pytest.mark.parametrize("chunks", [[1] * 8, [2, 2, 3, 1], [4, 20, 1], [30, 1], [5, 1], [3, 300]])
def test_they_come_in_chunks_of_any_length(tokens, chunks):
    pair, at = Pair.growing(tokens), 0
    for L in chunks:
        pair.step([[i % 300 for i in range(at, at + L)]])
        at += L
    assert pair.firsts == [[0, 1, 2, 3, 4]] and not pair.ours.oldest.filling


def test_what_was_taken_back_is_read_anew(tokens):
    pair = Pair.growing(tokens)
    pair.step([list(range(9))])
    pair.trim(6)
    pair.step([[50, 51]])
    assert pair.firsts == [[0, 1, 2, 50, 51]]
    pair.step([[52]])


@pytest.mark.parametrize("max_size", [4, 6, 12])
def test_a_ring_loses_them_one_by_one(tokens, max_size):
    pair = Pair.rotating(tokens, max_size)
    for i in range(20):
        pair.step([[i]])
    assert pair.ours._first().at == -5


def test_a_ring_that_keeps_some(tokens):
    for keep in (3, 5, 7):
        pair = Pair.rotating(tokens, 10, keep)
        for i in range(25):
            pair.step([[i]])
        assert pair.ours._first().numbers == (min(5, keep), 0)


def test_sequences_of_a_batch_have_their_own():
    padded = PaddedTokens("int4-srft:recent=2,first=5", count=600)
    for pair in (
        BatchPair.growing(padded, [0, 7, 11]), BatchPair.rotating(padded, 16, [0, 7, 11])
    ):  # fmt: skip
        for i in range(40):
            pair.step([[i], [100 + i], [200 + i]])
        assert pair.firsts[2] == [211, 212, 213, 214, 215]


def random(L, key):
    return mx.random.normal((1, H, L, D), key=mx.random.key(key))


def filled(first: int, L: int, key: int, kind=PackedKVCache) -> PackedKVCache:
    cache = kind(make_format(Spec.parse(f"int4-srft:recent=3,first={first}"), D))
    cache.update_and_fetch(random(L, key), random(L, key + 1))
    return cache


def attended(cache, B: int) -> np.ndarray:
    k, q = random(B, 8).reshape(B, H, 1, D), random(2 * B, 9).reshape(B, 2 * H, 1, D)
    mask = cache.make_mask(1, window_size=None)
    views = cache.update_and_fetch(k, k)
    return np.array(packed_attention(q, *views, scale=0.1, mask=mask))


@pytest.mark.parametrize("order", [(0, 4), (4, 0), (2, 4)])
def test_caches_that_keep_more_and_less_join(order):
    """What one has not kept is what its rows say: it goes on as it would have alone."""
    lengths = list(zip(order, (30, 41), strict=True))
    for make in (
        lambda cs: cs[0].merge(cs), lambda cs: joined(*(c.merge([c]) for c in cs))
    ):  # fmt: skip
        caches = [filled(first, L, 10 * i) for i, (first, L) in enumerate(lengths)]
        alone = [filled(first, L, 10 * i) for i, (first, L) in enumerate(lengths)]
        batch = make(caches)
        assert batch.format.first == 4 and batch.oldest.array.shape == (2, H, 4, 2 * D)
        k, q = random(2, 8).reshape(2, H, 1, D), random(4, 9).reshape(2, 2 * H, 1, D)
        mask = batch.make_mask(1, window_size=None)
        got = packed_attention(q, *batch.update_and_fetch(k, k), scale=0.1, mask=mask)
        for i, cache in enumerate(alone):
            views = cache.update_and_fetch(k[i : i + 1], k[i : i + 1])
            want = packed_attention(q[i : i + 1], *views, scale=0.1)
            np.testing.assert_allclose(np.array(got[i : i + 1]), np.array(want), atol=2e-6)
        single = batch.extract(1)
        assert mx.array_equal(single.oldest.array, batch.oldest.array[1:])


def joined(a, b):
    a.extend(b)
    return a


def test_a_file_without_them_goes_on_in_a_model_that_keeps_them(tmp_path):
    """As files of version 0.1.0: what it had is read from rows, as before."""
    model, tokenizer = load_float32("tiny-qwen2-8bit")
    path = str(tmp_path / "c.safetensors")
    tokens = mx.array(prompts(tokenizer, [30]))
    try:
        mlx_kvq.enable(model, "int4-srft:calibrate=off,first=0", verbose=False)
        caches = stock.make_prompt_cache(model)
        model(tokens, cache=caches)
        stock.save_prompt_cache(path, caches)
        want = model(mx.array([[7]]), cache=caches)
        mlx_kvq.enable(model, "int4-srft:calibrate=off", verbose=False)
        again = stock.load_prompt_cache(path)
        prompt_file.check(again, model)
        assert {c.format.first for c in again} == {4}
        np.testing.assert_allclose(
            np.array(model(mx.array([[7]]), cache=again)), np.array(want), atol=1e-4
        )
        mlx_kvq.enable(model, "int4-srft:calibrate=off,recent=5", verbose=False)
        with pytest.raises(ValueError, match="recent 64, asked for 5"):
            prompt_file.check(stock.load_prompt_cache(path), model)
    finally:
        mlx_kvq.disable(model)


@pytest.mark.parametrize("kind", ["growing", "ring"])
def test_a_file_of_an_fp16_model_with_exact_tokens_in_fp32(kind):
    """As they were kept before they were kept in bf16: half the bytes, and it goes on alike."""
    fmt = make_format(Spec.parse("int4-srft:recent=3"), D)
    make = PackedKVCache if kind == "growing" else lambda fmt: PackedRotatingKVCache(fmt, 16, 4)
    cache, loaded = make(fmt), make(fmt)
    half = [random(12, i).astype(mx.float16) for i in (1, 2)]
    cache.update_and_fetch(*half)
    cache.update_and_fetch(*(x[:, :, :1] for x in half))
    assert cache.tail.dtype == cache.oldest.array.dtype == mx.bfloat16
    exact = cache.tail, cache.oldest.array
    state = [x.astype(mx.float32) if any(x is a for a in exact) else x for x in cache.state]
    loaded.state = tuple(state)
    assert loaded.tail.dtype == loaded.oldest.array.dtype == mx.bfloat16
    assert loaded.exact_nbytes == cache.exact_nbytes
    q = random(2, 9).reshape(1, 2 * H, 1, D).astype(mx.float16)
    new = [x[:, :, 1:2] for x in half]
    got, want = (packed_attention(q, *c.update_and_fetch(*new), scale=0.1) for c in (loaded, cache))
    assert mx.array_equal(got, want)


def test_a_ring_that_lost_some_joins_a_batch():
    """The batch reads what the ring kept from rows: it does not know that others are missing."""
    fmt = make_format(Spec.parse("int4-srft:recent=3"), D)
    for gone in (1, 2, 30):
        one, other = (PackedRotatingKVCache(fmt, 16, keep=4) for _ in range(2))
        for cache in (one, other):
            cache.update_and_fetch(random(12, 1), random(12, 2))
            for i in range(4 + gone):
                cache.update_and_fetch(random(1, 3 + i), random(1, 40 + i))
        batch = one.merge([one])
        rows = other._in_order()
        plain = ops.Packed(rows, 16, fmt, other.tail[:, :, -3:])
        q = random(2, 9).reshape(1, 2 * H, 1, D)
        first = batch._first()
        got = ops.attend(q, ops.Packed(batch.rows, 16, fmt, plain.tail, None, first), 0.1)
        np.testing.assert_allclose(np.array(got), np.array(ops.attend(q, plain, 0.1)), atol=2e-6)


@pytest.mark.parametrize(
    "first, message",
    [
        (lambda: ops.First(mx.zeros((1, H, 4, 2 * D)), 5), "number of first tokens is at most 4"),
        (lambda: ops.First(mx.zeros((1, H, 4, 2 * D)), 4, 0.5), "place of first tokens is a whole"),
        (lambda: ops.First(mx.zeros((H, 4, 2 * D)), 1), "First tokens are .B, Hkv, F"),
        (lambda: ops.First(mx.zeros((1, H, 4, 2 * D)), 1, mx.zeros((2,), mx.int32)), "Places of"),
        (lambda: ops.First(mx.zeros((1, H, 4, D)), 1), "The first tokens are .1, 2, F, 128."),
        (lambda: ops.First(mx.zeros((1, H, 4, 2 * D), mx.bfloat16), 1), "in the tail's dtype"),
    ],
)
def test_what_does_not_fit_is_told(first, message):
    cache = filled(0, 9, 1)
    with pytest.raises(ValueError, match=message):
        packed = ops.Packed(cache.rows, 9, cache.format, cache.tail, None, first())
        ops.attend(random(2, 9).reshape(1, 2 * H, 1, D), packed, 0.1)
