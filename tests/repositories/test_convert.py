"""mlx_kvq convert and inspect: what mlx_lm.convert does, then the cache, all or nothing."""

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten
from mlx_lm import generate, load

import mlx_kvq
from mlx_kvq import cli
from mlx_kvq.repositories import card as model_card
from mlx_kvq.repositories import repository
from mlx_kvq.repositories.convert import SAMPLE
from mlx_kvq.repositories.repository import FILE
from tests.support.converted import MODELS, made_up, write
from tests.support.float32 import TEXT

ROOT = MODELS.parent.parent
QWEN, GEMMA = MODELS / "tiny-qwen2-8bit", MODELS / "tiny-gemma3-8bit"
NOVEL, RECALL = ROOT / "examples/text/novel.txt", ROOT / "examples/text/recall.jsonl"
stock = import_module("mlx_lm.convert")


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of a command of ours, in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    if isinstance(ended.value.code, str):  # what the interpreter would print
        return 1, out, err + ended.value.code
    return ended.value.code or 0, out, err


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def quick(monkeypatch):
    """Evaluate on a window of 100 tokens, more than are kept exactly."""
    for name, value in {"LEAST": 100, "WINDOW": 100, "WINDOWS": 1}.items():
        monkeypatch.setattr(import_module("mlx_kvq.repositories.convert"), name, value)


@pytest.fixture(scope="module")
def unquantized(tmp_path_factory):
    """A repository as Hugging Face has it: a small Qwen2 in bf16, with an odd head size."""
    from mlx_lm.models.qwen2 import Model, ModelArgs

    folder = tmp_path_factory.mktemp("hf") / "small"
    shutil.copytree(QWEN, folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("quantization", "quantization_config"):
        del config[name]
    config |= {"hidden_size": 192, "num_attention_heads": 2, "intermediate_size": 64}
    config |= {"num_hidden_layers": 2}
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(3)
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    (folder / "model.safetensors.index.json").unlink()
    mx.save_safetensors(
        str(folder / "model.safetensors"), {k: v.astype(mx.bfloat16) for k, v in weights.items()}
    )
    (folder / "README.md").unlink()
    return folder


def weights(folder):
    return {
        k: np.array(v.view(mx.uint8)) for k, v in mx.load(f"{folder}/model.safetensors").items()
    }


def card(folder):
    _, block, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(block), body


def test_every_option_of_mlx_lm_is_there():
    import argparse

    ours = argparse.ArgumentParser()
    import_module("mlx_kvq.commands.convert").add_arguments(ours)
    theirs = {a.dest: a for a in stock.configure_parser()._actions}
    found = {a.dest: a for a in ours._actions}
    assert len(theirs) > 10
    for dest, action in theirs.items():
        for what in ("option_strings", "default", "choices", "type", "nargs", "const"):
            assert getattr(found[dest], what) == getattr(action, what), (dest, what)


@pytest.mark.parametrize(
    "flags, options",
    [
        ([], {}),
        (
            ["-q", "--q-bits", "8", "--q-group-size", "32"],
            {"quantize": True, "q_bits": 8, "q_group_size": 32},
        ),
        (["--dtype", "float16"], {"dtype": "float16"}),
    ],
)  # fmt: skip
def test_the_model_is_mlx_lms_own(flags, options, unquantized, text, tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    status, _, err = run(
        capsys, "convert", "--hf-path", unquantized, "--mlx-path", ours, *flags,
        "--kv-cache", "int4-srft:seed=5", "--calibration-text", text,
    )  # fmt: skip
    assert status == 0, err
    stock.convert(str(unquantized), str(theirs), **options)
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[k], b[k]) for k in a)
    config = json.loads((ours / "config.json").read_text())
    section = config.pop("kv_cache")
    assert config == json.loads((theirs / "config.json").read_text())
    assert (section["spec"], section["seed"]) == ("int4-srft:seed=5", 5)
    assert section["layers"] == {"0": "int4", "1": "int4"}
    assert section["made"]["text"] == "given"
    assert sorted(os.listdir(ours)) == sorted([*os.listdir(theirs), FILE])
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".")]

    model, tokenizer = load(str(ours))
    assert "packed 2 of 2 layers" in capsys.readouterr().err
    plain, _ = load(str(theirs))
    found = mlx_kvq.calibrate(plain, tokenizer, TEXT, progress=False)
    assert repository.of(model).calibration.digest == repository._without_metric(found).digest


