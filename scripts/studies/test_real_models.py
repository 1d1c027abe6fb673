"""``real_models`` and ``long_generation``: their figures, how they go on, tables and picture."""

import json
import math
import sys
from importlib import import_module
from pathlib import Path

import long_generation
import mlx.core as mx
import numpy as np
import pictures
import pytest
import real_models
import tables
from codes import codes_of, facts_of
from mlx_lm import load, stream_generate
from mlx_lm.models import base
from texts import documents_of

from mlx_kvq.measure import baselines
from mlx_kvq.measure.quality import measure

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "models" / "tiny-qwen2-8bit"
TEXT = ROOT / "examples" / "text" / "novel.txt"
RECALL = ROOT / "examples" / "text" / "recall.jsonl"
SMALL = [
    *("--model", MODEL, "--text", TEXT, "--contexts", 64, 96, "--documents", 2, "--decode", 4),
    *("--prompt", 8, "--chunk", 32, "--batch", 2, "--recall", RECALL, "--recall-contexts", 200),
    *("--recall-texts", 1),
]  # fmt: skip
CACHES = ["fp16", "int4-srft:calibrate=off", "kivi:block=32"]


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(str(MODEL))[:2]
    model.set_dtype(mx.float32)
    return model, tokenizer


def run(monkeypatch, name, *given):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, given)])
    import_module(name).main()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What a run of a few caches wrote, and one that cannot be."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        given = ["--json", folder / "out.json", "--slim", folder / "slim.json"]
        run(patch, "real_models", *SMALL, *given, "--only", *CACHES, "int4-srft:group_size=24")
    return folder


def test_figures_are_those_of_measure(made, loaded):
    model, tokenizer = loaded
    data = json.loads((made / "out.json").read_text())
    rows = [r for r in data["rows"] if r["kind"] == "quality" and r["context"] == 96]
    assert [r["cache"] for r in rows] == [*CACHES, "int4-srft:group_size=24"]
    assert "does not divide" in rows[3]["failed"] and rows[0]["commit"]
    texts = {"novel.txt": tokenizer.encode(TEXT.read_text(), add_special_tokens=False)}
    documents = documents_of(tokenizer, texts, 2, 101)
    windows = mx.array([d.ids for d in documents])
    assert windows.shape == (2, 101)
    makers = {c.name: c.make for c in (baselines.own(model), baselines.candidate(model, CACHES[2]))}
    want = measure(model, makers, windows[:, :100], 32, decode=4)[CACHES[2]]
    leg = rows[2]["decode"]
    np.testing.assert_allclose(leg["tokens"], want.kl, rtol=0.02, atol=1e-5)
    assert leg["kl"]["mean"] == pytest.approx(np.mean(want.kl), rel=0.01)
    assert leg["kl"]["low"] < leg["kl"]["mean"] < leg["kl"]["high"]
    assert leg["geometric"]["mean"] == pytest.approx(np.exp(np.log(want.kl).mean()), rel=0.02)
    assert [d["kl"] for d in leg["documents"]] == pytest.approx(
        [x.mean() for x in want.kl], rel=0.02
    )
    assert {d["text"] for d in leg["documents"]} == {"novel.txt"}
    assert np.shape(rows[2]["prompt"]["tokens"]) == (2, 8)
    assert rows[0]["decode"]["perplexity_ratio"]["mean"] == pytest.approx(1, abs=1e-3)
    caches = makers[CACHES[2]]()
    for start, end in [(0, 96), *((i, i + 1) for i in range(96, 100))]:
        model(windows[:, start:end], cache=caches)
    assert rows[2]["bytes_per_token"] == pytest.approx(baselines.bytes_per_token(caches))


def test_kv4_where_mlx_lms_attention_has_no_kernel(monkeypatch, tmp_path):
    """As on CUDA: the row says that kv4 is read as arrays, and its figures are those of kv4."""
    given = [*SMALL[:4], "--contexts", 96, *SMALL[7:15], "--only", "kv4", "kv8"]

    def rows(name):
        run(monkeypatch, "real_models", *given, "--json", tmp_path / name)
        return json.loads((tmp_path / name).read_text())["rows"]

    def attention(*args, **kwargs):
        raise RuntimeError("[quantized_matmul] No implementation for problem shape: 3x3x64x2")

    real = rows("real.json")
    monkeypatch.setattr(base, "quantized_scaled_dot_product_attention", attention)
    for mine, its in zip(rows("arrays.json"), real, strict=True):
        assert "read as arrays" in mine["note"] and not its["note"]
        assert mine["bytes_per_token"] == its["bytes_per_token"]
        for leg in real_models.LEGS:
            kl = its[leg]["kl"]["mean"]
            assert mine[leg]["kl"]["mean"] == pytest.approx(kl, rel=1e-3, abs=1e-6)


def test_it_goes_on_where_it_stopped(made, monkeypatch, capsys, tmp_path):
    before = json.loads((made / "out.json").read_text())
    path = tmp_path / "out.json"
    for row in before["rows"]:
        row["mark"] = 1
    before["rows"].pop(0)
    path.write_text(json.dumps(before))
    run(monkeypatch, "real_models", *SMALL, "--json", path, "--only", *CACHES)
    after = json.loads(path.read_text())["rows"]
    assert [r.get("mark") for r in after] == [1] * len(before["rows"]) + [None]
    assert (after[-1]["cache"], after[-1]["context"]) == ("fp16", 64)
    with pytest.raises(SystemExit, match="with decode 4, now 3: give another --json"):
        run(monkeypatch, "real_models", *SMALL, "--decode", 3, "--json", path)
    (tmp_path / "short.txt").write_text(TEXT.read_text()[:3000])
    short = ["--text", tmp_path / "short.txt", "--contexts", 7000, "--json", tmp_path / "x.json"]
    with pytest.raises(SystemExit, match="No text has 7005 tokens: short.txt"):
        run(monkeypatch, "real_models", *SMALL, *short)
    path.write_text("[]")
    with pytest.raises(SystemExit, match="was not written by this script"):
        run(monkeypatch, "real_models", *SMALL, "--json", path)


