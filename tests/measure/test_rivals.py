"""Fake-quantized caches: what they round, what they leave exact, and the bytes that they count."""

import copy
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base

from mlx_kvq import cli
from mlx_kvq.format.rotation import hadamard
from mlx_kvq.measure import baselines, rivals
from mlx_kvq.measure.evaluate import evaluate
from mlx_kvq.measure.rivals import FakeCache, Rival

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QWEN = EXAMPLES / "models" / "tiny-qwen2-8bit"
GEMMA = EXAMPLES / "models" / "tiny-gemma3-8bit"
NOVEL = EXAMPLES / "text" / "novel.txt"


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def half(x):
    return x.astype(np.float16).astype(np.float32)


def affine(x, axis, levels=15):
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    step, low = half((high - low) / levels), half(low)
    return np.clip(np.round((x - low) / step), 0, levels) * step + low


def kept(rival, k, v):
    """Keys and values as a cache returns them once a further token has come."""
    cache = FakeCache(rival)
    cache.update_and_fetch(mx.array(k), mx.array(v))
    one = mx.zeros((*k.shape[:2], 1, k.shape[3]))
    return [np.array(x)[:, :, :-1] for x in cache.update_and_fetch(one, one)]


def test_kivi_by_definition():
    """Keys per channel over 64 tokens, values per token in groups of 64 channels."""
    k, v = random(2, 2, 140, 128), random(2, 2, 140, 128, seed=1)
    found = kept(Rival("kivi"), k, v)
    keys, values = k.copy(), v.copy()
    for a in (0, 64):
        keys[:, :, a : a + 64] = affine(k[:, :, a : a + 64], 2)
    groups = v[:, :, :128].reshape(2, 2, 128, 2, 64)
    values[:, :, :128] = affine(groups, 4).reshape(2, 2, 128, 128)
    np.testing.assert_allclose(found[0], keys, atol=1e-6)
    np.testing.assert_allclose(found[1], values, atol=1e-6)


def test_kvarn_by_definition():
    """A tile in float64: rotated, divided by what makes it even, rounded, and all of it back."""
    x = random(128, 64) * np.exp(random(128, 1, seed=1)) * np.exp(random(1, 64, seed=2))
    H = hadamard(64)
    z = (x @ H).astype(np.float32)
    tokens, channels = (np.array(f) for f in rivals.even(mx.array(z)))
    for found, inside, beside, axis in zip(
        kept(Rival("kvarn"), x[None, None], x[None, None]),
        (channels, tokens), (tokens, channels), (0, 1), strict=True,
    ):  # fmt: skip
        y = z / tokens / channels
        low, high = y.min(axis, keepdims=True), y.max(axis, keepdims=True)
        codes = np.round((y - low) / ((high - low) / 15))
        want = (codes * ((high - low) / 15 * inside) + low * inside) * beside
        np.testing.assert_allclose(found[0, 0], want @ H, atol=2e-2 * np.abs(x).max())
        error = np.square(found[0, 0] - x).mean() / np.square(x).mean()
        assert 1e-4 < error < 0.01


def test_a_tile_becomes_even():
    """Outliers of a channel and of a token go: no deviation is twice another's, where a hundred
    times were before."""
    x = random(3, 128, 64)
    x[:, :, 5] *= 100
    x[:, 7] *= 50
    tokens, channels = rivals.even(mx.array(x))
    y = np.array(mx.array(x) / tokens / channels)
    for axis in (-1, -2):
        before, after = x.std(axis), y.std(axis)
        assert (before.max(-1) / before.min(-1)).min() > 20
        assert (after.max(-1) / after.min(-1)).max() < 2


def test_it_withstands_an_outlier_token():
    x = random(1, 1, 128, 64)
    x[:, :, 0] *= 300
    rest = slice(1, None)
    errors = {
        name: np.square(kept(Rival(name), x, x)[0] - x)[:, :, rest].mean() for name in rivals.BLOCKS
    }
    assert errors["kvarn"] < errors["kivi"] / 100


@pytest.mark.parametrize("first, residual", [(0, 0), (4, 0), (4, 20)])
def test_what_stays_exact(first, residual):
    """The first tokens, the unfilled block and the residual; all else is rounded once and stays."""
    rival = Rival("kivi", first=first, residual=residual)
    cache = FakeCache(rival)
    x = random(1, 1, 400, 64)
    seen = None
    for start, end in [(0, 150), (150, 151), *((i, i + 1) for i in range(151, 300)), (300, 400)]:
        part = mx.array(x[:, :, start:end])
        seen = np.array(cache.update_and_fetch(part, part)[0])
        full = first + max(0, start - first - residual) // 64 * 64
        same = (seen == x[:, :, :end]).all(axis=(0, 1, 3))
        assert same[:first].all() and same[full:].all() and not same[first:full].any()
    assert cache.size() == 400