@pytest.mark.parametrize("source, layers, spec", [
    (QWEN, 4, "int4-srft:high=last"), (GEMMA, 6, "k8v4-srft:calibrate=off,skip=first"),
])  # fmt: skip
def test_both_bundled_models(source, layers, spec, text, tmp_path, capsys, quick):
    """Convert, evaluate, inspect, generate; tests/repositories/test_hub.py does so from a shell."""
    folder = tmp_path / "model"
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(NOVEL.read_text()[:1200])
    recall = tmp_path / "recall.jsonl"
    recall.write_text('{"prompt": "It was a dark", "answer": " night"}\n' * 3)
    calibrated = "calibrate=off" not in spec
    status, _, err = run(
        capsys, "convert", "--hf-path", source, "--mlx-path", folder, "--kv-cache", spec,
        *(["--calibration-text", text] if calibrated else []),
        "--evaluate", held_out, "--recall", recall, "--recall-prompts", "1",
    )  # fmt: skip
    assert status == 0, err
    packed = layers if calibrated else layers - 1
    assert f"[mlx_kvq] model: {spec}: packed {packed} of {layers} layers" in err

    data, body = card(folder)
    assert {"mlx", "mlx_kvq", "kv-cache-quantization"} <= set(data["tags"])
    assert data["library_name"] == "mlx"
    (entry,) = data["model-index"]
    metrics = entry["results"][0]["metrics"]
    values = {(m["type"], m["args"]["kv_cache"]): m["value"] for m in metrics}
    assert 1 < values["perplexity", "fp16"] < 1000
    assert 1 < values["perplexity", spec] < 1000
    assert 0 < values["kl_divergence", spec] < 1
    assert values["exact_match", spec] in (0, 1)
    assert 'mlx_lm.generate --model model --prompt "Hello"' in body
    assert "mlx_lm.server --model model --port 8080" in body
    assert "### Measured on held-out text\n" in body
    assert entry["results"][0]["dataset"]["name"] == "held-out text"
    readme = (folder / "README.md").read_text()
    assert str(tmp_path) not in readme
    assert "held-out.txt" not in readme  # a name may say what nobody else is to know
    assert "recall.jsonl" not in readme

    plot = tmp_path / "plot.png"
    status, out, err = run(capsys, "inspect", folder)
    assert status == 0, err
    lines = dict(line.split(None, 1) for line in out.splitlines()[:6])
    assert lines["cache"] == f"{spec}, seed 0, format 1"
    rows = [row.split("|")[2] for row in body.splitlines() if row.count("|") == 3][2:]
    fp16, ours = (float(cell.split()[0]) for cell in rows)
    assert lines["token"].startswith(f"{ours:.0f} bytes in all layers, fp16 {fp16:.0f}: ")
    if calibrated:
        assert lines["layers"] == "int4 in 0-2; int8 in 3"
        assert out.count(" keys ") == layers
        status, _, err = run(capsys, "inspect", folder, "--plot", plot)
        assert plot.read_bytes().startswith(b"\x89PNG")
    else:
        assert lines["left"] == "0: skipped"
        status, _, err = run(capsys, "inspect", folder, "--plot", plot)
        assert "There is nothing to plot" in err
        assert status == 1
    model, tokenizer = load(str(folder))
    assert f"[mlx_kvq] {spec}: packed {packed} of {layers} layers" in capsys.readouterr().err
    by_hand, _ = load(str(source))
    found = repository.of(model).calibration
    mlx_kvq.enable(by_hand, spec, calibration=found, verbose=False)
    texts = [generate(m, tokenizer, "It was", max_tokens=4) for m in (model, by_hand)]
    assert texts[0] == texts[1] != ""


