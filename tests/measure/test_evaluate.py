"""evaluate: its figures against numpy, its baselines, and the command from end to end."""

import json
import math
import os
import struct
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import load, stream_generate
from mlx_lm.models import cache as stock
from mlx_lm.models.base import scaled_dot_product_attention

import mlx_kvq
import mlx_kvq.measure.evaluate
from mlx_kvq import cli
from mlx_kvq.caches.attention import BLOCK
from mlx_kvq.calibration.set import CalibrationSet, LayerCalibration
from mlx_kvq.format.transform import Calibration
from mlx_kvq.measure import baselines, plots, quality
from mlx_kvq.measure.evaluate import answers, evaluate, read_recall
from mlx_kvq.measure.quality import Estimate, Scores, compare, measure, summarize, t_quantile

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QWEN = EXAMPLES / "models" / "tiny-qwen2-8bit"
GEMMA = EXAMPLES / "models" / "tiny-gemma3-8bit"
NOVEL = EXAMPLES / "text" / "novel.txt"
RECALL = EXAMPLES / "text" / "recall.jsonl"
PLAIN = "int4-srft:calibrate=off,recent=0,first=0"


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_compare_by_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9, 50)) * 3
    targets = rng.integers(0, 50, 8)
    p, q = log_softmax(a), log_softmax(b)
    exact, got = (mx.array(x.astype(np.float32)) for x in (p, q))
    kl, same, loss = compare(exact, got, mx.array(targets))
    np.testing.assert_allclose(kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-4)
    assert np.array(same).tolist() == (a.argmax(-1) == b.argmax(-1)).tolist()
    np.testing.assert_allclose(loss, -q[np.arange(8), targets], rtol=1e-5)


@pytest.mark.parametrize(
    "df, level, want",
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (15, 0.95, 2.131), (15, 0.99, 2.947), (200, 0.95, 1.972)],
)
def test_t_quantile_against_the_printed_table(df, level, want):
    assert t_quantile(df, level) == pytest.approx(want, abs=6e-4)


def test_estimate():
    x = [1.0, 2.0, 4.0, 9.0]
    e = Estimate.of(x)
    half = 3.1824 * np.std(x, ddof=1) / 2
    np.testing.assert_allclose([e.mean, e.low, e.high], [4, 4 - half, 4 + half], rtol=1e-4)
    assert e.map(math.exp).high == pytest.approx(math.exp(4 + half), rel=1e-3)
    single = Estimate.of([3.0])
    assert single.mean == 3 and math.isnan(single.low) and math.isnan(single.high)


def test_summary_pairs_the_windows():
    # Losses differ much between windows and little between caches.
    base = Scores(loss=[np.full(7, x) for x in (3.0, 5.0, 4.0)])
    mine = Scores(
        kl=[np.array([0.1, 0.3]), np.array([0.2, 0.2]), np.array([0.0, 9.0])],
        same=[np.array([True, False])] * 3,
        loss=[np.full(7, x) for x in (3.1, 5.12, 4.08)],
    )
    r = summarize("x", mine, base, 10.0)
    assert r.perplexity.mean == pytest.approx(math.exp(4.1))
    assert r.change.mean == pytest.approx(math.expm1(0.1))
    half = 4.3027 * 0.02 / math.sqrt(3)
    assert r.change.low == pytest.approx(math.expm1(0.1 - half), rel=1e-3)
    assert r.perplexity.high - r.perplexity.low > 100 * (r.change.high - r.change.low)
    assert r.kl.mean == pytest.approx((0.2 + 0.2 + 4.5) / 3)
    assert r.kl_p99 == pytest.approx(np.quantile([0.1, 0.3, 0.2, 0.2, 0.0, 9.0], 0.99))
    assert r.top1 == 0.5
    assert r.windows == {
        "kl": pytest.approx([0.2, 0.2, 4.5]),
        "loss": pytest.approx([3.1, 5.12, 4.08]),
    }


@pytest.fixture(scope="module")
def tokens(qwen):
    ids = qwen[1].encode(NOVEL.read_text(encoding="utf-8")[:2000])
    return mx.array(ids[:210]).reshape(2, 105)


