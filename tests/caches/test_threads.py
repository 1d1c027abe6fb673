"""A cache goes on in another thread: nothing that it keeps waits for the thread that made it."""

import copy
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from mlx_lm import generate, stream_generate
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

import mlx_kvq
from tests.support.float32 import NAMES, WINDOW, load_float32, prompts

SPECS = ["int4-srft", "int4-srft:recent=0,first=0", "k8v4-srht:recent=3"]


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    return load_float32(request.param, WINDOW)


def elsewhere(work, *args):
    """The result of ``work`` in a thread that has ended when it returns."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *args).result()


def turn(loaded, prompt, cache, tokens=20):
    found = stream_generate(*loaded, prompt, max_tokens=tokens, prompt_cache=cache)
    return [r.token for r in found]


def decode(model, cache, ids):
    """Token by token, evaluating nothing but the logits, as mlx-lm does."""
    for i in ids:
        logits = model(mx.array([[i]]), cache=cache)
        mx.async_eval(logits)
    mx.eval(logits)
    return logits


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", [1, 40, WINDOW + 9])
def test_turns_in_threads_of_their_own(loaded, spec, length):
    model, tokenizer = loaded
    mlx_kvq.enable(model, spec, verbose=False)
    first, second = prompts(tokenizer, [length, 12])
    here, there = make_prompt_cache(model), make_prompt_cache(model)
    expected = [turn(loaded, p, here) for p in (first, second, second)]
    assert [elsewhere(turn, loaded, p, there) for p in (first, second, second)] == expected


@pytest.mark.parametrize("spec", SPECS[:2])
@pytest.mark.parametrize("tokens", [1, 17])
def test_every_state_goes_on_elsewhere(loaded, spec, tokens, tmp_path):
    """After single tokens, a copy, a trim, a file and a batch."""
    model, tokenizer = loaded
    mlx_kvq.enable(model, spec, verbose=False)
    (ids,) = prompts(tokenizer, [tokens])
    file = str(tmp_path / "cache.safetensors")

    def copied(cache):
        return copy.deepcopy(cache)

    def trimmed(cache):
        trim_prompt_cache(cache, min(3, tokens - 1))
        return cache

    def saved(cache):
        save_prompt_cache(file, cache)
        return load_prompt_cache(file)

    def batched(cache):
        both = [c.merge([c, copy.deepcopy(c)]) for c in cache]
        return [c.extract(1) for c in both]

    def of_batch(cache):
        both = [c.merge([c, copy.deepcopy(c)]) for c in cache]
        mx.eval(model(mx.array([[5], [6]]), cache=both))
        for c in both:
            c.filter([1])
        return both

    for change in (copied, trimmed, saved, batched, of_batch):

        def made(change=change):
            cache = make_prompt_cache(model)
            decode(model, cache, ids)
            return cache

        here = decode(model, change(made()), [7, 8, 9])
        cache = elsewhere(made)
        cache = elsewhere(change, cache)
        assert mx.array_equal(elsewhere(decode, model, cache, [7, 8, 9]), here), change.__name__


def test_a_running_batch_is_carried_on_elsewhere(loaded):
    model, tokenizer = loaded
    mlx_kvq.enable(model, "int4-srft", verbose=False)
    many = prompts(tokenizer, [30, 4, 70])

    def run(call):
        generator = BatchGenerator(model, max_tokens=12, stream=mx.default_stream(mx.cpu))
        found = {uid: [] for uid in generator.insert(many)}
        caches = {}
        while len(caches) < 3:
            for r in call(generator.next_generated):
                found[r.uid].append(r.token)
                if r.finish_reason:
                    caches[r.uid] = r.prompt_cache
        generator.close()
        return found, [caches[u] for u in sorted(caches)]

    (texts, kept), (again, others) = run(lambda f: f()), run(lambda f: f())
    assert texts == again
    for a, b in zip(kept, others, strict=True):
        assert mx.array_equal(decode(model, a, [1, 2]), elsewhere(decode, model, b, [1, 2]))


def test_generate_in_a_pool(loaded):
    """The case it was reported with."""
    model, tokenizer = loaded
    mlx_kvq.enable(model, "int4-srft", verbose=False)
    cache = make_prompt_cache(model)
    for prompt in ("It was a dark night", " and the old man"):
        text = elsewhere(
            lambda prompt=prompt: generate(
                model, tokenizer, prompt, max_tokens=5, prompt_cache=cache
            )
        )
        assert text
