"""Where a cached prompt goes on, and what mlx-lm's loops tell the caches of a prompt."""

import copy
import sys
from array import array
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    make_prompt_cache,
    trim_prompt_cache,
)

import mlx_kvq
from mlx_kvq.caches import attention, prompts, seams
from mlx_kvq.caches.rotating import PackedRotatingKVCache
from mlx_kvq.caches.single import PackedKVCache
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.stock import leaves
from tests.support import float32

BLOCK = 16
D = 32


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", BLOCK)


def growing(recent=3):
    return PackedKVCache(make_format(Spec.parse(f"int4-srft:recent={recent}"), D))


def ring(max_size, recent=3):
    return PackedRotatingKVCache(growing(recent).format, max_size)


def singles(caches) -> list[Any]:
    return [cache for _, cache in leaves(caches)]


def feed(cache, n):
    x = mx.ones((1, 2, n, D))
    cache.update_and_fetch(x, x)


def read(n, *caches, decoded=0):
    """Caches of a prompt of n tokens, and some that were decoded after it."""
    for cache in singles(caches):
        cache.reading = n
        feed(cache, n)
        for _ in range(decoded):
            feed(cache, 1)
    return list(caches)


@pytest.mark.parametrize(
    "read_as_prompt, taken_back, at, end, expected",
    [
        (40, 0, 40, 60, True),  # the whole state
        (40, 0, 40, 40, False),  # nothing is left to read
        (40, 0, 40, 41, True),
        (40, 1, 39, 60, True),  # of the block's 8 one is taken back: 7, as many as are before 39
        (47, 1, 46, 60, True),
        (50, 3, 47, 60, False),  # the block begins at 32, of which nothing is in the tail
        (50, 2, 48, 60, True),  # a boundary needs nothing
        (50, 2, 48, 49, False),  # but the last token reads 3 exactly, 2 before its own
        (50, 2, 48, 50, True),  # here 1 before the two of them
        (51, 3, 48, 50, False),
        (51, 3, 48, 51, True),
    ],
)
def test_goes_on(read_as_prompt, taken_back, at, end, expected):
    (cache,) = read(read_as_prompt, growing())
    cache.trim(taken_back)
    assert cache.offset == at
    assert cache.goes_on(at, end) is expected


@pytest.mark.parametrize("n, taken_back, expected", [(50, 3, 47), (50, 2, 58)])
def test_a_block_that_is_not_exact_ends_what_was_read_as_a_prompt(n, taken_back, expected):
    (cache,) = read(n, growing())
    cache.trim(taken_back)
    assert read(10, cache)[0].prompt == [expected]


def test_goes_on_needs_a_prompt_and_no_more_than_there_is():
    (decoded,) = read(40, growing(), decoded=1)
    assert not decoded.goes_on(41, 60)
    (short,) = read(1, growing())
    assert short.goes_on(1, 2)  # one exact token before the last, where there is no second
    (narrow,) = read(44, ring(5))
    narrow_exact = narrow.exact[0]
    assert narrow_exact == 4 < 44 % BLOCK
    assert narrow.goes_on(44, 60)  # a window of 5 sees no more


@pytest.mark.parametrize(
    "n, decoded, taken_back, expected",
    [(40, 0, 0, False), (40, 5, 0, True), (40, 5, 1, False), (40, 5, 5, False), (0, 2, 0, True)],
)
def test_has_decoded(n, decoded, taken_back, expected):
    cache = growing()
    if n:
        read(n, cache)
    for _ in range(decoded):
        feed(cache, 1)
    cache.trim(taken_back)
    assert cache.has_decoded(cache.offset) is expected


def resumed(caches, at, end):
    """The token from which ``caches`` are to be fed, which is where all of them end."""
    found = prompts.resume(caches, at, end)
    if found:
        assert {single.offset for single in singles(caches)} == {found}
    return found


def taken_back(n, *caches):
    for cache in caches:
        cache.trim(n)
    return list(caches)


def test_resume_goes_on_with_a_whole_state():
    assert resumed(read(40, growing(), growing()), 40, 60) == 40


def test_resume_leaves_other_caches_alone():
    stock = KVCache()
    feed(stock, 40)
    assert resumed([stock], 40, 40) == 40
    assert resumed(taken_back(3, *read(50, growing(recent=0))), 47, 47) == 47
    both = [*read(40, growing()), *read(40, growing(recent=0))]
    assert resumed(both, 40, 60) == 40


