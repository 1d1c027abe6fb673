"""Reuse of what prompts have in common, in memory and from files."""

import os
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import stream_generate

import mlx_kvq
from mlx_kvq.caches import prefix
from mlx_kvq.caches.attention import BLOCK
from tests.support.families import build
from tests.support.float32 import load_float32, prompts

INT4 = "int4-srft:calibrate=off"
NO_TAIL = "int4-srft:calibrate=off,recent=0"


@pytest.fixture(scope="module")
def built():
    made = build("qwen2")
    made.set_dtype(mx.float32)
    return made


@pytest.fixture
def model(built):
    yield built
    mlx_kvq.disable(built)


@pytest.fixture(scope="module")
def long(built):
    vocabulary = built.model.embed_tokens.weight.shape[0]
    return np.random.RandomState(0).randint(3, vocabulary, 700).tolist()


def feed(model, caches, tokens):
    """Logits of the last token."""
    return np.array(model(mx.array([tokens]), cache=caches)[0, -1])


@pytest.mark.parametrize(("spec", "at"), [("fp16", 600), (INT4, BLOCK), (NO_TAIL, 600)])
def test_goes_on_from_what_is_shared(model, long, spec, at):
    """After a decoded token, with an exact tail, from a multiple of 512; as without reuse then."""
    mlx_kvq.enable(model, spec, verbose=False)
    prefixes = mlx_kvq.PrefixCache(model)
    caches, rest = prefixes.fetch(long)
    assert rest == long and all(c.empty() for c in caches)
    feed(model, caches, rest)
    feed(model, caches, [5])
    prefixes.insert([*long, 5], caches)
    other = [*long[:600], *long[100:140]]
    caches, rest = prefixes.fetch(other)
    assert rest == other[at:] and {c.offset for c in caches} == {at}
    cold = feed(model, mlx_kvq.make_prompt_cache(model, spec, calibration=None), other)
    np.testing.assert_allclose(feed(model, caches, rest), cold, atol=2e-3)


@pytest.mark.parametrize("spec", ["fp16", INT4, NO_TAIL])
def test_the_same_prompt_again_has_a_token_to_feed(model, long, spec):
    mlx_kvq.enable(model, spec, verbose=False)
    prefixes = mlx_kvq.PrefixCache(model)
    for prompt in (long, long[:5], long[:1]):
        caches, rest = prefixes.fetch(prompt)
        feed(model, caches, rest)
        prefixes.insert(prompt, caches)
        caches, rest = prefixes.fetch(prompt)
        assert rest and {c.offset for c in caches} == {len(prompt) - len(rest)}


def test_another_kind_of_cache_is_not_offered(model, long):
    prefixes = mlx_kvq.PrefixCache(model)
    mlx_kvq.enable(model, INT4, verbose=False)
    caches, _ = prefixes.fetch(long)
    feed(model, caches, long)
    prefixes.insert(long, caches)
    mlx_kvq.enable(model, NO_TAIL, verbose=False)
    assert prefixes.fetch(long)[1] == long


def test_stream_generate():
    """A conversation: the text without reuse, and only what is new is read."""
    model, tokenizer = load_float32("tiny-qwen2-8bit")
    (long,) = prompts(tokenizer, [50])
    mlx_kvq.enable(model, NO_TAIL, verbose=False)
    prefixes = mlx_kvq.PrefixCache(model)
    talk, read = list(long[:50]), []
    for _ in range(3):
        expected = [r.token for r in stream_generate(model, tokenizer, talk, max_tokens=8)]
        found = list(prefixes.stream_generate(tokenizer, talk, max_tokens=8))
        assert [r.token for r in found] == expected
        read.append(found[0].prompt_tokens)
        talk += [*expected, *long[:10]]
    assert read == [50, 10, 10]
    # A loop that is left early keeps what was read.
    steps: Any = prefixes.stream_generate(tokenizer, [*long[:30], 5, 6], max_tokens=8)
    first = next(steps).token
    steps.close()
    assert prefixes.fetch([*long[:30], 5, 6, first, 7])[1] == [7]
    with pytest.raises(ValueError, match="has the prompt cache itself"):
        next(prefixes.stream_generate(tokenizer, talk, prompt_cache=[]))
    text = tokenizer.decode(long[:20])
    assert next(prefixes.stream_generate(tokenizer, text)).prompt_tokens >= 1


@pytest.mark.parametrize("spec", ["fp16", INT4])
def test_files_outlive_the_process(model, long, spec, tmp_path):
    mlx_kvq.enable(model, spec, verbose=False)
    said: list[str] = []
    folder = tmp_path / "prompts"
    first = mlx_kvq.PrefixCache(model, folder=folder, say=said.append)
    caches, _ = first.fetch(long)
    feed(model, caches, long)
    first.insert(long, caches)
    first.insert(long[:100], caches)  # too short for a file
    (file,) = folder.iterdir()
    # As a later process finds it.
    later = mlx_kvq.PrefixCache(model, folder=folder, say=said.append)
    caches, rest = later.fetch([*long, 1, 2])
    assert rest == [1, 2]  # of an unfinished block the file holds the exact tail
    cold = mlx_kvq.make_prompt_cache(model, spec)
    feed(model, cold, long)
    cold = feed(model, cold, [1, 2])
    np.testing.assert_allclose(feed(model, caches, rest), cold, atol=2e-3)
    assert said == [] and file.exists()


