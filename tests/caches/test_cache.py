"""The packed caches are mlx-lm's KVCache and RotatingKVCache, but for quantization."""

import copy
import itertools

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base
from mlx_lm.models import cache as stock_caches
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_kvq.caches import attention
from mlx_kvq.caches.attention import PackedView, packed_attention
from mlx_kvq.caches.rotating import PackedRotatingKVCache
from mlx_kvq.caches.seams import rewind
from mlx_kvq.caches.single import PackedKVCache
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from tests.support.stock import HEADS, K_DIM, V_DIM, Pair, Tokens, same_mask

FORMATS = {
    "int4": {},
    "plain": {"spec": "int4-srft:recent=0,first=0"},
    "calibrated": {"spec": "k8v4-srht:seed=7", "calibrated": True},
    "half": {"spec": "int4-srft:group_size=16,scale=absmax", "dtype": mx.float16},
    "bfloat": {"spec": "int8-none:scale=paper", "dtype": mx.bfloat16},
    "first 3": {"spec": "int4-srft:recent=0,first=3"},
    "first 6": {"spec": "int4-srft:recent=2,first=6", "calibrated": True},
    "exact 3": {"spec": "int4-srft:recent=3", "calibrated": True},
    "exact 400": {"spec": "int4-srht:recent=400", "dtype": mx.float16},  # more than a window
}
EXACT = ["int4", "exact 3", "exact 400", "first 3", "first 6"]
WORDS = make_format(Spec.parse("int4-srft"), K_DIM, V_DIM).layout.words
WINDOWS = [(8, 0), (8, 4), (7, 6), (1, 0), (300, 0), (300, 4)]  # max_size, keep

# Updates, as numbers of tokens.
CHUNKINGS = {
    "decode only": [1] * 30,
    "prompt, decode": [20, *[1] * 30],
    "chunks": [5, 3, 2, 8, 4],
    "chunks and decode": [3, 1, 1, 9, 1, 1, 1, 6, 2, 1],
    "one token, prompt": [1, 40, 1, 1],
    "long prompt in chunks": [128, 128, 100, 1, 1, 17, 1],
    "exactly a step": [256, 1, 255, 1, 256],
    "more than a step": [257, 1, 300, 1],
    "up to a step": [255, 1, 1],
}


@pytest.fixture(scope="module")
def known():
    """The same tokens for every test of a format, made once."""
    made = {}

    def tokens(name="int4"):
        if name not in made:
            made[name] = Tokens(**FORMATS[name])
        return made[name]

    return tokens


@pytest.fixture
def loadable(monkeypatch):
    """``load_prompt_cache`` finds classes in its module, where mlx_kvq puts them."""
    for cls in (PackedKVCache, PackedRotatingKVCache):
        monkeypatch.setattr(stock_caches, cls.__name__, cls, raising=False)


def kinds(tokens, windows=WINDOWS):
    """Each kind of cache, empty."""
    yield Pair.growing(tokens)
    for max_size, keep in windows:
        yield Pair.rotating(tokens, max_size, keep)


def chunks(lengths, B=1, first=0):
    """Fresh tokens ids [B, L] for each length; every sequence of the batch has its own."""
    for L in lengths:
        yield np.arange(first, first + L) + 1000 * np.arange(B)[:, None]
        first += L


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_same_tokens_in_the_same_places(known, chunking):
    for pair in kinds(known()):
        for ids in chunks(CHUNKINGS[chunking], B=2):
            pair.update(ids)


@pytest.mark.parametrize("name", FORMATS)
def test_attention_follows_the_stock_cache(known, name):
    """Decode, few queries, prefill chunks; masks, GQA, past the window, in every format."""
    for pair in kinds(known(name)):
        for ids in chunks([30, 1, 1, 2, 8, 9, 1, 40, 1, 1, 1, 5, 130, 1], B=2):
            pair.step(ids)


@pytest.mark.parametrize("L", [1, 2, 5, 8, 9, 64, 300])
@pytest.mark.parametrize("before", [1, 6, 290])
def test_attention_of_every_length(known, before, L):
    for pair in kinds(known()):
        for ids in chunks([before, L, 1, L]):
            pair.step(ids)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("before", [1, 6, 30])