def test_resume_leaves_a_conversation_as_it_is():
    assert resumed(read(40, growing(), growing(), decoded=5), 45, 60) == 45
    # With nothing more to come the last token is read again, and the prompt before it.
    assert resumed(read(40, growing(), decoded=5), 45, 45) == 32


def test_resume_steps_back_to_a_block():
    """If one of the caches must."""
    assert resumed(taken_back(3, *read(50, growing(), growing())), 47, 60) == 32
    one, other = read(47, growing()), taken_back(3, *read(50, growing()))
    assert resumed([*one, *other], 47, 60) == 32
    # Where one has decoded and the other was read as a prompt only.
    mixed = [*read(40, growing(), decoded=5), *taken_back(3, *read(48, growing()))]
    assert resumed(mixed, 45, 60) == 32
    # In a list, beside a cache of mlx-lm.
    stock = KVCache()
    feed(stock, 47)
    nested = [CacheList(*taken_back(3, *read(50, growing())), stock)]
    assert resumed(nested, 47, 60) == 32


def test_resume_does_not_go_before_what_was_read_as_a_prompt():
    (cache,) = read(20, growing(), decoded=40)
    cache.trim(5)
    assert resumed([cache], 55, 80) == 16


@pytest.mark.parametrize("recent, expected", [(3, 48), (4, 48), (5, 32), (20, 32), (21, 16)])
def test_resume_stays_away_from_the_end(recent, expected):
    """The last token reads ``recent`` tokens exactly, which must all be read again; it may take
    more than a block."""
    caches = taken_back(30, *read(80, growing(recent), growing(recent=2)))
    assert resumed(caches, 50, 52) == expected
    assert resumed(read(80, growing()), 80, 80) == 64


def test_resume_from_the_beginning():
    """What lies in the first block is of no use."""
    assert resumed(taken_back(7, *read(19, growing())), 12, 30) == 0
    assert resumed(taken_back(3, *read(19, growing())), 16, 17) == 0
    assert resumed(taken_back(30, *read(80, growing(60))), 50, 52) == 0


def test_resume_without_a_way_back():
    """A cache that cannot be trimmed, packed or not."""
    (cache,) = read(50, growing())
    state = ArraysCache(1)
    assert resumed([cache, state], 50, 50) == 0
    assert (cache.offset, cache.prompt) == (50, [50])
    assert resumed(read(50, ring(30)), 50, 50) == 0
    assert resumed(read(50, ring(60)), 50, 50) == 32


class Nearest:
    """Of LRUPromptCache, what a seam sees."""

    def __init__(self, found, matched):
        self.found, self.matched = found, matched

    @prompts.fetching
    def fetch_nearest_cache(self, model, tokens):
        return self.found, tokens[self.matched :]


def test_fetching():
    tokens = list(range(60))
    assert Nearest(None, 0).fetch_nearest_cache("m", tokens) == (None, tokens)
    whole = read(40, growing())
    assert Nearest(whole, 40).fetch_nearest_cache("m", tokens) == (whole, tokens[40:])
    back = taken_back(3, *read(50, growing()))
    assert Nearest(back, 47).fetch_nearest_cache("m", tokens) == (back, tokens[32:])
    none = taken_back(7, *read(19, growing()))
    assert Nearest(none, 12).fetch_nearest_cache("m", tokens) == (None, tokens)


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = float32.load_float32("tiny-qwen2-8bit")
    mlx_kvq.enable(model, "int4-srft:recent=3,calibrate=off", verbose=False)
    return model, tokenizer


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("max_tokens, expected", [(0, 30), (1, 29), (4, 29)])
def test_generate_step_reads_all_that_is_a_prompt(loaded, max_tokens, expected, embedded):
    """All but the last token, from which decoding begins; without that, the last one, too."""
    model, tokenizer = loaded
    (ids,) = (mx.array(p) for p in float32.prompts(tokenizer, [30]))
    cache = make_prompt_cache(model)
    more = {"prefill_step_size": 7}
    if embedded:
        # A prompt may then be empty.
        more["input_embeddings"] = model.model.embed_tokens(ids)
        model = embeddable(model)
    prompt = mx.array([], mx.int32) if embedded else ids
    list(generate_step(prompt, model, max_tokens=max_tokens, prompt_cache=cache, **more))
    assert {c.prompt[0] for c in cache} == {expected}
    assert {c.reading for c in cache} == {0}


