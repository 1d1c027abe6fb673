"""``position_study``: what it decodes is what a cache decodes, and what it prints."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import position_study
import pytest
from mlx_lm import load

import mlx_kvq
from mlx_kvq.calibration.fit import calibrate_tokens
from mlx_kvq.measure.quality import kl

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "models" / "tiny-gemma3-8bit"
TEXT = ROOT / "examples" / "text" / "novel.txt"


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(str(MODEL))[:2]
    model.set_dtype(mx.float32)
    return model, mx.array(tokenizer.encode(TEXT.read_text()[:4000])[:700])


@pytest.mark.parametrize("first", [0, 4])
def test_rows_are_what_the_cache_keeps(loaded, first):
    """After a prompt in one chunk, which reads itself exactly, decoding differs by nothing else;
    over the end of the sliding windows."""
    model, ids = loaded
    length, steps, recent = 500, 20, 16
    calibration = calibrate_tokens(model, [ids[:200]], progress=False)
    named = {"a": calibration, "b": calibrate_tokens(model, [ids[200:260]], progress=False)}
    windows, formats = position_study.layers_of(model, named, "int4-srft")
    prompts = [position_study.Prompt(w) for w in windows]
    position_study.read(model, prompts, ids[:length])
    caches = [
        position_study.Decoding(p, length, steps, f, first, recent)
        for p, f in zip(prompts, formats, strict=True)
    ]
    found = position_study.decode(model, caches, ids[length : length + steps])
    assert found.shape == (steps, 2) and (found > 0).all() and (found[:, 0] != found[:, 1]).all()
    own, packed = (
        model.make_cache(),
        mlx_kvq.make_prompt_cache(
            model, f"int4-srft:recent={recent},first={first}", calibration=calibration
        ),
    )
    for cache in (own, packed):
        model(ids[None, :length], cache=cache)
    expected = []
    for token in ids[length : length + steps]:
        both = [model(token[None, None], cache=c)[0, -1] for c in (own, packed)]
        exact, got = (x - mx.logsumexp(x) for x in both)
        expected.append(kl(exact, got).item())
    np.testing.assert_allclose(found[:, 0], expected, rtol=0.1)


def test_the_first_tokens_are_exact(loaded):
    """With all of them first, nothing is rounded."""
    model, ids = loaded
    named = {"a": calibrate_tokens(model, [ids[:100]], progress=False)}
    windows, formats = position_study.layers_of(model, named, "int4-srft")
    prompts = [position_study.Prompt(w) for w in windows]
    position_study.read(model, prompts, ids[:64])
    worst = []
    for first in (0, 4, 64):
        caches = [
            position_study.Decoding(p, 64, 4, f, first, 4)
            for p, f in zip(prompts, formats, strict=True)
        ]
        worst.append(position_study.decode(model, caches, ids[64:68]).max())
        exact = [mx.array_equal(x[0], x[1]) for c in caches for x in (c.k[:, :, :first],)]
        assert all(exact)
    assert worst[0] != worst[1] and worst[2] < 1e-6 < worst[0]


def test_the_command(loaded, tmp_path, monkeypatch, capsys):
    model, ids = loaded
    calibrate_tokens(model, [ids[:100]], progress=False).save(tmp_path / "c.safetensors")
    out = tmp_path / "study.json"
    given = (
        *("--model", MODEL, "--text", TEXT, "--calibration", f"new={tmp_path / 'c.safetensors'}"),
        *("--lengths", 40, 60, "--decoded", 8, "--documents", 2, "--json", out),
    )
    monkeypatch.setattr(sys, "argv", ["position_study.py", *map(str, given)])
    position_study.main()
    rows = json.loads(out.read_text())
    assert [(r["length"], r["calibration"]) for r in rows] == [(40, "new"), (60, "new")]
    assert all(np.isclose(r["kl"], np.mean(r["documents"])) and r["kl"] > 0 for r in rows)
    assert f"tiny-gemma3-8bit, 40 tokens, new: KL {rows[0]['kl']:.5f}" in capsys.readouterr().out