def test_what_is_read_exactly(known, before, name):
    """Chunks of every length up to the most queries that read the tail, and one more."""
    for pair in kinds(known(name)):
        for ids in chunks([before, 1, 8, 2, 1, 9, 7, 3, 1, 8, 8, 20, 1, 2]):
            pair.step(ids)


@pytest.mark.parametrize("name", ["plain", "int4"])
@pytest.mark.parametrize("window_size", [1, 3, 6, 8, 40])
def test_attention_under_a_smaller_window(known, window_size, name):
    """gemma4 and others mask a cache by a window of their own, as booleans."""
    for pair in kinds(known(name), [(8, 0), (20, 0), (20, 4)]):
        for ids in chunks([4, 1, 1, 3, 1, 12, *[1] * 12, 30, 1]):
            pair.step(ids, window_size=window_size)


@pytest.mark.parametrize("name", ["plain", "exact 3", "int4"])
def test_attention_with_masks_as_arrays(known, name):
    for pair in kinds(known(name)):
        for ids in chunks([4, 1, 3, 12, 1, 2, 1]):
            pair.step(ids, return_array=True)


@pytest.mark.parametrize("name", ["calibrated", "exact 3", "int4"])
def test_attention_with_sinks(known, name):
    for pair in kinds(known(name), [(8, 0), (8, 4), (30, 0)]):
        for ids in chunks([4, 1, 3, 12, 1, 2, 1]):
            pair.step(ids, sinks=mx.array([0.5, -1.0, 2.0, 0.0]))


@pytest.mark.parametrize("name", ["plain", "exact 3", "int4"])
def test_arrays_for_models_that_attend_themselves(known, name):
    """As they are: while decoding, all of the tail that the last query may read; of the others, and
    of all of a prompt, what their rows keep."""
    tokens = known(name)
    for pair in kinds(tokens, [(8, 0), (8, 4), (30, 0)]):
        pair.ours.as_arrays = True
        for ids in chunks([4, 1, 3, 12, 1, 2, *[1] * 9]):
            arrays = pair.ours.update_and_fetch(*tokens.exact(ids))
            made, L, recent = pair._add_to_tails(ids), ids.shape[1], tokens.format.recent
            pair.stock.update_and_fetch(*tokens.kept(ids))
            held = tokens.ids_in_stock(*pair.stock.keys_and_values())
            order = pair._order(held.shape[1])
            in_order = (np.diff(order) == 1).all()
            exact = np.zeros(held.shape, bool)
            if made and L <= 8:
                keep = pair.ours._ring()[0] if pair.ours._ring() else 0
                tail = made[0][-(recent + L - 1) if in_order else -recent :]
                for age, (token, whole) in enumerate(reversed(tail[-(len(order) - keep) :])):
                    exact[0, order[-1 - age]] = whole and held[0, order[-1 - age]] == token
            assert exact.any() == (recent > 0 and L <= 8)
            pair._add_to_firsts(ids, [pair.stock.offset - L], None)
            if in_order or pair.stock.keep:  # of a ring that keeps none: from rows
                for place, count in pair._first_places(held.shape[1]):
                    exact[0, [t for t in range(place, place + count) if 0 <= t < len(order)]] = True
            exact = exact[:, None, :, None]
            for x, *sides in zip(
                arrays,
                (tokens.exact_k, tokens.exact_v),
                (tokens.kept_k, tokens.kept_v),
                strict=True,
            ):
                want = np.where(exact, *(np.swapaxes(t[:, held], 0, 1) for t in sides))
                np.testing.assert_allclose(np.array(x), want, rtol=0, atol=1e-5)


def outputs(cache, tokens, ids) -> np.ndarray:
    """[B, Hq, L, Dv] of the tokens ids [B, L]; each has queries of its own."""
    ids = np.asarray(ids)
    mask = cache.make_mask(ids.shape[1], return_array=False, window_size=None)
    views = cache.update_and_fetch(*tokens.exact(ids))
    q = mx.array(np.swapaxes(tokens._queries[0, :, ids % 1024], 1, 2)).astype(tokens.dtype)
    return np.array(packed_attention(q, *views, scale=K_DIM**-0.5, mask=mask))