def embeddable(model):
    """mlx-lm asks for the argument by name; of its models few have it."""

    class Embeddable:
        layers = model.layers

        def __call__(self, inputs, cache=None, input_embeddings=None):
            if input_embeddings is None:
                return model(inputs, cache=cache)
            h = model.model(inputs, cache, input_embeddings)
            return model.model.embed_tokens.as_linear(h)

    return Embeddable()


class Told:
    """A loop like mlx-lm's that keeps what its caches were told."""

    def __init__(self):
        self.caches = self.reading = None

    def _look(self, caches):
        self.caches = caches
        self.reading = caches and [single.reading for single in singles(caches)]
        yield self.reading

    def alone(self, prompt, model, *, max_kv_size=None, prompt_cache=None, input_embeddings=None):
        yield from self._look(prompt_cache)

    def drafted(self, prompt, model, draft_model, *, prompt_cache=None):
        yield from self._look(prompt_cache)


def test_generating_makes_the_caches_that_were_not_given(loaded):
    model, _ = loaded
    told = Told()
    steps = prompts.generating(told.alone)(mx.zeros(9, mx.int32), model, max_kv_size=40)
    assert next(steps) == [8] * len(model.layers)
    assert {c.max_size for c in told.caches} == {40}
    steps.close()  # a reader that stops leaves no cache expecting more of a prompt
    assert {c.reading for c in told.caches} == {0}


def test_generating_reaches_the_caches_in_a_list(loaded):
    given = [CacheList(growing(), KVCache()), growing()]
    told = Told()
    steps = prompts.generating(told.alone)(mx.zeros(9, mx.int32), loaded[0], prompt_cache=given)
    with pytest.raises(AttributeError):
        next(steps)  # mlx-lm's has none
    assert [given[0][0].reading, given[1].reading] == [0, 0]


@pytest.mark.parametrize("given", [False, True])
def test_drafting(loaded, given):
    """With the caches of both models, one after the other, as mlx-lm takes them."""
    model, _ = loaded
    layers = len(model.layers)
    both = [*make_prompt_cache(model), *make_prompt_cache(model)] if given else None
    told = Told()
    steps = prompts.drafting(told.drafted)(mx.zeros(9), model, model, prompt_cache=both)
    assert next(steps) == [8] * (2 * layers)
    assert given is False or told.caches is both
    steps.close()
    assert {c.reading for c in told.caches} == {0}


def test_drafting_leaves_a_model_to_mlx_lm_whose_caches_are_not_one_a_layer():
    class Other:
        layers = [None]

        def make_cache(self):
            return [growing(), growing()]

    told = Told()
    assert list(prompts.drafting(told.drafted)(mx.zeros(9), Other(), Other())) == [None]
    assert told.caches is None


def steps_of(model, prompt, cache, n=4):
    """Tokens and what they were chosen by, of a prompt that goes on over a cache."""
    steps = generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=cache)
    return [(token, logprobs) for token, logprobs in steps]