def test_in_place_and_again(text, tmp_path, capsys, quick):
    folder = tmp_path / "model"
    shutil.copytree(QWEN, folder)
    readme = (folder / "README.md").read_text()
    before = (folder / "model.safetensors").read_bytes()
    convert = ("convert", "--mlx-path", folder, "--calibration-text", text)
    assert run(capsys, *convert)[0] == 0
    assert (folder / "model.safetensors").read_bytes() == before
    first, first_body = card(folder)
    assert first["license"] == "mit"
    assert "Trained from\nscratch on thirteen" in first_body  # what was there stays
    assert "model-index" not in first
    section = json.loads((folder / "config.json").read_text())["kv_cache"]

    held_out = tmp_path / "novel.txt"
    held_out.write_text(NOVEL.read_text()[:2400])
    for _ in range(2):  # the block and the figures are replaced, not added
        assert run(capsys, *convert, "--kv-cache", "int8-srft", "--evaluate", held_out)[0] == 0
        data, body = card(folder)
        assert body.count("## KV cache") == body.count("int8-srft`: packed") == 1
        assert len(data["model-index"]) == len(data["model-index"][0]["results"]) == 1
        assert len(data["model-index"][0]["results"][0]["metrics"]) == 3
        assert "int4-srft" not in body
    again = json.loads((folder / "config.json").read_text())["kv_cache"]
    assert again["layers"] == {str(i): "int8" for i in range(4)}
    assert again["calibration"] == section["calibration"]  # of the same text

    off = ("convert", "--mlx-path", folder, "--kv-cache", "int4-srft:calibrate=off")
    assert run(capsys, *off)[0] == 0
    assert not (folder / FILE).exists()
    data, body = card(folder)
    assert "model-index" not in data  # the figures were of another cache
    assert "Measured" not in body
    assert body.startswith(readme.split("---\n", 2)[2].rstrip())


def test_in_place_without_a_card(tmp_path, capsys):
    """One block of metadata, one heading: nothing of the empty card is left."""
    folder = tmp_path / "model"
    shutil.copytree(QWEN, folder)
    (folder / "README.md").unlink()
    for _ in range(2):
        status, _, err = run(capsys, "convert", "--mlx-path", folder, "--kv-cache", OFF)
        assert status == 0, err
        readme = (folder / "README.md").read_text()
        assert [line for line in readme.splitlines() if line.startswith("---")] == ["---", "---"]
        assert card(folder)[1].startswith("\n# model\n\n<!-- mlx_kvq -->")


def test_several_texts_are_numbered(tmp_path, capsys, quick):
    folder, texts = tmp_path / "model", []
    shutil.copytree(QWEN, folder)
    for i in range(2):  # of one name, in two folders
        (tmp_path / str(i)).mkdir()
        texts.append(tmp_path / str(i) / "secret.txt")
        texts[-1].write_text(NOVEL.read_text()[1200 * i : 1200 * i + 1200])
    command = ("convert", "--mlx-path", folder, "--kv-cache", OFF, "--evaluate", *texts)
    status, _, err = run(capsys, *command)
    assert status == 0, err
    readme = (folder / "README.md").read_text()
    assert "### Measured on held-out text 1, held-out text 2\n" in readme
    assert "secret" not in readme


def test_a_broken_section_is_replaced(text, tmp_path, capsys):
    folder = write(tmp_path / "model")
    (folder / FILE).write_bytes(b"")
    assert run(capsys, "inspect", folder)[0] == 1
    status, _, err = run(capsys, "convert", "--mlx-path", folder, "--calibration-text", text)
    assert status == 0, err
    assert run(capsys, "inspect", folder)[0] == 0


def test_a_converted_repository_is_converted_again(tmp_path, text, capsys):
    """mlx_lm.convert keeps the old section in config.json, without the file."""
    source = write(tmp_path / "source", "int8-srft")
    folder = tmp_path / "model"
    arguments = ("--hf-path", source, "--mlx-path", folder, "--calibration-text", text)
    status, _, err = run(capsys, "convert", *arguments)
    assert status == 0, err
    assert "in place of" not in err
    load(str(folder))
    assert "int4-srft: packed 4 of 4" in capsys.readouterr().err


def test_evaluate_without_a_file_says_what_it_read(text, tmp_path, capsys, monkeypatch, quick):
    """The built-in sample, which an uncalibrated cache has not been fitted to."""
    module = import_module("mlx_kvq.repositories.convert")
    monkeypatch.setattr(module, "sample_text", lambda: NOVEL.read_text()[:2400])
    monkeypatch.setattr(module, "calibrate", lambda *a, **k: made_up())
    for options, flatters in [
        ([], True),
        (["--calibration-text", text], False),
        (["--kv-cache", "int4-srft:calibrate=off"], False),
    ]:
        folder = tmp_path / f"model{len(options)}{flatters}"
        shutil.copytree(QWEN, folder, dirs_exist_ok=True)
        status, _, err = run(capsys, "convert", "--mlx-path", folder, *options, "--evaluate")
        assert status == 0, err
        body = card(folder)[1]
        assert f"### Measured on {SAMPLE}" in body
        assert ("which flatters the cache" in body) == flatters