def test_a_longer_conversation_replaces_its_file(model, long, tmp_path):
    mlx_kvq.enable(model, NO_TAIL, verbose=False)
    prefixes = mlx_kvq.PrefixCache(model, folder=tmp_path)
    for n in (600, 650, 700):
        caches, rest = prefixes.fetch(long[:n])
        feed(model, caches, rest)
        prefixes.insert(long[:n], caches)
        assert len(list(tmp_path.iterdir())) == 1
    other = [7, *long[:600]]
    caches, rest = prefixes.fetch(other)
    feed(model, caches, rest)
    prefixes.insert(other, caches)
    assert len(list(tmp_path.iterdir())) == 2


def stored(model, long, folder, spec=NO_TAIL, **options):
    """Three prompts in files; returns the files, oldest first."""
    mlx_kvq.enable(model, spec, verbose=False)
    prefixes = mlx_kvq.PrefixCache(model, folder=folder, **options)
    for i in range(3):
        prompt = [i, *long[:600]]
        caches, rest = prefixes.fetch(prompt)
        feed(model, caches, rest)
        prefixes.insert(prompt, caches)
        for path in folder.glob("mlx_kvq-*"):
            os.utime(path, (os.stat(path).st_atime, os.stat(path).st_mtime - 10))
    return sorted(folder.glob("mlx_kvq-*"), key=lambda p: p.stat().st_mtime)


def test_the_bound_holds_and_nothing_else_is_deleted(model, long, tmp_path):
    theirs = [tmp_path / "notes.txt", tmp_path / "mlx_kvq-mine.safetensors"]
    for path in theirs:
        path.write_text("mine")
    one = stored(model, long, tmp_path / "a")[0].stat().st_size
    kept = stored(model, long, tmp_path, max_bytes=int(2.5 * one))
    assert sum(p.name.startswith("mlx_kvq-") and p not in theirs for p in kept) == 2
    assert all(path.read_text() == "mine" for path in theirs)


def test_files_of_others_are_left_alone_with_one_line(model, long, tmp_path):
    files = stored(model, long, tmp_path)
    said: list[str] = []
    mlx_kvq.enable(model, INT4, verbose=False)
    prefixes = mlx_kvq.PrefixCache(model, folder=tmp_path, say=said.append)
    for _ in range(2):
        assert prefixes.fetch([0, *long[:600]])[1] == [0, *long[:600]]
    assert said == [f"3 files in '{tmp_path}' are of another model or cache: not used"]
    assert all(path.exists() for path in files)


def test_a_damaged_file_is_not_used(model, long, tmp_path):
    files = stored(model, long, tmp_path)
    said: list[str] = []
    prefixes = mlx_kvq.PrefixCache(model, folder=tmp_path, say=said.append)
    for path in files:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert prefixes.fetch([0, *long[:600]])[1] == [0, *long[:600]]
    assert len(said) == 1 and "is not used" in said[0]
    files[0].unlink(missing_ok=True)  # and one that another process has deleted
    files[1].unlink()
    files[2].unlink()
    assert prefixes.fetch([1, *long[:600]])[1] == [1, *long[:600]]
    assert len(said) == 1


def test_what_is_no_argument(model, tmp_path):
    with pytest.raises(ValueError, match="max_size is an integer, at least 1, got 0"):
        mlx_kvq.PrefixCache(model, max_size=0)
    with pytest.raises(ValueError, match="at least one token, got none"):
        mlx_kvq.PrefixCache(model).fetch([])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        mlx_kvq.PrefixCache(model, folder=tmp_path / "file")


def test_images_among_the_tokens_are_not_stored(model, long, tmp_path):
    """mlx-lm's server puts the hash of an image in the place of its tokens."""
    folder = prefix.Folder(tmp_path, 1 << 30, print)
    kept = prefix.StoredPrompts(folder, lambda: model)
    mlx_kvq.enable(model, NO_TAIL, verbose=False)
    caches = mlx_kvq.make_prompt_cache(model, NO_TAIL)
    feed(model, caches, long)
    kept.insert_cache("m", ["image", *long[1:]], caches)
    assert kept.fetch_nearest_cache("m", ["image", *long[1:], 5])[1] == [5]
    assert not list(tmp_path.iterdir())
    absent = prefix.StoredPrompts(folder, lambda: None)  # with a draft model
    absent.insert_cache("m", long, caches)
    assert not list(tmp_path.iterdir())
