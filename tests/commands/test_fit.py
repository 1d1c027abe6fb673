"""``mlx_kvq fit``: what it counts is what real caches hold, and its table follows from that."""

import json

import mlx.core as mx
import pytest
from mlx_lm import load

import mlx_kvq
from mlx_kvq import cli
from mlx_kvq.commands import fit
from mlx_kvq.stock import leaves
from tests.support.float32 import MODELS

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "Llama-3.1-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def table(out):
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_llama_on_16_gb(llama, capsys):
    """The figures by hand: 32 layers of 8 heads of 128; int4 rows of 136 bytes."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fit", str(llama), "--memory", "16GB", "--weight-bits", "4"])
    assert exit_.value.code is None
    out = capsys.readouterr().out
    assert "made for 131,072 tokens" in out and "2/3 by default: 10.7 GB" in out
    rows = table(out)
    assert rows["cache"] == ["bytes/token", "1", "2", "4", "8", "16", "32"]
    weights = 8030261248 - 266240  # of which norms have 16 bits
    left = (16 << 30) * 2 / 3 - (weights * 4.5 / 8 + 266240 * 2) - 1.5 * (1 << 30)
    for name, row in (("fp16", 512), ("kv8", 272), ("kv4", 144), ("int4-srft", 136)):
        token = 32 * 8 * row
        assert rows[name][0] == f"{token:,}"
        exact = 32 * 8 * 512 if name == "int4-srft" else 0
        for cell, n in zip(rows[name][1:], (1, 2, 4, 8, 16, 32), strict=True):
            fits = 0
            for tail in (64, 128, 256):  # which a longer context has
                more = int((left - n * (tail + 4) * exact) / (n * token + 8 * 512)) // 256 * 256
                fits = more if tail == 64 or more >= 64 * tail else fits
            said = f"{fits:,}" if fits < 131072 else "131,072*"
            assert cell == ("–" if name.startswith("kv") and n > 1 else said)
    assert rows["fp16"][1] == "39,168" and rows["int4-srft"][1] == "131,072*"


def test_the_models_limit_binds_on_64_gb(llama, capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", str(llama), "--memory", "64GB", "--kv-cache", "INT4", "fp16"])
    rows = table(capsys.readouterr().out)
    assert rows["int4-srft"][1:3] == ["131,072*", "131,072*"] and rows["fp16"][1] == "131,072*"
    assert rows["fp16"][2] == "126,976"  # 48 GB, 16.06 of weights, 266,240 bytes a token


@pytest.mark.parametrize("name", ["tiny-qwen2-8bit", "tiny-gemma3-8bit"])
@pytest.mark.parametrize("spec", ["fp16", "int4-srft", "k8v4-srft:recent=0,first=0"])
def test_it_counts_what_real_caches_hold(name, spec):
    model, _ = load(str(MODELS / name))
    layers = fit.layers_of(model)
    plan = fit.Plan(layers, spec)
    made = mlx_kvq.make_prompt_cache(model, spec if spec == "fp16" else f"{spec}:calibrate=off"
                                     if ":" not in spec else f"{spec},calibrate=off")  # fmt: skip
    T = 512
    for _ in range(0, T, 256):
        model(mx.zeros((1, 256), mx.int32), cache=made)
    for _ in range(64):  # a decoded token lets go of the block that a prompt keeps
        model(mx.zeros((1, 1), mx.int32), cache=made)
        T += 1
    held = 0
    for _, c in leaves(made):
        itemsize = 2 / c.keys.itemsize if spec == "fp16" else 1
        arrays = [c.keys, c.values] if spec == "fp16" else [c.rows]
        held += sum(a.nbytes * c.size() / a.shape[2] * itemsize for a in arrays)
        if spec == "int4-srft":
            held += c.tail.nbytes * 2 / c.tail.itemsize * c.format.recent / c.tail.shape[2]
            held += c.oldest.array.size * 2
    assert plan.bytes(T, 1) - plan.copy * T == held


def test_sliding_layers_are_left_by_mlx_lms_quantized_cache(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", str(MODELS / "tiny-gemma3-8bit"), "--memory", "8GB"])
    out = capsys.readouterr().out
    assert "kv4: mlx-lm cannot quantize a RotatingKVCache." in out
    assert "kv4" not in table(out)


@pytest.mark.parametrize(
    "change, tokens",
    [
        ({}, 131072),
        ({"rope_scaling": None}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": {
            "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        ({"max_position_embeddings": None, "rope_scaling": None}, None),
        ({"max_position_embeddings": 5, "rope_scaling": None,
          "text_config": {"max_position_embeddings": 7}}, 7),
    ],
)  # fmt: skip
def test_the_models_limit(change, tokens):
    assert fit.longest(LLAMA | change) == tokens


@pytest.mark.parametrize(
    "memory, part", [(8, 2 / 3), (16, 2 / 3), (36, 2 / 3), (48, 3 / 4), (128, 3 / 4)]
)
def test_what_may_be_wired(memory, part):
    assert fit.wired(memory << 30)[0] == int((memory << 30) * part)


def test_weights_as_the_repository_says(llama):
    index = llama / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 4517000000}, "weight_map": {}}))
    assert fit.weight_bytes(None, llama, LLAMA, None)[0] == 4517000000


@pytest.mark.parametrize(
    "options, message",
    [
        (["--memory", "4GB"], "The weights alone do not fit"),
        (["--memory", "16GB", "--plot", "x.docx"], "a plot is one of"),
        ([], "Give --memory, such as --memory 16GB"),
    ],
)
def test_mistakes(options, message, llama):
    if not options and mx.metal.is_available():
        pytest.skip("this machine's memory is known")
    with pytest.raises(SystemExit, match=message):
        cli.main(["fit", str(llama), *options])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"quantization": {"bits": "x", "group_size": -1}}, None),
        ({"rope_scaling": None, "max_position_embeddings": -5}, None),
        ({"quantization": ["x"]}, "cannot be built"),  # which mlx-lm reads itself
        ({"text_config": 3}, "cannot be built"),
    ],
)
def test_nonsense_in_a_config(change, said, llama, capsys):
    (llama / "config.json").write_text(json.dumps(LLAMA | change))
    with pytest.raises(SystemExit, match=said) as exit_:
        cli.main(["fit", str(llama), "--memory", "64GB", "--kv-cache", "int4"])
    assert ("| int4-srft | 34,816 |" in capsys.readouterr().out) == (exit_.value.code is None)
    assert "\n" not in str(exit_.value.code)


def test_too_many_layers_are_refused_before_they_are_made(llama):
    (llama / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 10**9}))
    with pytest.raises(SystemExit, match="more than 10000 layers"):
        cli.main(["fit", str(llama), "--memory", "16GB"])


def test_the_picture(llama, tmp_path):
    path = tmp_path / "memory.png"
    with pytest.raises(SystemExit):
        cli.main(["fit", str(llama), "--memory", "16GB", "--weight-bits", "4", "--plot", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