@pytest.mark.parametrize("name", ["plain", "exact 3", "int4"])
@pytest.mark.parametrize("max_size, keep", [(None, 0), (8, 0), (40, 4)])
@pytest.mark.parametrize("drafted", [1, 4, 7])
def test_drafts_that_are_taken_back_leave_no_trace(known, name, max_size, keep, drafted):
    """To the last bit, chunk after chunk of guesses, all of them or some wrong."""
    tokens = known(name)
    fmt = tokens.format
    plain, drafting = (
        PackedKVCache(fmt) if max_size is None else PackedRotatingKVCache(fmt, max_size, keep)
        for _ in range(2)
    )
    for cache in (plain, drafting):
        outputs(cache, tokens, [list(range(12))])
    at = 12
    for right in (0, 1, drafted // 2, drafted, 0):
        right = min(right, drafted)
        real = list(range(at, at + 1 + right))
        wrong = list(range(1500, 1500 + drafted - right))
        together = outputs(drafting, tokens, [real + wrong])
        assert rewind([drafting], len(wrong)) == len(wrong)
        alone = [outputs(plain, tokens, [[i]]) for i in real]
        np.testing.assert_array_equal(together[:, :, : len(real)], np.concatenate(alone, axis=2))
        at += len(real)
        if plain.tail is not None:
            recent = min(fmt.recent, at)
            assert mx.array_equal(plain.tail[:, :, -recent:], drafting.tail[:, :, -recent:])


@pytest.mark.parametrize("window_size", [None, 6])
def test_a_query_reads_no_more_than_it_may(known, window_size):
    """What is masked is read neither from the tail nor from rows, and every other token counts."""
    tokens = known("exact 3")
    pair = Pair.growing(tokens)
    pair.update([list(range(10))])
    mask = pair.make_mask(1, window_size=window_size)
    views, held, exact = pair.update([[10]])
    assert exact[0, 0].tolist() == [True] * 4 + [False] * 4 + [True] * 3
    if mask is None:
        mask = mx.ones((1, 11), mx.bool_)
    q = tokens.queries(1, 1)
    for t in range(11):
        one = mask & (mx.arange(11) != t)
        out = packed_attention(q, *views, scale=K_DIM**-0.5, mask=one)
        want = pair.expected(q, held, exact, one)
        np.testing.assert_allclose(np.array(out), want, rtol=0, atol=1e-4)


def test_the_tail_takes_the_dtype_of_what_comes(known):
    """A conversation goes on in a model of another dtype."""
    tokens = known()
    for pair in kinds(tokens, [(8, 0)]):
        k, v = tokens.exact([[0, 1, 2]])
        pair.ours.update_and_fetch(k.astype(mx.float16), v.astype(mx.float16))
        views = pair.ours.update_and_fetch(*tokens.exact([[3]]))
        assert pair.ours.tail.dtype == views[0].dtype == mx.float32
        pair.ours.update_and_fetch(k.astype(mx.bfloat16), v.astype(mx.bfloat16))
        views = pair.ours.update_and_fetch(*tokens.exact([[3]]))
        packed_attention(tokens.queries(1, 1), *views, scale=0.1)
        assert pair.ours.oldest.array.dtype == pair.ours.tail.dtype == mx.float32


@pytest.mark.parametrize("name, exact", [("int4", True), ("plain", False)])
@pytest.mark.parametrize("L", [9, 40])
def test_a_prompt_of_one_block_attends_exactly(known, L, name, exact):
    """On the computed keys and values; a layer that reads another's cache, and ``recent=0``, read
    rows."""
    tokens = known(name)
    (ids,) = chunks([L])
    k, v = tokens.exact(ids)
    q = tokens.queries(1, L)
    for pair in kinds(tokens, [(300, 0), (300, 4)]):
        mask = pair.make_mask(L)
        want = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask=mask)
        first = packed_attention(q, *pair.ours.update_and_fetch(k, v), scale=0.125, mask=mask)
        again = packed_attention(q, *pair.ours.keys_and_values(), scale=0.125, mask=mask)
        error, quantized = (float(mx.abs(x - want).max()) for x in (first, again))
        assert (error < 1e-6) == exact
        assert quantized > 1e-2  # what quantization costs here


BLOCK = 16


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", BLOCK)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("name", FORMATS)
def test_blocks_of_a_prompt(known, name):
    """Chunks that begin and end anywhere, past the window, after decoding, with every mask."""
    for pair in kinds(known(name), [(8, 0), (8, 4), (20, 0), (300, 4)]):
        for ids in chunks([30, 9, 16, 50, 1, 1, 2, 10, 33, 1, 47]):
            pair.step(ids)
    for pair in kinds(known(name), [(20, 0), (300, 4)]):
        for i, ids in enumerate(chunks([40, 9, 21, 1, 40, 1])):
            pair.step(ids, return_array=bool(i % 2), window_size=None if i % 3 else 12)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("max_size, keep", [(None, 0), (20, 0), (12, 0), (80, 4)])