def test_blocks_do_not_depend_on_how_tokens_came():
    x = random(1, 2, 300, 64)
    made = []
    for step in (1, 7, 100):
        cache = FakeCache(Rival("kvarn", first=4))
        for i in range(0, 300, step):
            part = mx.array(x[:, :, i : i + step])
            cache.update_and_fetch(part, part)
        one = mx.zeros((1, 2, 1, 64))
        made.append(np.array(cache.update_and_fetch(one, one)[0]))
    for other in made[1:]:
        np.testing.assert_allclose(other, made[0], atol=1e-5)


def test_a_window_reads_as_the_models_own(gemma, monkeypatch):
    """Without rounding, logits are those of the rotating caches, over several windows."""
    monkeypatch.setattr(Rival, "round", lambda self, k, v: (k, v))
    model, tokenizer = gemma
    ids = mx.array(tokenizer.encode(NOVEL.read_text(encoding="utf-8"))[:800])
    fake, own = (baselines.candidate(model, "kivi").make(), baselines.own(model).make())
    assert {type(c) for c in fake} == {FakeCache}
    assert {c.window for c in fake} == {None, 256}
    for start, end in [(0, 250), (250, 600), *((i, i + 1) for i in range(600, 610))]:
        a, b = (model(ids[None, start:end], cache=c) for c in (fake, own))
        np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-4)


def test_bytes(qwen, gemma):
    """Two blocks at 4.5 bits and room for one more in 16; also shared out over a window."""
    cache = FakeCache(Rival("kivi"))
    x = mx.zeros((3, 2, 150, 128))
    cache.update_and_fetch(x, x)
    cache.update_and_fetch(x[:, :, :1], x[:, :, :1])
    heads, row, exact = 2, 256 * 4.5 / 8, 256 * 2
    assert cache.bytes_per_token() == pytest.approx(heads * (128 * row + 64 * exact) / 151)
    assert baselines.bytes_per_token([cache]) == cache.bytes_per_token()
    cache = FakeCache(Rival("kvarn", first=4, residual=10), window=500)
    for _ in range(10):
        cache.update_and_fetch(x[:1], x[:1])
    row = (256 * 4 + 32 * 128 / 128 + 16 + 32 + 16 * 128 / 128) / 8
    held = 1500 - 4 - 10
    now = held - (1350 - 14) // 128 * 128  # the last chunk came after blocks were rounded
    rounded = 500 - (now + 10) - 4
    want = 2 * (rounded * row + (4 + 10 + 128) * exact) / 500
    assert cache.bytes_per_token() == pytest.approx(want)
    assert Rival("kivi").bits_per_token(80, 80) == pytest.approx(160 * 4 + 80 / 2 + 32)


def test_names():
    assert Rival.parse("int4-srft") is None and Rival.parse("kv4") is None
    rival = Rival.parse("KIVI:first=4,bits=2")
    assert (rival.bits, rival.block, rival.first, str(rival)) == (2, 64, 4, "kivi:bits=2,first=4")
    assert str(Rival.parse("kvarn:block=128")) == "kvarn"
    for wrong in ("kivi:", "kivi:window=3", "kivi:first=4,first=5", "kivi:first", "kivi:bits=x"):
        with pytest.raises(ValueError, match="options of kivi are bits=N, block=N, residual=N"):
            Rival.parse(wrong)
    for wrong in ("kivi:bits=1", "kivi:bits=16", "kvarn:block=1"):
        with pytest.raises(ValueError, match="is 2 to"):
            Rival.parse(wrong)
    assert rivals.label("kivi:first=4") == "kivi:first=4 (fake-quantized)"
    assert rivals.label("int4-srft") == "int4-srft"


def test_what_cannot_be_is_said(qwen):
    caches = baselines.candidate(qwen[0], "kvarn").make()
    with pytest.raises(NotImplementedError, match="kvarn"):
        caches[0].trim(1)
    with pytest.raises(NotImplementedError, match="one length"):
        caches[0].merge(caches)
    assert len(baselines.candidate(qwen[0], "kvarn").batch(3)) == len(caches)
    assert Rival("kvarn").why_not(96, 96) == "srht needs a head size that is a power of two, not 96"
    assert Rival("kivi").why_not(96, 96) is None


