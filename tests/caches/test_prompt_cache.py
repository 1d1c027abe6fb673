"""Prompt-cache files: what was saved goes on exactly, everything else is one clear error."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as stock

import mlx_kvq
from mlx_kvq.caches import prompt_file, seams
from mlx_kvq.caches.rotating import PackedRotatingKVCache
from mlx_kvq.caches.single import PackedKVCache
from mlx_kvq.format import format as formats
from mlx_kvq.model import pack
from tests.support.converted import made_up
from tests.support.float32 import NAMES, TEXT, WINDOW, load_float32, prompts, write_float32

SPEC = "int4-srft:calibrate=off"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    return load_float32(request.param, WINDOW)


@pytest.fixture(scope="module")
def qwen():
    return load_float32("tiny-qwen2-8bit")


@pytest.fixture(autouse=True)
def _disabled(request):
    yield
    for name in ("loaded", "qwen"):
        if name in request.fixturenames:
            mlx_kvq.disable(request.getfixturevalue(name)[0])


def read(model, tokenizer, n, **kwargs):
    """A cache of a prompt of n tokens."""
    cache = stock.make_prompt_cache(model, **kwargs)
    model(mx.array(prompts(tokenizer, [n])), cache=cache)
    mx.eval([c.state for c in cache])
    return cache


def saved(model, tokenizer, path, n=20, spec=SPEC):
    mlx_kvq.enable(model, spec, verbose=False)
    cache = read(model, tokenizer, n)
    stock.save_prompt_cache(str(path), cache, {"model": "somewhere", "note": "mine"})
    return cache


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        "k8v4-srht:seed=3,calibrate=off",
        "int4-srft",
        "int3-srft",
        "k4v3-none",
        "k5v4-srft",
        "int5-none",
    ],
)
def test_a_saved_prompt_goes_on_exactly(loaded, tmp_path, spec):
    model, tokenizer = loaded
    path = tmp_path / "cache.safetensors"
    cache = saved(model, tokenizer, path, WINDOW + 44, spec)
    again, metadata = stock.load_prompt_cache(str(path), return_metadata=True)
    assert metadata == {"model": "somewhere", "note": "mine"}
    prompt_file.check(again, model)
    mlx_kvq.disable(model)
    prompt_file.check(again, model)  # the file says how to read it
    for token in (5, 6):
        logits = [model(mx.array([[token]]), cache=c) for c in (cache, again)]
        assert mx.array_equal(*logits)


def test_a_file_from_before_windows_kept_fewer_tokens(tmp_path):
    """Its layers with a window hold 64 exact tokens and the first four, of which today's keep the
    newest ones and the first one."""
    model, tokenizer = load_float32("tiny-gemma3-8bit", WINDOW)
    mlx_kvq.enable(model, SPEC, verbose=False)
    own, ids = stock.make_prompt_cache(model), mx.array(prompts(tokenizer, [WINDOW + 44]))
    before = stock.make_prompt_cache(model)
    assert {c.format.recent for c in own} == {64, 16}
    for cache in before:
        cache.__init__(cache.format.in_window(None), *_window(cache))
    for caches in (own, before):
        model(ids, cache=caches)
        for token in range(9):
            model(mx.array([[token]]), cache=caches)
    stock.save_prompt_cache(str(tmp_path / "old.safetensors"), before)
    again = stock.load_prompt_cache(str(tmp_path / "old.safetensors"))
    assert {(c.tail.shape[2], c.oldest.array.shape[2]) for c in again} == {(64, 4)}
    prompt_file.check(again, model)
    assert {c.oldest.array.shape[2] for c in again} == {c.format.first for c in own} == {4, 1}
    got, want = (model(mx.array([[5]]), cache=caches) for caches in (again, own))
    assert {c.tail.shape[2] for c in again} == {c.tail.shape[2] for c in own} == {64, 16}
    assert mx.abs(got - want).max() < 0.05 * mx.abs(want).max()
    mlx_kvq.disable(model)


def _window(cache):
    return () if isinstance(cache, PackedKVCache) else (cache.max_size, cache.keep)


def test_a_file_name_without_its_ending(qwen, tmp_path):
    saved(*qwen, tmp_path / "cache")
    assert stock.load_prompt_cache(str(tmp_path / "cache.safetensors"))[0].offset == 20


def test_every_damage_is_found(qwen, tmp_path):
    """Cut anywhere, or with any byte changed: in the header, the numbers, the rows."""
    path, damaged = tmp_path / "cache.safetensors", tmp_path / "damaged.safetensors"
    saved(*qwen, path, 3)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    changes = [*rng.integers(0, len(whole), 60), 0, 3, 7, 8, 9, 100, len(whole) - 1]
    versions = [whole[:n] for n in (0, 4, 8, 50, len(whole) // 2, len(whole) - 1)]
    versions += [whole[:n] + bytes([whole[n] ^ 4]) + whole[n + 1 :] for n in changes]
    versions += [whole + b"\0"]
    for version in versions:
        damaged.write_bytes(version)
        with pytest.raises(ValueError, match=r"The prompt cache '.*damaged.safetensors' cannot be"):
            stock.load_prompt_cache(str(damaged))
    damaged.write_bytes(whole)
    stock.load_prompt_cache(str(damaged))


def test_a_file_that_was_not_finished(qwen, tmp_path, monkeypatch):
    """What was there before stays; of the new one nothing does."""
    path = tmp_path / "cache.safetensors"
    saved(*qwen, path)
    whole = path.read_bytes()
    monkeypatch.setattr(prompt_file, "_digest", lambda path: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        saved(*qwen, path, 30)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_without_its_hash(qwen, tmp_path, monkeypatch):
    path, digest = tmp_path / "cache.safetensors", prompt_file._digest
    with monkeypatch.context() as unhashed:
        unhashed.setattr(prompt_file, "_digest", lambda path: (prompt_file._UNSET, digest(path)[1]))
        saved(*qwen, path)
    with pytest.raises(ValueError, match="its bytes are not those that were written"):
        stock.load_prompt_cache(str(path))


def test_no_file(tmp_path):
    seams.install()
    with pytest.raises(FileNotFoundError, match=r"There is no prompt cache '.*none'"):
        stock.load_prompt_cache(str(tmp_path / "none"))


def test_another_version(qwen, tmp_path, monkeypatch):
    path = tmp_path / "cache.safetensors"
    monkeypatch.setattr(formats, "VERSION", formats.VERSION + 1)
    monkeypatch.setattr(formats, "_shared", {})
    saved(*qwen, path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="written in format version 2; this mlx_kvq reads 1"):
        stock.load_prompt_cache(str(path))


@pytest.mark.parametrize(
    "spec, says",
    [
        ("int8-srft", "bits int4, asked for int8"),
        ("int4-srht", "rotation srft, asked for srht"),
        ("int4-srft:seed=1", "seed 0, asked for 1"),
        ("int4-srft:group_size=32", "group_size 64, asked for 32"),
        ("int4-srft:scale=paper", "scale search, asked for paper"),
        ("int4-srft:seed=1,recent=3", "seed 0, asked for 1; recent 64, asked for 3"),
    ],
)
def test_another_spec(qwen, tmp_path, spec, says):
    """The message says which option differs, and nothing else."""
    path = tmp_path / "cache.safetensors"
    saved(*qwen, path)
    option = "," if ":" in spec else ":"
    mlx_kvq.enable(qwen[0], f"{spec}{option}calibrate=off", verbose=False)
    with pytest.raises(ValueError) as caught:
        prompt_file.check(stock.load_prompt_cache(str(path)), qwen[0])
    assert str(caught.value) == f"The prompt cache was packed with {says} (layer 0)."


@pytest.mark.parametrize(
    "spec, asked, says",
    [
        ("int4-srft", SPEC, "calibration on, asked for off"),
        (SPEC, "int4-srft", "calibration off, asked for on"),
        ("int4-srft", "other", "another calibration"),
        ("int4-srft", "int4-srft:rounding=feedback", "rounding nearest, asked for feedback"),
    ],
)
def test_another_calibration(qwen, tmp_path, spec, asked, says):
    path = tmp_path / "cache.safetensors"
    saved(*qwen, path, spec=spec)
    if asked == "other":
        mlx_kvq.enable(qwen[0], "int4-srft", calibration=made_up(), verbose=False)
    else:
        mlx_kvq.enable(qwen[0], asked, verbose=False)
    with pytest.raises(ValueError, match=f"was packed with {says}"):
        prompt_file.check(stock.load_prompt_cache(str(path)), qwen[0])


def test_another_model(qwen, tmp_path):
    path = tmp_path / "cache.safetensors"
    saved(*qwen, path)
    caches = stock.load_prompt_cache(str(path))
    with pytest.raises(ValueError, match="4 layers and this model 6: it was made with another"):
        prompt_file.check(caches, load_float32("tiny-gemma3-8bit")[0])
    tuned, _ = load_float32("tiny-qwen2-8bit")
    norm = tuned.model.layers[1].input_layernorm
    norm.weight = norm.weight + 0.1
    for spec in (SPEC, "fp16"):
        mlx_kvq.enable(tuned, spec, verbose=False)
        with pytest.raises(ValueError, match="with another model, or with other weights"):
            prompt_file.check(caches, tuned)


def test_unpacked_where_packed_was_asked_for(qwen, tmp_path):
    model, tokenizer = qwen
    path = str(tmp_path / "cache.safetensors")
    stock.save_prompt_cache(path, read(model, tokenizer, 5))
    caches = stock.load_prompt_cache(path)
    prompt_file.check(caches, model)  # as mlx-lm's own
    mlx_kvq.enable(model, SPEC, verbose=False)
    with pytest.raises(ValueError, match="holds a KVCache where PackedKVCache.*pack-cache"):
        prompt_file.check(caches, model)


def test_a_batch_cannot_hide_a_model(qwen):
    """The model's identity stays with the rows through a batch."""
    mlx_kvq.enable(qwen[0], SPEC, verbose=False)
    cache = read(*qwen, 5)[0]
    assert cache.model
    assert cache.merge([cache, cache]).extract(1).model == cache.model