@pytest.mark.parametrize("cuts", [[16], [9], [13, 1, 5, 40], [1] * 30, [2, 3, 30, 31]])
def test_a_prompt_is_read_alike_however_it_is_cut(known, max_size, keep, cuts):
    """Rows, outputs and what decoding finds; in fp32, where rounding is far from the codes'
    boundaries. One token may be a chunk, too, where the cache was told that it is of a prompt."""
    tokens = known("calibrated")
    n = 75

    def read(cuts):
        cache = (
            PackedKVCache(tokens.format)
            if max_size is None
            else PackedRotatingKVCache(tokens.format, max_size, keep)
        )
        cache.reading = n
        outs, at = [], 0
        for L in [*cuts, n]:
            if L := min(L, n - at):
                outs.append(outputs(cache, tokens, [list(range(at, at + L))]))
                at += L
        assert (cache.reading, cache.prompt) == (0, [n])
        outs.append(outputs(cache, tokens, [[at]]))
        return cache, np.concatenate(outs, axis=2)

    (whole, first), (pieces, second) = read([n]), read(cuts)
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5)
    kept = min(whole.size(), 12)  # a chunk leaves more in a ring than single tokens
    assert mx.array_equal(whole._in_order()[:, :, -kept:], pieces._in_order()[:, :, -kept:])


@pytest.mark.usefixtures("short_blocks")
def test_a_mask_that_shows_later_tokens_keeps_a_chunk_whole(known):
    """Images in a prompt: a model's own mask is no prefix of causal ones."""
    tokens = known("int4")
    pair = Pair.growing(tokens)
    (ids,) = chunks([40])
    views = pair.ours.update_and_fetch(*tokens.exact(ids))
    q, (k, v) = tokens.queries(1, 40), tokens.exact(ids)
    for mask in (None, mx.ones((40, 40), mx.bool_)):
        out = packed_attention(q, *views, scale=0.125, mask=mask)
        want = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask=mask)
        np.testing.assert_allclose(np.array(out), np.array(want), rtol=0, atol=1e-5)


def test_a_chunk_after_trimming_all(known):
    for pair in kinds(known()):
        pair.update([[0]])
        pair.trim(1)
        pair.step([[1, 2, 3]])


@pytest.mark.parametrize("max_size, keep", WINDOWS)
def test_rotating_cache_keeps_the_first_and_the_last_tokens(known, max_size, keep):
    """Said without the stock class: what a window of max_size is."""
    pair = Pair.rotating(known(), max_size, keep)
    for ids in chunks([1] * (max_size + 3)):
        pair.update(ids)
    seen = max_size + 3
    last = range(seen - (max_size - keep), seen)
    assert sorted(pair.tokens_held()[0]) == [*range(keep), *last]


def test_capacity_grows_by_steps_of_256(known):
    """So that a decode step copies nothing; as the stock arrays, spelled out once."""
    growing = Pair.growing(known())
    rotating = Pair.rotating(known(), 300)
    capacities = []
    for ids in chunks([1, 254, 1, 1, 300]):
        growing.update(ids)
        capacities.append(growing.ours.rows.shape[2])
    assert capacities == [256, 256, 256, 512, 769]  # 257 tokens stay, two steps are added
    capacities = []
    for ids in chunks([1, *[1] * 256, 10, 1]):
        rotating.update(ids)
        capacities.append(rotating.ours.rows.shape[2])
    assert capacities == [*[256] * 256, 300, 267, 300]


def test_sizes_in_bytes():
    """136 bytes a token and KV head at D = 128, against 512 in fp16."""
    fmt = make_format(Spec.parse("int4-srft:recent=0,first=0"), 128)
    x = mx.zeros((1, HEADS, 256, 128), mx.float16)
    ours, stock = PackedKVCache(fmt), KVCache()
    ours.update_and_fetch(x, x)
    stock.update_and_fetch(x, x)
    assert ours.nbytes == 136 * HEADS * 256
    assert stock.nbytes == 512 * HEADS * 256
    tailed = PackedKVCache(make_format(Spec.parse("int4-srft"), 128))
    tailed.update_and_fetch(x[:, :, :200], x[:, :, :200])
    # A prompt's unfinished block, and the first tokens.
    assert tailed.nbytes == ours.nbytes + 512 * HEADS * (200 + 4)
    for _ in range(50):
        tailed.update_and_fetch(x[:, :, :1], x[:, :, :1])
        assert tailed.nbytes == ours.nbytes + 512 * HEADS * (64 + 4)