def test_measure_against_numpy(qwen, tokens):
    model, _ = qwen
    makers = {c.name: c.make for c in (baselines.own(model), baselines.candidate(model, PLAIN))}
    scores = measure(model, makers, tokens, 26)  # 105 = 4 · 26 + 1: the last chunk has no target
    for w, window in enumerate(tokens):
        logits = []
        for make in makers.values():
            caches, parts = make(), []
            for i in range(0, 105, 26):
                parts.append(np.array(model(window[None, i : i + 26], cache=caches)[0]))
            logits.append(log_softmax(np.concatenate(parts)))
        p, q = logits
        targets = np.array(window)[27:]
        for name, x in zip(makers, logits, strict=True):
            want = -x[26:-1][np.arange(78), targets]
            np.testing.assert_allclose(scores[name].loss[w], want, atol=1e-4)
        kl = (np.exp(p) * (p - q)).sum(-1)[26:]
        np.testing.assert_allclose(scores[PLAIN].kl[w], kl, atol=1e-5)
        assert kl.mean() > 1e-3
        same = (p.argmax(-1) == q.argmax(-1))[26:]
        assert (scores[PLAIN].same[w] == same).mean() > 0.98
    own = next(iter(makers))
    assert all(k.max() == 0 for k in scores[own].kl) and all(s.all() for s in scores[own].same)


def test_windows_side_by_side_score_as_one_by_one(qwen, gemma, tokens):
    for model, _ in (qwen, gemma):
        makers = {c.name: c.make for c in (baselines.own(model), baselines.candidate(model, PLAIN))}
        windows = mx.concatenate([tokens, tokens[:1, ::-1]])[:, :60]
        one, two = (measure(model, makers, windows, 26, batch=n) for n in (1, 2))
        for name in makers:
            assert len(two[name].kl) == 3
            for a, b in zip(one[name].kl, two[name].kl, strict=True):
                np.testing.assert_allclose(a, b, atol=2e-4)
            for a, b in zip(one[name].loss, two[name].loss, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-3)


def test_chunks_do_not_matter_to_the_models_own_cache(qwen, gemma, tokens):
    for model in (qwen[0], gemma[0]):
        makers = {"own": baselines.own(model).make}
        losses = [measure(model, makers, tokens, chunk)["own"].loss for chunk in (15, 40)]
        for a, b in zip(*losses, strict=True):
            assert len(a) == 105 - 15 - 1 and len(b) == 105 - 40 - 1
            np.testing.assert_allclose(a[-len(b) :], b, atol=1e-4)


def test_only_a_chunk_of_logits_is_kept():
    vocabulary, T, chunk = 50_000, 128, 8

    class Random(nn.Module):
        layers = [None]  # noqa: RUF012

        def __call__(self, x, cache):
            keys = mx.zeros((1, 1, x.shape[1], 8))
            cache[0].update_and_fetch(keys, keys)
            return mx.random.normal((1, x.shape[1], vocabulary))

    makers = {name: lambda: [stock.KVCache()] for name in ("own", "other")}
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    measure(Random(), makers, mx.zeros((1, T), mx.int32), chunk)
    assert mx.get_peak_memory() - before < 4 * vocabulary * T  # all logits of one cache


def test_pieces_of_a_window():
    assert quality.pieces(10, 4, 0) == [(0, 4, False), (4, 8, True), (8, 10, True)]
    assert quality.pieces(10, 4, 3) == [
        (0, 4, False), (4, 7, False), (7, 8, True), (8, 9, True), (9, 10, True)
    ]  # fmt: skip
    assert quality.pieces(5, 8, 4) == [(0, 1, False), *((i, i + 1, True) for i in range(1, 5))]