def test_a_failure_leaves_nothing(tmp_path, monkeypatch, capsys):
    module = import_module("mlx_kvq.repositories.convert")

    def fails(*args, **kwargs):
        raise ValueError("the text is bad")

    monkeypatch.setattr(module, "calibrate", fails)
    status, _, err = run(capsys, "convert", "--hf-path", QWEN, "--mlx-path", tmp_path / "a" / "b")
    assert (status, err.splitlines()[-1]) == (1, "mlx_kvq convert: error: the text is bad")
    assert os.listdir(tmp_path / "a") == []


def test_in_place_a_failure_changes_nothing(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "model")
    before = {p: (folder / p).read_bytes() for p in os.listdir(folder)}
    (folder / "README.md").unlink()
    (folder / "README.md").write_text("---\n: [\n---\n")
    before["README.md"] = (folder / "README.md").read_bytes()
    command = ("convert", "--mlx-path", folder, "--kv-cache", "int8-srft:calibrate=off")
    status, _, err = run(capsys, *command)
    assert status == 1
    assert "The metadata of" in err
    assert {p: (folder / p).read_bytes() for p in os.listdir(folder)} == before


THERE, OFF = ["--mlx-path", "THERE"], "int4-srft:calibrate=off"


@pytest.mark.parametrize("place", ["new", "there"])
def test_a_full_disk_is_one_line(place, tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "there")
    before = {p: (folder / p).read_bytes() for p in os.listdir(folder)}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository, "_write_json", full)
    where = ["--mlx-path", tmp_path / place, *(["--hf-path", QWEN] if place == "new" else [])]
    status, _, err = run(capsys, "convert", *where, "--kv-cache", "int8-srft:calibrate=off")
    assert status == 1
    assert err.splitlines()[-1].endswith("cannot be written: No space left on device.")
    assert os.listdir(tmp_path) == ["there"]
    assert {p: (folder / p).read_bytes() for p in os.listdir(folder)} == before