@pytest.mark.parametrize("name", ["plain", "exact 3", "int4"])
@pytest.mark.parametrize("n", [0, 1, 5, 19, 20, 25])
def test_trim(known, n, name):
    for pair in kinds(known(name), [(8, 0), (21, 0), (20, 4), (300, 4)]):
        trimmable = pair.stock.max_size > 20 if isinstance(pair.stock, RotatingKVCache) else True
        first, more = chunks([20, 30])
        pair.step(first)
        assert pair.trim(n) == (min(n, 20) if trimmable else 0)
        for i in range(12):  # overwrites the trimmed tokens, in place
            pair.step(more[:, i : i + 1])
        assert pair.trim(2) == (2 if pair.stock.is_trimmable() else 0)
        pair.step(more[:, 12:])


@pytest.mark.parametrize("prompt", [0, 1, 6, 7, 8, 9, 20])
def test_masks(known, prompt):
    """Every argument a model passes, at every place of the ring, before and after decoding."""
    for pair in kinds(known(), [(1, 0), (8, 0), (8, 4), (12, 1)]):
        for ids in chunks([*([prompt] if prompt else []), *[1] * 14]):
            for N, window_size, return_array in itertools.product(
                (1, 2, 3, 7, 8, 9, 30), (None, 1, 3, 7, 8, 9, 40), (False, True)
            ):
                pair.make_mask(N, window_size=window_size, return_array=return_array)
            pair.update(ids)


def test_masks_by_position_and_by_default(known):
    rotating = Pair.rotating(known(), 8)
    rotating.update([[0, 1, 2]])
    for arguments in ((1,), (4,), (4, 2), (1, 2), (2, None, True)):
        same_mask(rotating.ours.make_mask(*arguments), rotating.stock.make_mask(*arguments))
    growing = Pair.growing(known())
    growing.update([[0, 1, 2]])
    assert growing.ours.make_mask(1) is None
    assert growing.ours.make_mask(4) == "causal"