def test_decoding_against_generation(qwen, tokens):
    """A prompt that is not scored, then tokens one at a time: as a loop over the model gives it, in
    any batch."""
    model, _ = qwen
    packed = baselines.candidate(model, "int4-srft:calibrate=off")
    makers = {"own": baselines.own(model).make, "int4": packed.make}
    found = measure(model, makers, tokens, 64, decode=20, batch=2)["int4"]
    for row, kl_, loss in zip(tokens, found.kl, found.loss, strict=True):
        caches = [make() for make in makers.values()]
        T = row.size
        logits: list[list] = [[], []]
        for start, end in [(0, 64), (64, T - 20), *((i, i + 1) for i in range(T - 20, T))]:
            for kept, c in zip(logits, caches, strict=True):
                out = np.array(model(row[None, start:end], cache=c)[0])
                if start >= T - 20:
                    kept.append(log_softmax(out[-1]))
        exact, got = (np.stack(x) for x in logits)
        np.testing.assert_allclose(kl_, (np.exp(exact) * (exact - got)).sum(axis=1), atol=2e-4)
        ids = np.array(row[T - 19 :])
        np.testing.assert_allclose(loss, -got[np.arange(19), ids], atol=2e-3)


@pytest.mark.parametrize("given, says", [("48", "leave no prompt"), ("-1", "decode")])
def test_what_decode_may_be(capsys, given, says):
    _, err, status = run(capsys, "--kv-cache", "int4", "--decode", given)
    assert says in f"{err}{status}" and status


SIZES: dict = {
    # Over 4 layers of 1 KV head with D = 128: keys and values, 1024 values.
    "qwen": {"own": 4 * 1024, "fp16": 2 * 1024, "kv8": 1088, "kv4": 576, "int8-srft": 1056,
             "int4-srft": 544, "int4-srft:group_size=32,recent=0,first=0": 576, "k8v4-none": 800,
             # Of 6 tokens; in fp16, as the others.
             "int4-srft:recent=3,first=2": 544 + (3 + 2) * 2048 / 6},
    # 6 layers with D = 256; mlx-lm quantizes the only one that is not sliding, sliding ones have
    # smaller groups.
    "gemma": {"own": 4 * 3072, "fp16": 2 * 3072, "kv4": 5 * 1024 + 288, "int8-srft": 3168,
              "int4-srft": 5 * 288 + 272, "int4-srft:group_size=64,recent=0,first=0": 6 * 272},
}  # fmt: skip


@pytest.mark.parametrize("which", SIZES)
def test_bytes_per_token(which, request):
    model, _ = request.getfixturevalue(which)
    for name, want in SIZES[which].items():
        if name == "own":
            caches = baselines.own(model).make()
        else:
            off = name + ("," if ":" in name else ":recent=0,first=0,") + "calibrate=off"
            caches = baselines.candidate(model, off if "-" in name else name).make()
        for L in (5, 1):
            mx.eval(model(mx.zeros((1, L), mx.int32), cache=caches))
        assert baselines.bytes_per_token(caches) == pytest.approx(want), name


def test_a_sixteen_bit_models_cache_is_fp16():
    model, _ = load(str(QWEN))
    model.set_dtype(mx.bfloat16)
    assert baselines.own(model).name == "own (bfloat16)"
    fp16 = baselines.candidate(model, "fp16")
    assert fp16.note == "the model's own bfloat16"
    mx.eval(model(mx.zeros((1, 3), mx.int32), cache=(caches := fp16.make())))
    assert caches[0].keys.dtype == mx.bfloat16


def test_fp16_rounds_what_is_kept(qwen):
    caches = baselines.candidate(qwen[0], "fp16").make()
    k = mx.random.normal((1, 1, 3, 128), key=mx.random.key(0))
    kept, _ = caches[0].update_and_fetch(k, k)
    assert kept.dtype == mx.float32 and mx.array_equal(kept, k.astype(mx.float16))


def test_candidates_leave_the_model_as_it_was(qwen):
    model, _ = qwen
    for name in ("fp16", "kv4", PLAIN):
        baselines.candidate(model, name)
        assert "make_cache" not in vars(model)
    mlx_kvq.enable(model, "int8-srft:calibrate=off", verbose=False)
    try:
        before = vars(model)["make_cache"]
        for name in ("fp16", "kv4", PLAIN):
            made = {type(c).__name__ for c in baselines.candidate(model, name).make()}
            assert ("PackedKVCache" in made) == (name == PLAIN)
            assert vars(model)["make_cache"] is before
        assert {type(c) for c in baselines.own(model).make()} == {stock.KVCache}
    finally:
        mlx_kvq.disable(model)