@pytest.mark.parametrize("n", [3, WINDOW - 2, WINDOW + 80])
@pytest.mark.parametrize("max_kv_size", [None, 50])
def test_packing_a_cache(loaded, n, max_kv_size):
    """The same rows as if the prompt had been read packed, and the same places in the ring."""
    model, tokenizer = loaded
    own = read(model, tokenizer, n, max_kv_size=max_kv_size)
    for token in (7, 8, 9):  # into the ring
        model(mx.array([[token]]), cache=own)
    packed = pack.pack(own, model, SPEC)
    for a, b in zip(own, packed, strict=True):
        assert type(b).__name__ == "Packed" + type(a).__name__
        assert (a.offset, a.size()) == (b.offset, b.size())
        assert getattr(a, "_idx", None) == getattr(b, "_idx", None)
        assert getattr(a, "keep", None) == getattr(b, "keep", None)
        assert a.keys.shape[:3] == b.rows.shape[:3]
        assert a.nbytes / b.rows.nbytes > 7  # fp32 here
        assert b.format.spec.bits == "int4"
        length = min(a.offset, a.keys.shape[2])
        for age in (1, 3, 4, 16):  # the newest tokens, as they are
            if age <= min(length, b.format.recent) - getattr(a, "keep", 0):
                at = getattr(a, "_idx", a.offset) - age
                at += 0 if at >= getattr(a, "keep", 0) else length - getattr(a, "keep", 0)
                y = b.format.keys.forward(a.keys[:, :, at : at + 1])
                assert mx.allclose(b.tail[:, :, -age, : y.shape[-1]], y[:, :, 0], atol=1e-5)
    before = model(mx.array([[11]]), cache=own)
    after = model(mx.array([[11]]), cache=packed)
    assert 0 < mx.abs(before - after).max() < 3  # logits; quantized, and not something else
    assert mx.argmax(before) in mx.argsort(after[0, 0])[-5:]
    prompt_file.check(packed, model)