@pytest.mark.parametrize("N", [1, 5])
def test_models_get_their_mask_from_the_cache(known, N):
    """Through the function that every model calls, which asks for the cache's truth value."""
    h = mx.zeros((1, N, 16))
    for pair in kinds(known(), [(8, 0)]):
        for window_size, return_array in itertools.product((None, 3), (False, True)):
            masks = [
                base.create_attention_mask(h, cache, window_size, return_array)
                for cache in (pair.ours, pair.stock)
            ]
            same_mask(*masks)
        pair.update([list(range(9))])
        same_mask(*(base.create_attention_mask(h, c, 3) for c in (pair.ours, pair.stock)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("lengths", [[], [1], [5], [20, 1, 1], [1] * 11])
def test_state_and_files_hold_everything(known, loadable, tmp_path, name, lengths):
    for pair in kinds(known(name), [(8, 0), (8, 4)]):
        for ids in chunks(lengths):
            pair.update(ids)
        kept = pair.ours.format
        for restore in (
            pair.state_round_trip,
            lambda p=pair: p.save_and_load(tmp_path / "c.safetensors"),
        ):
            restore()
            assert pair.ours.format.signature == kept.signature
            # The dtype of an empty cache is not a model's yet.
            assert not lengths or pair.ours.dtype == known(name).dtype
            pair.step([[900]])  # goes on where it was
            pair.step([[901, 902, 903]])


@pytest.mark.parametrize("name", ["plain", "exact 3"])
@pytest.mark.parametrize("lengths", [[], [5], [1] * 11, [20]])
def test_a_copy_is_independent(known, lengths, name):
    for pair in kinds(known(name), [(8, 0), (30, 4)]):
        for ids in chunks(lengths):
            pair.update(ids)
        copied = pair.fork()
        for ids in chunks([1, 3, 1], first=400):  # in place, then by concatenation
            copied.step(ids)
        pair.check()
        pair.step([[300]])
        copied.check()


def test_a_cache_that_was_trimmed_to_nothing_can_be_stored(known, loadable, tmp_path):
    for pair in kinds(known("exact 3"), [(8, 0)]):
        pair.update([[0, 1, 2]])
        pair.trim(3)
        pair.state_round_trip()
        pair.save_and_load(tmp_path / "c.safetensors")
        pair.step([[3, 4]])


def test_a_copy_shares_the_format(known):
    """Calibration arrays are read-only, so a server's copies of a prompt need no second ones."""
    ours = PackedKVCache(known("calibrated").format)
    assert copy.deepcopy(ours).format is ours.format


def test_state_can_be_evaluated(known):
    """As mlx-lm does between the chunks of a prompt; without rows there is nothing to do."""
    for name in FORMATS:
        for pair in kinds(known(name), [(8, 4)]):
            mx.eval([pair.ours.state])
            pair.update([[0, 1, 2]])
            mx.eval([pair.ours.state])
            pair.check()


def test_quantized_already(known):
    """mlx-lm tells a quantized cache by ``bits``."""
    for pair in kinds(known("calibrated"), [(8, 0)]):
        pair.update([[0, 1, 2]])
        assert (pair.ours.bits, pair.ours.group_size) == (8, 64)


def test_views_stand_for_arrays(known):
    pair = Pair.growing(known())
    (keys, values), *_ = pair.update([[0, 1, 2], [1000, 1001, 1002]])
    arrays = pair.stock.keys_and_values()
    for view, array in zip((keys, values), arrays, strict=True):
        assert isinstance(view, PackedView)
        assert (view.shape, view.ndim) == (array.shape, array.ndim)
    assert (keys.shape[-1], values.shape[-1]) == (K_DIM, V_DIM)


def damaged(state, exact=False, **changes):
    """State (rows, ..., dtype, signature, arrays[, tail]) with some of it exchanged."""
    more = (3 * exact) + exact  # what is read exactly, the tail and the first tokens
    places = {"rows": 0, "dtype": -3 - more, "signature": -2 - more, "arrays": -1 - more}
    places |= {"tail": -2, "first": -1}
    state = list(state)
    for name, value in changes.items():
        state[places[name]] = value
    return state


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": "uint32"}, "not one of a model"),
        # Each is wrong in one thing only, so that each condition is seen.
        ({"rows": mx.zeros((1, HEADS, 4, WORDS), mx.float32)}, "not the uint32 rows"),
        ({"rows": mx.zeros((1, HEADS, 4, WORDS - 1), mx.uint32)}, "not the uint32 rows"),
        ({"rows": mx.zeros((1, 1, HEADS, WORDS, 4), mx.uint32)}, "not the uint32 rows"),
        ({"signature": "a cache"}, "not the signature"),
        ({"arrays": [None, None, None, mx.zeros((HEADS, V_DIM)), None, None]}, "damaged"),
    ],
)
def test_a_damaged_state_is_refused(known, changes, message):
    for pair in kinds(known("plain"), [(8, 0)]):
        pair.update([[0, 1, 2]])
        with pytest.raises(ValueError, match=message):
            type(pair.ours).from_state(damaged(pair.ours.state, **changes))


TAIL = (1, HEADS, 5, K_DIM + V_DIM)  # of three tokens, recent=3


@pytest.mark.parametrize(
    "tail",
    [
        None,
        mx.zeros(TAIL, mx.float16),
        mx.zeros(TAIL, mx.uint32),
        mx.zeros((1, HEADS, 2, K_DIM + V_DIM)),
        mx.zeros((1, HEADS, 5, K_DIM)),
        mx.zeros((1, 1, 5, K_DIM + V_DIM)),
        mx.zeros((2, HEADS, 5, K_DIM + V_DIM)),
        mx.zeros(TAIL[1:]),
    ],
    ids=str,
)
def test_a_damaged_tail_is_refused(known, tail):
    """Each is wrong in one thing only."""
    for pair in kinds(known("exact 3"), [(8, 0)]):
        pair.update([[0, 1, 2]])
        assert pair.ours.tail.shape == TAIL
        state = pair.ours.state
        with pytest.raises(ValueError, match="^The cache's tail, .*, is not what 'mlx_kvq/1;"):
            type(pair.ours).from_state(damaged(state, exact=True, tail=tail))
        for lacking in (state[:-1], [*state[:-2], state[-1]]):  # in a file
            with pytest.raises(ValueError, match="^The cache's (tail|first tokens), .* not what"):
                type(pair.ours).from_state(lacking)