def test_kv_bits_are_mlx_lms_own(qwen):
    model, _ = qwen
    caches = baselines.candidate(model, "kv4").make()
    assert {type(c) for c in caches} == {stock.QuantizedKVCache}
    assert {(c.bits, c.group_size) for c in caches} == {(4, 64)}
    x = mx.zeros((1, 20), mx.int32)
    want = [c.to_quantized(64, 4) for c in stock.make_prompt_cache(model)]
    assert mx.array_equal(model(x, cache=caches), model(x, cache=want))


class Attention(nn.Module):
    """A model of one layer: head size D, with a sliding window if asked for."""

    def __init__(self, D, sliding=False):
        super().__init__()
        self.D, self.sliding = D, sliding
        self.layers = [nn.Linear(1, 1)]

    def make_cache(self):
        return [stock.RotatingKVCache(8) if self.sliding else stock.KVCache()]

    def __call__(self, x, cache):
        v = mx.broadcast_to(
            x[:, None, :, None].astype(mx.float32), (*x.shape[:1], 1, x.size, self.D)
        )
        k, v = cache[0].update_and_fetch(v, v)
        y = scaled_dot_product_attention(v, k, v, cache[0], scale=1.0, mask=None)
        return y[:, 0]


def test_what_is_left_out_is_said(gemma):
    note = baselines.candidate(gemma[0], "kv4").note
    assert note == "5 of 6 layers stay as they are: mlx-lm cannot quantize RotatingKVCache"
    with pytest.raises(ValueError, match="kv8 is not possible: mlx-lm cannot quantize Rotating"):
        baselines.candidate(Attention(64, sliding=True), "kv8")
    with pytest.raises(ValueError, match="kv4 is not possible for this model: .*64"):
        baselines.candidate(Attention(96), "kv4")


def test_recall_is_greedy_decoding(qwen):
    model, tokenizer = qwen
    prompt = NOVEL.read_text(encoding="utf-8")[:150]
    steps = stream_generate(model, tokenizer, prompt, max_tokens=5)
    written = "".join(s.text for s in steps if s.finish_reason is None)[:9]
    own = baselines.own(model)
    for chunk in (7, 10_000):
        assert answers(model, tokenizer, own, {"prompt": prompt, "answer": written}, chunk)
        for wrong in (written + "#", "#" + written, written[:-1] + "#"):
            assert not answers(model, tokenizer, own, {"prompt": prompt, "answer": wrong}, chunk)


class Words:
    """A tokenizer of a token per word, with or without BOS."""

    def __init__(self, bos):
        self.bos_token_id = 99
        self.bos = bos

    def encode(self, text, add_special_tokens=True):
        return [99] * (self.bos and add_special_tokens) + [len(w) for w in text.split()]


def test_windows():
    windows = mlx_kvq.measure.evaluate._windows
    text = "a bb ccc dddd eeeee f gg"
    assert windows(Words(False), text, 2, 3, 0) == [[1, 2, 3], [4, 5, 1]]
    assert windows(Words(True), text, 2, 3, 0) == [[99, 1, 2], [99, 3, 4]]
    long = "a" * 100 + " b c d e f"  # longer than 16 characters a token
    assert windows(Words(False), long, 1, 3, 0) == [[100, 1, 1]]
    with pytest.raises(ValueError, match=r"Text 3 has 7 tokens, .* need 9: 2 windows fit"):
        windows(Words(False), text, 3, 3, 2)


def run(capsys, *args, model=QWEN):
    """(stdout, stderr, status) of the command on tiny windows."""
    small = ["--windows", "2", "--tokens", "48", "--chunk", "16"]
    argv = ["evaluate", "--model", str(model), "--text", str(NOVEL), *small, *map(str, args)]
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    out, err = capsys.readouterr()
    return out, err, stop.value.code