def test_packing_first_chunks_gives_the_bytes_of_reading_packed(qwen):
    """A prompt in one chunk attends exactly, so both ways see the same keys and values."""
    model, tokenizer = qwen
    packed = pack.pack(read(model, tokenizer, 30), model, SPEC)
    mlx_kvq.enable(model, SPEC, verbose=False)
    for a, b in zip(packed, read(model, tokenizer, 30), strict=True):
        assert mx.array_equal(a.rows[..., :30, :], b.rows[..., :30, :])
        assert mx.array_equal(a.tail, b.tail)
        assert a.model == b.model


def test_what_cannot_be_packed(qwen):
    model, tokenizer = qwen
    own = read(model, tokenizer, 5)
    with pytest.raises(ValueError, match="3 layers and the model 4"):
        pack.pack(own[:3], model, SPEC)
    quantized = [c.to_quantized() for c in own]
    with pytest.raises(ValueError, match="Layer 0 of the prompt cache is a QuantizedKVCache"):
        pack.pack(quantized, model, SPEC)
    with pytest.raises(ValueError, match="PackedKVCache: it is quantized already"):
        pack.pack(pack.pack(own, model, SPEC), model, SPEC)
    with pytest.raises(ValueError, match="is a ChunkedKVCache"):
        pack.pack([stock.ChunkedKVCache(8)] * 4, model, SPEC)
    empty = pack.pack([stock.KVCache(), *own[1:]], model, SPEC)
    assert empty[0].empty()
    assert isinstance(empty[0], PackedKVCache)
    ring = pack.pack([stock.RotatingKVCache(8, keep=2), *own[1:]], model, SPEC)[0]
    assert isinstance(ring, PackedRotatingKVCache)
    assert (ring.max_size, ring.keep) == (8, 2)