@pytest.mark.parametrize(
    "first",
    [
        None,
        mx.zeros((1, HEADS, 4, K_DIM + V_DIM), mx.float16),
        mx.zeros((1, HEADS, 3, K_DIM + V_DIM)),
        mx.zeros((1, HEADS, 4, K_DIM)),
        mx.zeros((1, 1, 4, K_DIM + V_DIM)),
        mx.zeros((2, HEADS, 4, K_DIM + V_DIM)),
        mx.zeros((HEADS, 4, K_DIM + V_DIM)),
    ],
    ids=str,
)
def test_damaged_first_tokens_are_refused(known, first):
    """Each is wrong in one thing only."""
    for pair in kinds(known("exact 3"), [(8, 0)]):
        pair.update([[0, 1, 2]])
        with pytest.raises(ValueError, match="^The cache's first tokens, .*, are not what 'mlx"):
            type(pair.ours).from_state(damaged(pair.ours.state, exact=True, first=first))


def test_a_tail_that_was_not_asked_for_is_refused(known):
    for pair in kinds(known("plain"), [(8, 0)]):
        with pytest.raises(ValueError, match="^The cache's tail, .*, is not what 'mlx_kvq/1;"):
            type(pair.ours).from_state([*pair.ours.state, mx.zeros(TAIL)])
        pair.update([[0, 1, 2]])
        with pytest.raises(ValueError, match="^The cache's tail, .*, is not what 'mlx_kvq/1;"):
            type(pair.ours).from_state([*pair.ours.state, mx.zeros(TAIL)])


def test_keys_of_other_shapes_are_refused(known):
    for pair in kinds(known(), [(8, 0)]):
        x = mx.zeros((1, HEADS, 3, K_DIM))
        with pytest.raises(ValueError, match="head sizes 64 and 32"):
            pair.ours.update_and_fetch(x, x)
        assert pair.ours.empty()
        assert pair.ours.offset == 0


@pytest.mark.parametrize("n", [-1, 2.5, True])
def test_what_cannot_be_taken_back(known, n):
    for pair in kinds(known(), [(8, 0)]):
        pair.update([[0, 1, 2]])
        with pytest.raises(ValueError, match=f"^n is an integer, at least 0, got {n}.$"):
            pair.ours.trim(n)
        pair.check()


@pytest.mark.parametrize("name, value", [("max_size", 0), ("max_size", 2.5), ("keep", -1)])
def test_what_no_ring_can_be(known, name, value):
    with pytest.raises(ValueError, match=f"^{name} is an integer, at least .*, got {value}.$"):
        PackedRotatingKVCache(known().format, **({"max_size": 8} | {name: value}))


def test_a_ring_has_a_place_for_a_new_token(known):
    assert PackedRotatingKVCache(known().format, 8, 10**9).keep == 7
    for size in (1, 2, 3, 4):  # as max_kv_size makes them
        cache = PackedRotatingKVCache(known().format, size, 4)
        for L in (1, 1, 30, 1, 3, 1):
            views = cache.update_and_fetch(*known().exact([list(range(L))]))
            out = packed_attention(known().queries(1, L), *views, 0.125, cache.make_mask(L))
            assert bool(mx.isfinite(out).all())
        assert (cache.size(), cache.rows.shape[2]) == (size, size)


def test_updates_by_no_tokens(known):
    tokens = known()
    for pair in kinds(tokens, [(8, 0)]):
        cache = pair.ours
        for L in (0, 20, 0, 1, 0):
            ids = np.arange(L)[None].astype(int)
            views = cache.update_and_fetch(*tokens.exact(ids))
            out = packed_attention(tokens.queries(1, L), *views, scale=0.125)
            assert out.shape == (1, 4, L, V_DIM)
        assert cache.offset == 21
    for B, H in ((0, 2), (1, 0)):
        nothing = mx.zeros((B, H, 3, K_DIM)), mx.zeros((B, H, 3, V_DIM))
        views = PackedKVCache(tokens.format).update_and_fetch(*nothing)
        assert views[0].shape == (B, H, 3, K_DIM)