def test_every_option_has_an_effect(qwen):
    text = NOVEL.read_text(encoding="utf-8")
    names = ["kivi", "kivi:first=4", "kivi:residual=32", "kivi:block=32", "kivi:bits=3", "kvarn"]
    e = evaluate(*qwen, names, [text], windows=1, tokens=200, decode=4, chunk=64, progress=False)
    kl = [e[n].kl.mean for n in names]
    assert len(set(kl)) == len(names) and all(0 < x < 1 for x in kl) and kl[4] > kl[0]
    sizes = [e[n].bytes_per_token for n in names]
    assert sizes[1] > sizes[0] and sizes[2] > sizes[0] and sizes[4] < sizes[0]


def test_windows_side_by_side(gemma):
    text = NOVEL.read_text(encoding="utf-8")
    given = {"windows": 2, "tokens": 80, "decode": 4, "chunk": 32, "progress": False}
    names = ["kivi:block=32,first=4", "kvarn:block=32"]
    one = evaluate(*gemma, names, [text], **given)
    both = evaluate(*gemma, names, [text], batch=2, **given)
    for name in names:
        np.testing.assert_allclose(one[name].windows["kl"], both[name].windows["kl"], rtol=0.02)
        assert one[name].bytes_per_token == both[name].bytes_per_token


def test_a_copy_goes_its_own_way(qwen):
    model, _ = qwen
    for name in ("kivi", "fp16", "kv4", "int4-srft:calibrate=off"):
        caches = baselines.candidate(model, name).make()
        model(mx.arange(70)[None], cache=caches)
        other = copy.deepcopy(caches)
        for token in (1, 2, 3):
            a = model(mx.array([[token]]), cache=other)
            b = model(mx.array([[token + 5]]), cache=caches)
        assert not mx.array_equal(a, b)
        again = baselines.candidate(model, name).make()
        model(mx.arange(70)[None], cache=again)
        for token in (1, 2, 3):
            c = model(mx.array([[token]]), cache=again)
        assert mx.array_equal(a, c), name


def test_the_command_says_that_they_are_fake(tmp_path, capsys):
    argv = ["evaluate", "--model", str(QWEN), "--text", str(NOVEL), "--windows", "2", "--batch"]
    argv += ["2", "--tokens", "160", "--decode", "4", "--json", str(tmp_path / "x.json")]
    argv += ["--plot", str(tmp_path / "x.svg"), "--kv-cache", "kivi", "KVARN:first=4"]
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code is None, err
    lines = [line for line in out.splitlines() if line.startswith(("kivi", "kvarn"))]
    assert len(lines) == 4 and all("fake-quantized" in line for line in lines)
    assert "first=4 (fake-quantized)" in lines[1] and "and the first 4" in lines[3]
    rows = json.loads((tmp_path / "x.json").read_text())["results"]
    assert all(r["note"].startswith("fake-quantized") for r in rows[1:])
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    assert "(fake-quantized" in capsys.readouterr().out
    for wrong, said in (("kivi:x=1", "options of kivi are"), ("kiwi", "kivi kvarn")):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", "--model", "m", "--text", "t", "--kv-cache", wrong])
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("least", [1, 2])  # sequences from which on there is none
def test_mlx_lms_cache_where_its_attention_has_no_kernel(qwen, monkeypatch, least):
    """As MLX on CUDA does: it is read as arrays, which gives the same to rounding, and says so."""
    text = NOVEL.read_text(encoding="utf-8")
    given = {"windows": 1, "tokens": 90, "decode": 6, "chunk": 32, "progress": False}
    real = evaluate(*qwen, ["kv4"], [text], **given)["kv4"]

    quantized = base.quantized_scaled_dot_product_attention

    def attention(queries, *args, **kwargs):
        if queries.shape[0] >= least:
            raise RuntimeError("[quantized_matmul] No implementation for problem shape: 1x3x64x2")
        return quantized(queries, *args, **kwargs)

    monkeypatch.setattr(base, "quantized_scaled_dot_product_attention", attention)
    read = evaluate(*qwen, ["kv4"], [text], **given)["kv4"]
    assert "read as arrays" in read.note and "No implementation" in read.note and not real.note
    assert read.kl.mean == pytest.approx(real.kl.mean, rel=0.02)
    assert read.bytes_per_token == real.bytes_per_token