ERRORS: dict = {
    "fp16": (["--hf-path", QWEN, "--kv-cache", "fp16"], "use mlx_lm.convert"),
    "unknown cache": (["--hf-path", QWEN, "--kv-cache", "int6-srft"], "unknown cache 'int6-srft'"),
    "no repository": (["--mlx-path", "NEW"], "There is no repository '"),
    "options in place": ([*THERE, "-q"], "quantize cannot be applied in place"),
    "target exists": (["--hf-path", QWEN, *THERE], "exists already. Give another"),
    "no such model": (["--hf-path", "./no/such", "--mlx-path", "NEW"], "cannot be converted: "),
    "text and off": (
        ["--hf-path", QWEN, "--kv-cache", OFF, "--calibration-text", NOVEL],
        "says calibrate=off, but a calibration text is given",
    ),
    "no such text": ([*THERE, "--calibration-text", "no.txt"], "no.txt cannot be read"),
    "short text": (
        [*THERE, "--kv-cache", OFF, "--evaluate", "SHORT"], "too short to evaluate on: 512"
    ),
    "recall alone": ([*THERE, "--recall", RECALL], "give a text to evaluate on"),
    "group": ([*THERE, "--kv-cache", f"{OFF},group_size=48"], "possible: 8, 16, 32"),
    "private": ([*THERE, "--private"], "give --upload-repo"),
    "a link": ([*THERE, "--upload-repo", "a/b"], "is a link to"),
    "upload name": ([*THERE, "--upload-repo", "a/b/c"], "a/b/c"),
    "both": (["--hf-path", QWEN, "--mlx-path", "NEW", "-q", "-d"], "Choose either quantize or"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_change_nothing(case, tmp_path, capsys):
    arguments, message = ERRORS[case]
    folder = write(tmp_path / "there")
    (tmp_path / "short").write_text("Too short.")
    places = {"THERE": folder, "NEW": tmp_path / "new", "SHORT": tmp_path / "short"}
    config = (folder / "config.json").read_bytes()
    status, _, err = run(capsys, "convert", *(places.get(a, a) for a in arguments))
    assert status == (2 if case == "unknown cache" else 1)  # 2 if the parser finds it
    (line,) = [x for x in err.splitlines() if x.startswith("mlx_kvq convert: error: ")]
    assert message in line
    assert not places["NEW"].exists()
    assert (folder / "config.json").read_bytes() == config
    assert sorted(os.listdir(tmp_path)) == ["short", "there"]


def test_the_function(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(QWEN, folder)
    spec = "int4-srft:calibrate=off"
    assert mlx_kvq.convert(mlx_path=folder, kv_cache=spec, progress=False) == folder
    assert repository.read_config(folder)["kv_cache"]["spec"] == spec
    with pytest.raises(TypeError, match="mlx_lm.convert takes no q_bit"):
        mlx_kvq.convert(str(QWEN), tmp_path / "new", q_bit=4)


def test_plain_mlx_lm_runs_it_as_an_ordinary_model(tmp_path):
    """The cache's file is not taken for weights, and the section is ignored."""
    folder = write(tmp_path / "model")
    code = (
        "import sys; from mlx_lm import load, generate\n"
        "for path in sys.argv[1:]:\n"
        "    model, tokenizer = load(path)\n"
        "    print(generate(model, tokenizer, 'It was', max_tokens=8))\n"
        "assert not [m for m in sys.modules if m.startswith('mlx_kvq.')][1:], sys.modules\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, folder, QWEN],
        env=os.environ | {"MLX_KVQ_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    ours, original = process.stdout.strip().split("\n")
    assert ours == original != ""
    assert process.stderr == ""


def test_inspect_tells_what_it_cannot(tmp_path, capsys):
    cases = [
        (QWEN, "has no 'kv_cache' in its config.json: mlx_kvq convert adds one"),
        (tmp_path / "none", "is no local repository, and not to be had"),
        (write(tmp_path / "bad", layers={(7,): "int4"}), "this model has no such cache"),
    ]
    other = write(tmp_path / "other")
    config = repository.read_config(other)
    config["kv_cache"]["format"] = "other"
    (other / "config.json").write_text(json.dumps(config))
    cases.append((other, "is not mlx_kvq's"))
    strange = write(tmp_path / "strange")
    config = repository.read_config(strange) | {"model_type": "strange"}
    (strange / "config.json").write_text(json.dumps(config))
    cases.append((strange, "cannot be built: Model type strange not supported."))
    for folder, message in cases:
        status, out, err = run(capsys, "inspect", folder)
        assert (status, out) == (1, "")
        assert err.startswith("mlx_kvq inspect: error: ")
        assert message in err
        assert err.count("\n") == 0


def test_inspect_needs_no_weights(tmp_path, capsys):
    folder = write(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    status, out, err = run(capsys, "inspect", folder)
    assert status == 0, err
    assert "544 bytes in all layers, fp16 2048: 3.76 times fewer" in out
    assert "exact        the newest 64 to 256 and the first 4 tokens, beside the others" in out


def test_a_plot_is_of_a_known_kind(tmp_path, capsys):
    folder = write(tmp_path / "model")
    status, _, err = run(capsys, "inspect", folder, "--plot", tmp_path / "x.doc")
    assert (status, "a plot is one of" in err) == (1, True)


def test_a_card_keeps_what_others_wrote(tmp_path):
    """Tags as a single string, figures of others, no text, line ends of Windows."""
    text = (
        "---\r\ntags: bert\r\nmodel-index:\r\n- name: n\r\n  results:\r\n"
        "  - task: {type: text-generation}\r\n    dataset: {type: a, name: A}\r\n"
        "    metrics:\r\n    - {type: acc, value: 1}\r\n---\r\n"
    )
    (tmp_path / "README.md").write_bytes(text.encode())
    model, _ = load(str(QWEN))
    report = mlx_kvq.enable(model, "int4-srft:calibrate=off", verbose=False)
    made = model_card.make(tmp_path, "me/model", report, [4, 2], None, [])
    model_card.write(tmp_path, made)
    data, body = card(tmp_path)
    assert data["tags"][0] == "bert"
    assert data["model-index"][0]["results"][0]["metrics"][0]["type"] == "acc"
    assert "# model" in body
    assert "| int4-srft:calibrate=off | 2 (2.00 times fewer) |" in body
    assert (
        "To them come, for each sequence, the newest 64 to 256 and the first 4 tokens as in fp16."
        in body
    )