def test_what_only_takes(monkeypatch, tmp_path):
    every = real_models.caches_of(list(real_models.GROUPS))
    assert len(every) == len(set(every)) > 25
    assert real_models.caches_of(["rivals", "kv4", "int4-srft"])[-2:] == [
        "kvarn:first=4",
        "int4-srft",
    ]
    with pytest.raises(SystemExit, match=r"--only takes groups \(default, .*unknown cache 'x'"):
        run(monkeypatch, "real_models", *SMALL, "--json", tmp_path / "x", "--only", "x")


def test_a_prompt_is_read_in_chunks_and_its_last_one_scored():
    assert real_models.plan_of(100, 2, 40, 5) == [
        (0, 40, 0), (40, 80, 0), (80, 100, 4), (100, 101, 1), (101, 102, 1),
    ]  # fmt: skip
    assert real_models.plan_of(64, 1, 512, 0) == [(0, 32, 0), (32, 64, 0), (64, 65, 1)]
    assert real_models.capped([8192, 1024, 32768], 32768, 64) == [1024, 8192]


def test_intervals_hold_the_mean_as_often_as_they_say():
    """Documents with means of their own: tokens alone would give much narrower ones."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        x = rng.normal(size=(10, 1)) + 0.1 * rng.normal(size=(10, 20))
        e = real_models.interval(x.mean(), real_models.resampled(x).mean(axis=1))
        hits += e["low"] < 0 < e["high"]
    assert 48 <= hits <= 60


def test_codes_stand_in_the_text(loaded, made):
    _, tokenizer = loaded
    texts = {"novel.txt": tokenizer.encode(TEXT.read_text(), add_special_tokens=False)}
    one, two = codes_of(tokenizer, facts_of(str(RECALL)), texts, 2, 400)
    assert len(one.ids) == len(two.ids) == 400 and len(one.questions) == 8
    text = tokenizer.decode(one.ids)
    for question, code in one.questions:
        assert f"{question.removeprefix(chr(10) + 'As stated, the')} {code}." in text
    assert one.questions != two.questions
    with pytest.raises(ValueError, match="no text of 9999999 with 8 codes"):
        codes_of(tokenizer, facts_of(str(RECALL)), texts, 1, 9999999)
    rows = [r for r in json.loads((made / "out.json").read_text())["rows"] if r["kind"] == "recall"]
    assert [r["prompts"] for r in rows[:3]] == [8] * 3 and rows[0]["recall"] == rows[0]["texts"][0]
    assert rows[0]["recall"] > 4  # the model's own cache knows most


def test_tables_and_picture(made, monkeypatch, capsys, tmp_path):
    slim = json.loads((made / "slim.json").read_text())
    assert all("tokens" not in r.get("decode", {}) for r in slim["rows"])
    run(monkeypatch, "tables", made / "slim.json")
    out = capsys.readouterr().out
    assert "tiny-qwen2-8bit, 96 tokens of context, 2 documents of novel.txt:" in out
    row = next(r for r in slim["rows"] if r["cache"] == CACHES[2] and r["context"] == 96)
    assert f"| {CACHES[2]} (fake-quantized) | {row['bytes_per_token']:,.0f} |" in out
    assert (
        f"{row['decode']['kl']['mean']:.{5 if row['decode']['kl']['mean'] < 1e-3 else 4}f} [" in out
    )
    assert "int4-srft:group_size=24 failed: " in out and " of 8 |" in out
    assert tables.quality([]) == []
    pictures.draw_real_models(slim, tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text()
    assert drawn.startswith("<?xml") and "kivi:block=32 (fake-quantized)" in drawn


def test_a_long_text_and_where_it_parts(loaded, monkeypatch, capsys, tmp_path):
    model, tokenizer = loaded
    out, rough = tmp_path / "long.json", "int4-srft:calibrate=off,recent=0,first=0"
    given = ["--model", MODEL, "--text", TEXT, "--context", 120, "--tokens", 30, "--chunk", 50]
    run(monkeypatch, "long_generation", *given, "--kv-cache", "fp16", rough, "--json", out)
    rows = json.loads(out.read_text())["rows"]
    assert [r["cache"] for r in rows] == ["own", "fp16", rough]
    ids = tokenizer.encode(TEXT.read_text(), add_special_tokens=False)[:120]
    steps = list(stream_generate(model, tokenizer, ids, max_tokens=30))
    assert rows[0]["continuation"] == tokenizer.decode([s.token for s in steps])
    losses = [-s.logprobs[s.token].item() for s in steps]
    assert rows[0]["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)
    assert rows[0]["parts_at"] is None and rows[0]["margin"] is None
    at = rows[2]["parts_at"]
    assert at is not None and rows[2]["continuation"] != rows[0]["continuation"]
    mine, other = rows[2]["tokens_there"]
    assert steps[at].token == mine
    margin = (steps[at].logprobs[mine] - steps[at].logprobs[other]).item()
    assert rows[2]["margin"] == pytest.approx(margin, abs=1e-3) and margin > 0
    assert f"| novel.txt 0 | {rough} | {at} | {margin:.4f} |" in capsys.readouterr().out
    assert (
        long_generation.part_new([1] * 20) == 1 / 13
        and long_generation.part_new(list(range(20))) == 1
    )
    with pytest.raises(SystemExit, match="No text has 9000000 tokens"):
        run(monkeypatch, "long_generation", *given, "--context", 9000000)