def shell(*command):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(c) for c in command],
        env=kept | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


def generate(file, *options):
    return shell(
        BIN / "mlx_lm.generate",
        "--prompt-cache-file",
        file,
        "--prompt",
        " and then",
        "-m",
        6,
        *options,
    )


def refused(process, *words):
    assert process.returncode == 1, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("[mlx_kvq] error")]
    assert len(lines) == 1, process.stderr
    assert all(word in lines[0] for word in words), lines
    assert "Traceback" not in process.stderr
    assert "==========" not in process.stdout


def test_on_the_command_line(tmp_path):
    """cache_prompt, generate and pack-cache, and their refusals."""
    model = write_float32("tiny-qwen2-8bit", tmp_path)
    files = {}
    for spec in (SPEC, "fp16"):
        files[spec] = tmp_path / f"{spec[:4]}.safetensors"
        made = shell(
            BIN / "mlx_lm.cache_prompt", "--model", model, "--prompt", TEXT[:200],
            "--prompt-cache-file", files[spec], "--kv-cache", spec,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
    packed = tmp_path / "packed.safetensors"
    made = shell(BIN / "mlx_kvq", "pack-cache", files["fp16"], packed, "--kv-cache", SPEC)
    assert made.returncode == 0, made.stderr
    assert "times smaller" in made.stdout

    texts = [generate(f, "--kv-cache", SPEC) for f in (files[SPEC], packed)]
    texts.append(generate(packed))  # the file says how to read it
    assert [t.returncode for t in texts] == [0, 0, 0], [t.stderr for t in texts]
    assert len({t.stdout.split("==========")[1] for t in texts}) == 1

    other = "int8-srft:calibrate=off"
    refused(generate(packed, "--kv-cache", other), "packed with bits int4, asked for int8")
    refused(generate(files["fp16"], "--kv-cache", SPEC), "pack-cache")
    short = tmp_path / "short.safetensors"
    short.write_bytes(packed.read_bytes()[:-100])
    refused(generate(short, "--kv-cache", SPEC), "cannot be used")
    again = shell(BIN / "mlx_kvq", "pack-cache", packed, tmp_path / "twice.safetensors")
    assert again.returncode == 1
    assert "quantized already" in again.stderr
    assert "Traceback" not in again.stderr
