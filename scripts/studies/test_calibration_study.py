"""``calibration_study``: what is in its file is not measured again, and makes the tables."""

import json
import sys
from pathlib import Path

import calibration_study
import mlx.core as mx
import pytest
from mlx_lm import load

from mlx_kvq.measure.baselines import candidate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["calibration_study.py", *map(str, arguments)])
        calibration_study.main()

    return calibration_study, run


def test_study(study, tmp_path, monkeypatch, capsys):
    module, run = study
    file, text = tmp_path / "study.json", ROOT / "examples" / "text" / "novel.txt"
    measured = []
    block = module.block

    def watched(*a):
        measured.append((a[3].split("/")[-1], a[4]))
        return block(*a)

    monkeypatch.setattr(module, "block", watched)

    def go(*more):
        run(
            *("--model", ROOT / "examples" / "models" / "tiny-qwen2-8bit", "--text", text),
            *("--outliers", "none", "--windows", 2, "--tokens", 48, "--chunk", 16),
            *("--calibration-tokens", 256, "--json", file, *more),
        )

    go("--group-size", 64, "--caches", "int4", "kv4", "kv8")
    first = json.loads(file.read_text())["novel.txt tiny-qwen2-8bit none"]
    go("--group-size", 64, 32, "--caches", "paper", "int4", "kv4", "kv8")
    found = json.loads(file.read_text())["novel.txt tiny-qwen2-8bit none"]
    assert measured == [
        ("novel.txt", ["int4 64", "kv4 64", "kv8 64"]),
        ("novel.txt", ["paper 64", "paper 32", "int4 32"]),
    ]
    assert all(found[name] == first[name] for name in ("int4 64", "kv4 64", "kv8 64"))
    kl = {name: f["kl"]["mean"] for name, f in found.items()}
    assert kl["own"] == 0 and 0 < kl["kv8 64"] < kl["int4 32"] / 10
    capsys.readouterr()
    run("--json", file, "--report")
    out = capsys.readouterr().out
    assert "### novel.txt, groups of 64" in out and "### novel.txt, groups of 32" in out
    assert f"| int4 / paper's rule | {kl['int4 64'] / kl['paper 64']:.2f} |" in out
    assert f"| int4 / kv4 | {kl['int4 64'] / kl['kv4 64']:.2f} |" in out


def test_kv4_is_what_mlx_lm_computes(study):
    """Rounded when written and kept unpacked is mlx-lm's quantized cache."""
    model, tokenizer = load(str(ROOT / "examples" / "models" / "tiny-qwen2-8bit"))[:2]
    model.set_dtype(mx.float32)
    ids = mx.array(tokenizer.encode("It was a dark night, and the old man"))[None]
    made = (candidate(model, "kv4").make, study[0].affine(model, 4, mx.float32))
    stock, ours = (model(ids, cache=make()) for make in made)
    assert mx.abs(stock - model(ids)).max() > 0.1
    assert mx.abs(stock - ours).max() < 1e-3