def are_alike(a, b):
    return [t for t, _ in a] == [t for t, _ in b] and all(
        mx.array_equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("n, at", [(50, 47), (50, 30), (50, 12), (20, 19), (10, 5), (50, 32)])
def test_a_trimmed_cache_goes_on_as_if_all_were_read_at_once(loaded, n, at):
    """Where another program took back what a new prompt does not share, and hands on the rest."""
    model, tokenizer = loaded
    first, other = float32.prompts(tokenizer, [n, 30])
    prompt = first[:at] + other
    cache = make_prompt_cache(model)
    steps_of(model, first, cache, 6)
    held = cache[0].offset
    assert list(cache[0].tokens)[:n] == first and len(cache[0].tokens) == held
    kept = copy.deepcopy(cache)
    trim_prompt_cache(kept, held - at)
    assert len(kept[0].tokens) == at and len(cache[0].tokens) == held
    fresh = make_prompt_cache(model)
    assert are_alike(steps_of(model, other, kept), steps_of(model, prompt, fresh))
    assert kept[0].prompt == fresh[0].prompt
    assert list(kept[0].tokens) == list(fresh[0].tokens)


def test_the_last_token_of_a_known_prompt_alone(loaded):
    """A prompt that is asked again: everything is taken back but its last token's past."""
    model, tokenizer = loaded
    (prompt,) = float32.prompts(tokenizer, [40])
    cache = make_prompt_cache(model)
    first = steps_of(model, prompt, cache, 6)
    trim_prompt_cache(cache, cache[0].offset - 39)
    assert are_alike(steps_of(model, prompt[39:], cache, 6), first)


def test_a_conversation_is_not_read_again(loaded):
    model, tokenizer = loaded
    (prompt,) = float32.prompts(tokenizer, [40])
    cache = make_prompt_cache(model)
    steps_of(model, prompt, cache, 6)
    held = cache[0].offset
    steps_of(model, prompt[:9], cache, 1)
    assert cache[0].prompt == [39] and cache[0].offset == held + 10 == len(cache[0].tokens)


def test_tokens_that_nobody_noted_are_not_read_again(loaded):
    """Fed by the caller's own hand, from a file, or taken back while they were generated."""
    model, tokenizer = loaded
    (prompt,) = float32.prompts(tokenizer, [40])

    def ends_at(cache):
        at = cache[0].offset
        steps_of(model, prompt[:9], cache, 1)
        return cache[0].offset - at - 1  # the token that comes after

    own = make_prompt_cache(model)
    model(mx.array([prompt]), cache=own)
    trim_prompt_cache(own, 3)
    assert ends_at(own) == 9
    cache = make_prompt_cache(model)
    steps_of(model, prompt, cache, 2)
    loaded_again = [copy.copy(c) for c in cache]
    for new, old in zip(loaded_again, cache, strict=True):
        new.state = old.state
    trim_prompt_cache(loaded_again, 3)
    assert ends_at(loaded_again) == 9
    rewound = make_prompt_cache(model)
    for _ in generate_step(mx.array(prompt), model, max_tokens=4, prompt_cache=rewound):
        trim_prompt_cache(rewound, 1)
    assert len(rewound[0].tokens) == 0
    again = copy.deepcopy(cache)
    again[0].state = own[0].state
    assert len(again[0].tokens) == 0 < len(cache[0].tokens)


def test_a_full_window_goes_on_as_it_is():
    (cache,) = read(50, ring(30))
    cache.tokens = array("q", range(50))
    again = prompts._with_what_is_missing([cache], mx.arange(3))
    assert again.tolist() == [0, 1, 2] and cache.offset == 50


@pytest.fixture
def rapid_mlx(monkeypatch):
    """A program of that name, which rebuilds caches as mlx-lm's own."""
    host, module = ModuleType("rapid_mlx"), ModuleType("rapid_mlx.memory_cache")
    source = (
        "def _trim_cache_offset(cache, trim_by):\n    return [(c.keys, c.values) for c in cache]"
    )
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, "rapid_mlx", host)
    monkeypatch.setitem(sys.modules, "rapid_mlx.memory_cache", module)
    return module


def test_rapid_mlx_trims_packed_caches(rapid_mlx):
    trim = rapid_mlx._trim_cache_offset
    kept = read(50, growing(), ring(60))
    with pytest.raises(AttributeError):  # as it is without us
        trim(kept, 3)
    seams.install()
    copies = trim(kept, 3)
    assert [c.offset for c in copies] == [47, 47] and [c.offset for c in kept] == [50, 50]
    by_hand = taken_back(3, *copy.deepcopy(kept))
    for ours, expected in zip(copies, by_hand, strict=True):
        assert mx.array_equal(ours._in_order(), expected._in_order())
        assert mx.array_equal(ours.tail[:, :, -3:], expected.tail[:, :, -3:])
    assert trim(kept, 51) is None and trim(read(50, ring(30)), 3) is None
    stock = KVCache()
    feed(stock, 5)
    assert trim([stock], 2)[0][0] is stock.keys


def test_a_rapid_mlx_that_trims_in_another_way_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapid_mlx", ModuleType("rapid_mlx"))
    seams.install()
    monkeypatch.setitem(sys.modules, "rapid_mlx.memory_cache", ModuleType("other"))
    seams.install()