def test_the_command(tmp_path, capsys):
    saved, plot = tmp_path / "out.json", tmp_path / "out.png"
    out, err, status = run(
        capsys, "--kv-cache", "fp16", "kv8", "kv4", "int8-srft:recent=0,first=0", PLAIN,
        "--json", saved,
        "--plot", plot, "--recall", short_recall(tmp_path), "--recall-prompts", "2",
    )  # fmt: skip
    assert status is None, err
    data = json.loads(saved.read_text())
    names = ["own (float32)", "fp16", "kv8", "kv4", "int8-srft:recent=0,first=0", PLAIN]
    assert [r["name"] for r in data["results"]] == names
    setting = data["setting"]
    assert (setting["windows"], setting["tokens"], setting["chunk"]) == (2, 48, 16)
    assert setting["model"] == "tiny-qwen2-8bit" and setting["texts"] == ["novel.txt"]
    by_name = {r["name"]: r for r in data["results"]}
    kl = {name: r["kl"]["mean"] for name, r in by_name.items()}
    assert kl["own (float32)"] == 0 < kl["fp16"] < 1e-4 < 1e-3 < kl[PLAIN] < 1
    assert abs(kl["kv8"]) < 1e-2 and kl["int8-srft:recent=0,first=0"] < kl[PLAIN] / 5
    assert all(r["prompts"] == 2 and 0 <= r["recall"] <= 2 for r in data["results"])
    assert len(by_name["kv4"]["windows"]["loss"]) == 2
    lines = out.splitlines()
    assert lines[0].split() == ["cache", "bytes/token", "KL", "KL", "99", "%", "top-1",
                                "perplexity", "change", "recall"]  # fmt: skip
    assert [line.split("  ")[0] for line in lines[1:7]] == names
    assert len({len(line) for line in lines[:7]}) == 1
    r = by_name[PLAIN]
    for figure in (f"{r['kl']['mean']:.4f}", f"{r['perplexity']['mean']:.2f}", " 544 "):
        assert figure in lines[6]
    assert "text" in err and "recall" in err and "100%" in err
    head = plot.read_bytes()[:24]
    assert head.startswith(b"\x89PNG") and struct.unpack(">II", head[16:]) == (1800, 750)


@pytest.mark.parametrize("chunk", [8, 16])
def test_what_a_chunk_reads_exactly_is_said(qwen, chunk):
    """Of an exact tail, decoding reads less than a prompt does: more error shows."""
    text = NOVEL.read_text(encoding="utf-8")
    specs = ["kv8", PLAIN, "int4-srft:calibrate=off,recent=2"]
    e = evaluate(*qwen, specs, [text], windows=1, tokens=64, chunk=chunk, progress=False)
    notes = [e[s].note for s in specs]
    note = (
        f"read as a prompt, whose tokens read their block of {BLOCK} exactly; --chunk 8 reads as "
    )
    note += "decoding does"
    assert notes == ["", "", note if chunk > 8 else ""]
    assert e[specs[2]].kl.mean < e[PLAIN].kl.mean


