"""Speculative decoding over packed caches: the text of plain greedy decoding, whatever the draft
guesses, and every guess that was wrong is taken back."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache

import mlx_kvq
from mlx_kvq.caches import seams
from mlx_kvq.caches.rotating import PackedRotatingKVCache
from mlx_kvq.caches.single import PackedKVCache
from tests.support.float32 import MODELS, NAMES, TEXT, WINDOW, load_float32, prompts, write_float32
from tests.support.stock import Pair, Tokens


def _with_draft(name, window=None):
    """A model and, as its draft, the same without its last layer: right often, not always."""
    model, tokenizer = load_float32(name, window)
    draft, _ = load_float32(name, window)
    draft.model.layers = draft.model.layers[:-1]
    return model, draft, tokenizer


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    return _with_draft(request.param)


@pytest.mark.parametrize("spec, drafted", [("int4-srft", 3), ("k8v4-srft:calibrate=off", 1)])
def test_the_text_is_that_of_greedy_decoding(pair, spec, drafted):
    model, draft, tokenizer = pair
    mlx_kvq.enable(model, spec, verbose=False)
    mlx_kvq.enable(draft, spec, verbose=False)
    accepted = 0
    for prompt in prompts(tokenizer, [5, 40]):
        plain = [s.token for s in stream_generate(model, tokenizer, prompt, max_tokens=24)]
        cache = make_prompt_cache(model) + make_prompt_cache(draft)
        steps = list(
            stream_generate(
                model,
                tokenizer,
                prompt,
                max_tokens=24,
                draft_model=draft,
                num_draft_tokens=drafted,
                prompt_cache=cache,
            )
        )
        assert [s.token for s in steps] == plain
        accepted += sum(s.from_draft for s in steps)
        # No guess that was wrong stays in the target's cache; the last token may not be in it.
        (length,) = {c.offset for c in cache[: len(model.layers)]}
        assert length - len(prompt) - len(plain) in (-1, 0)
    assert 0 < accepted < 48


def test_the_text_past_a_full_window():
    """mlx-lm's rotating cache cannot rewind there, nor begin: ours keeps what a chunk drops until
    the next update. The draft's ring, fed token by token, cannot, and only guesses worse for it.
    """
    model, draft, tokenizer = _with_draft("tiny-gemma3-8bit", WINDOW)
    for m in (model, draft):
        mlx_kvq.enable(m, "int4-srft:calibrate=off", verbose=False)
    prompt, more = prompts(tokenizer, [WINDOW - 10, 3])
    turns = []
    for drafted in (0, 1, 4):
        cache, tokens, guessed = make_prompt_cache(model), [], 0
        if drafted:
            cache += make_prompt_cache(draft)
            kwargs = {"draft_model": draft, "num_draft_tokens": drafted}
        else:
            kwargs = {}
        for turn, length in ((prompt, 28), (more, 12)):
            tokens += turn
            rest = tokens[cache[0].offset :]
            steps = list(
                stream_generate(
                    model, tokenizer, rest, max_tokens=length, prompt_cache=cache, **kwargs
                )
            )
            tokens += [s.token for s in steps]
            guessed += sum(s.from_draft for s in steps)
        turns.append(tokens)
        assert (guessed > 0) == (drafted > 0)
        assert len(tokens) == WINDOW - 10 + 28 + 3 + 12
    assert turns[0] == turns[1] == turns[2]


def test_a_full_window_rewinds():
    """To the last bit what single tokens give, on the reference path."""
    model, tokenizer = load_float32("tiny-gemma3-8bit", WINDOW)
    mlx_kvq.enable(model, "int4-srft", verbose=False)
    start = WINDOW + 34
    (ids,) = prompts(tokenizer, [start + 40])
    plain, rewound = make_prompt_cache(model), make_prompt_cache(model)
    for cache in (plain, rewound):
        model(mx.array([ids[:start]]), cache=cache)
    for at in range(start, start + 20, 2):
        expected = [model(mx.array([[t]]), cache=plain)[0, 0] for t in ids[at : at + 2]]
        found = model(mx.array([[*ids[at : at + 2], 7, 8]]), cache=rewound)[0, :2]
        assert seams.rewind(rewound, 2) == 2
        assert {c.offset for c in rewound} == {at + 2}
        assert mx.array_equal(found, mx.stack(expected))


def test_rewind_is_exact_in_tokens():
    tokens = Tokens(count=512)
    for max_size, keep in [(8, 0), (8, 4), (20, 0)]:
        for n in range(4):
            ring, never = (Pair.rotating(tokens, max_size, keep) for _ in range(2))
            for p in (ring, never):
                p.update([list(range(30))])
            ring.ours.update_and_fetch(*tokens.exact([[30, 31, 32, 33]]))
            assert not ring.ours.is_trimmable()
            assert seams.rewind([ring.ours], n) == n
            never.update([list(range(30, 34 - n))] if n < 3 else [[30]])
            assert ring.ours.offset == never.ours.offset == 34 - n
            for ids in ([[40]], [[41, 42]], *([[i]] for i in range(50, 62))):
                for p in (ring, never):
                    p.ours.update_and_fetch(*tokens.exact(ids))
                held = [set(map(bytes, np.array(p.ours._in_order())[0, 0])) for p in (ring, never)]
                smaller, larger = sorted(held, key=len)
                assert smaller <= larger


def test_what_cannot_be_taken_back_is_left():
    fmt = PackedKVCache(Tokens(count=64).format).format
    x = mx.zeros((1, 2, 1, 64)), mx.zeros((1, 2, 1, 32))
    ring, growing = PackedRotatingKVCache(fmt, 4), PackedKVCache(fmt)
    for _ in range(6):
        ring.update_and_fetch(*x)
        growing.update_and_fetch(*x)
    assert seams.rewind([growing, ring], 1) == 0
    assert (growing.offset, ring.offset) == (6, 6)
    assert seams.rewind([growing], 2) == 2
    assert seams.rewind([], 2) == 0


def test_on_the_command_line(tmp_path):
    folder = write_float32("tiny-qwen2-8bit", tmp_path)

    def text(*options):
        process = subprocess.run(
            [Path(sys.executable).parent / "mlx_lm.generate", "--model", folder, "-m", "30",
             "--prompt", TEXT[:150], "--kv-cache", "int4-srft", *options],
            env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        return process.stdout.split("==========")[1], process.stderr.count("packed 4 of 4 layers")

    plain, _ = text()
    drafted, lines = text("--draft-model", MODELS / "tiny-qwen2-8bit", "--num-draft-tokens", "3")
    assert drafted == plain
    assert lines == 2  # both models


def test_a_draft_of_another_kind():
    """A sliding-window draft for a growing target: its own cache may lose tokens, the text not."""
    target, tokenizer = load_float32("tiny-qwen2-8bit")
    draft, _ = load_float32("tiny-gemma3-8bit", WINDOW)
    for model in (target, draft):
        mlx_kvq.enable(model, "int4-srft", verbose=False)
    (prompt,) = prompts(tokenizer, [WINDOW + 14])
    plain = [s.token for s in stream_generate(target, tokenizer, prompt, max_tokens=12)]
    steps = stream_generate(target, tokenizer, prompt, max_tokens=12, draft_model=draft)
    assert [s.token for s in steps] == plain