def test_the_command_in_markdown_with_a_note(capsys):
    out, _, status = run(capsys, "--kv-cache", "kv4", "--windows", "1", "--markdown", model=GEMMA)
    assert status is None
    rows = [line.split("|") for line in out.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and {len(r) for r in rows} == {9}
    assert "±" not in out and "[" not in out  # one window has no interval
    assert "kv4: 5 of 6 layers stay as they are: mlx-lm cannot quantize RotatingKVCache." in out


def test_a_single_window_saves_null_ends(tmp_path, qwen):
    text = NOVEL.read_text(encoding="utf-8")
    e = evaluate(*qwen, ["kv4"], [text], windows=1, tokens=32, chunk=16, progress=False)
    e.save(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["results"][1]["kl"]["low"] is None
    assert e["kv4"].kl.mean > 0


def test_calibration_reaches_the_specs_that_want_it(qwen):
    far = Calibration(mu=mx.full((1, 128), 1000.0))  # every key becomes the same code
    bad = CalibrationSet({(i,): LayerCalibration(far, Calibration()) for i in range(4)})
    text = NOVEL.read_text(encoding="utf-8")
    e = evaluate(
        *qwen,
        ["int8-srft:recent=0,first=0", "int8-srft:calibrate=off,recent=0,first=0"],
        [text],
        windows=1,
        tokens=64,
        chunk=32,
        calibration=bad,
        progress=False,
    )
    good, wrong = e["int8-srft:calibrate=off,recent=0,first=0"], e["int8-srft:recent=0,first=0"]
    assert wrong.kl.mean > 100 * good.kl.mean


def test_saving_is_atomic(tmp_path, monkeypatch):
    target = tmp_path / "out.json"
    e = mlx_kvq.measure.evaluate.Evaluation({"windows": 1}, [])
    e.save(target)
    before = target.read_text()
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        mlx_kvq.measure.evaluate.Evaluation({"windows": 2}, []).save(target)
    assert target.read_text() == before and list(tmp_path.iterdir()) == [target]


def short_recall(tmp_path):
    """The end of two prompts: nothing to recall, little to compute."""
    items = [{**item, "prompt": item["prompt"][-100:]} for item in read_recall(RECALL, 3)]
    path = tmp_path / "recall.jsonl"
    path.write_text("\n".join(map(json.dumps, items)))
    return path


def bad_recall(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    return path


ERRORS = {
    "missing text": (["--text", "nowhere.txt"], "nowhere.txt cannot be read: No such file"),
    "text is no text": (["--text", QWEN / "model.safetensors"], "it is not UTF-8 text"),
    "too little text": (["--text", NOVEL, "--windows", "9999"], "Text 1 has "),
    "window of a chunk": (["--tokens", "16"], "a window needs more tokens than a chunk"),
    "no windows": (["--windows", "0"], "windows is an integer, at least 1, got 0"),
    "missing model": (["--model", "./nowhere"], "There is no model directory ./nowhere."),
    "no model in it": (["--model", EXAMPLES / "text"], "cannot be loaded"),
    "missing recall": (["--recall", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
    "missing calibration": (["--calibration", "no.safetensors"], "no.safetensors"),
    "json nowhere": (["--json", "nowhere/out.json"], "there is no such directory"),
    "plot nowhere": (["--plot", "nowhere/out.png"], "there is no such directory"),
    "plot of no kind": (["--plot", "out.docx"], "out.docx: a plot is one of"),
    "impossible spec": (
        ["--kv-cache", "int4-srft:group_size=24,calibrate=off"],
        "cannot pack any layer of this model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case, capsys):
    args, said = ERRORS[case]
    out, err, status = run(capsys, *args)
    assert out == ""
    message = str(status)
    assert message.startswith("mlx_kvq evaluate: error: ") and said in message
    assert "\n" not in message and "Traceback" not in err


def test_bad_recall_lines(tmp_path):
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not"):
        read_recall(bad_recall(tmp_path))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_recall(tmp_path / "empty.jsonl")
    assert len(read_recall(RECALL)) == 12 and len(read_recall(RECALL, 3)) == 3


def test_no_text_and_no_matplotlib(qwen, monkeypatch):
    with pytest.raises(ValueError, match="no text"):
        evaluate(*qwen, ["kv4"], [])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backend_bases", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plots.check("x.png")


def test_the_package_has_it_under_its_name(qwen):
    assert callable(
        mlx_kvq.evaluate
    )  # also after `import mlx_kvq.measure.evaluate`, as in this file
    with pytest.raises(ValueError, match="no text"):
        mlx_kvq.evaluate(*qwen, [], [])
    assert quality.LEVEL == 0.95


def test_intervals_of_what_is_positive_are_on_a_log_scale():
    """They never reach 0, and a factor on all values is one on the ends."""
    x = np.array([0.01, 0.02, 0.08])
    e = Estimate.on_log_scale(x)
    assert e.mean == pytest.approx(x.mean())
    assert 0 < e.low < e.mean < e.high
    assert e.mean / e.low == pytest.approx(e.high / e.mean)
    assert Estimate.on_log_scale(5 * x).high == pytest.approx(5 * e.high)
    assert np.isnan(Estimate.on_log_scale([0.1]).low)
    assert np.isnan(Estimate.on_log_scale([0.0, 0.1]).low)
