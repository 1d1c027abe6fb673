"""The seams with mlx-lm: whatever was imported first, all of them or none, and what an enabled
model is to mlx-lm and to pickle."""

import argparse
import copy
import importlib
import pickle
import subprocess
import sys
import types
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm.models import cache as stock
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_kvq
from mlx_kvq import stock as kvq_stock
from mlx_kvq.caches import prompt_file
from mlx_kvq.calibration import automatic
from mlx_kvq.plugin import programs
from mlx_kvq.plugin.option import wanted
from mlx_kvq.stock import identity
from tests.support.float32 import MODELS

QWEN = str(MODELS / "tiny-qwen2-8bit")
SPEC = "int4-srft:calibrate=off"


@pytest.fixture
def model():
    return load(QWEN)[0]


def python(code, *options):
    """Run ``code`` in an interpreter of its own; returns what it printed."""
    process = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


def test_whatever_was_imported_before_enable(tmp_path):
    """By a script and by another package, under names of their own; mlx_kvq after them all."""
    (tmp_path / "other.py").write_text(
        "from mlx_lm.models.cache import make_prompt_cache as build\n"
        "from mlx_lm.models.base import scaled_dot_product_attention as attend\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from mlx_lm.models.cache import load_prompt_cache as read, make_prompt_cache as make\n"
        "from mlx_lm.models.cache import save_prompt_cache as write\n"
        "from mlx_lm.generate import maybe_quantize_kv_cache as quantize\n"
        "from mlx_lm import load\n"
        "import other, mlx.core as mx\n"
        f"model = load({QWEN!r})[0]\n"
        "import mlx_kvq\n"
        f"mlx_kvq.enable(model, {SPEC!r})\n"
        "caches = make(model, max_kv_size=32)\n"
        "print(*{f'{type(c).__name__}({c.max_size})' for c in caches})\n"
        "print(type(other.build(model)[0]).__name__)\n"
        "cache = make(model); model(mx.array([[1, 2, 3]]), cache=cache)\n"
        "k, v = cache[0].update_and_fetch(*[mx.ones((1, 1, 1, 128))] * 2)\n"
        "q = mx.ones((1, 4, 1, 128))\n"
        "print(other.attend(q, k, v, cache[0], scale=1.0, mask=None).shape == q.shape)\n"
        "try:\n    quantize(cache, 0, 64, 4)\nexcept ValueError:\n    print('refused')\n"
        f"write({str(tmp_path / 'c.safetensors')!r}, make(model))\n"
        f"path = {str(tmp_path / 'c.safetensors')!r}\n"
        "data = bytearray(open(path, 'rb').read()); data[-1] ^= 1\n"
        "open(path, 'wb').write(data)\n"
        "try:\n    read(path)\nexcept ValueError:\n    print('damaged')\n"
    )
    assert python(code) == [
        "PackedRotatingKVCache(32)",
        "PackedKVCache",
        "True",
        "refused",
        "damaged",
    ]


@pytest.mark.parametrize("line", ["", "import mlx_lm.models.cache\n"])
def test_a_packed_file_where_nothing_is_enabled(tmp_path, line, model):
    """With the start-up line, and without it (-S) by the import alone, before or after mlx-lm."""
    path = str(tmp_path / "cache.safetensors")
    caches = mlx_kvq.make_prompt_cache(model, SPEC)
    model(mx.array([[1, 2, 3]]), cache=caches)
    stock.save_prompt_cache(path, caches)
    read = (
        "from mlx_lm.models.cache import load_prompt_cache\n"
        f"print(*{{type(c).__name__ for c in load_prompt_cache({path!r})}})\n"
    )
    assert python(read) == ["PackedKVCache"]
    paths = f"import sys; sys.path[:] = {sys.path!r}\n"
    assert python(paths + line + "import mlx_kvq\n" + read, "-S") == ["PackedKVCache"]


def test_a_seam_that_is_gone_is_named_and_nothing_is_changed():
    """Each name renamed in turn: the second call says the same as the first, and mlx-lm goes on."""
    code = (
        "import importlib\n"
        "from mlx_kvq.caches import seams; from mlx_kvq.caches import trampoline\n"
        "from mlx_kvq.stock_names import NotSupportedError\n"
        "import mlx_lm\n"
        "def state():\n"
        "    return [k for k, v in trampoline._changed.items() if not v[2]]\n"
        "before = state()\n"
        "for seam in seams.SEAMS:\n"
        "    module = importlib.import_module(f'mlx_lm.{seam.module}')\n"
        "    *outer, inner = seam.name.split('.')\n"
        "    owner = getattr(module, outer[0]) if outer else module\n"
        "    f = vars(owner)[inner]\n"
        "    delattr(owner, inner)\n"
        "    setattr(owner, inner + '_moved', f)\n"
        "    said = []\n"
        "    for _ in range(2):\n"
        "        try:\n            seams.install()\n"
        "        except NotSupportedError as error:\n            said.append(str(error))\n"
        "    name = f'{seam.module}.{seam.name}'\n"
        "    gone = f'mlx_lm {mlx_lm.__version__} is not supported: {name} is missing'\n"
        "    assert said == 2 * [gone], (name, said)\n"
        "    setattr(owner, inner, f)\n"
        "    assert state() == before, name\n"
        "seams.install()\n"
        "print(state() != before, len(seams.SEAMS))\n"
    )
    assert python(code)[0] == "True"


@pytest.mark.parametrize("name", ["_BaseCache", "create_attention_mask", "KVCache"])
def test_a_name_that_our_modules_import_is_gone(name):
    code = (
        "import mlx_kvq, mlx_lm.models.cache as cache\n"
        f"del cache.{name}\n"
        "try:\n    mlx_kvq.enable\n"
        "except ValueError as error:\n    print(error)\n"
    )
    assert " ".join(python(code)).endswith(f"is not supported: models.cache.{name} is missing")


def command(name, *without):
    """A stand-in for a module of mlx-lm with all that we need of it, but for some names."""
    module: Any = types.ModuleType(f"mlx_lm.{name}")
    module.argparse = argparse
    for needed in programs.NEEDED[name]:
        outer, _, inner = needed.partition(".")
        made = type(outer, (), {inner: lambda self: None}) if inner else (lambda *args: None)
        if needed not in without:
            setattr(module, outer, made)
    return module


COMMANDS = [(c, n) for c, names in programs.NEEDED.items() for n in names if c[0] not in "um"]


@pytest.mark.parametrize("name, gone", COMMANDS)
def test_a_command_that_lacks_a_name(name, gone, capsys):
    """It goes on untouched without the option, and with it ends in one line."""
    module = command(name, gone)
    before = {k: v for k, v in vars(module).items() if k != "argparse"}
    programs.patch(module)
    assert {k: v for k, v in vars(module).items() if k != "argparse"} == before
    parser = module.argparse.ArgumentParser()
    parser.parse_args([])
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--kv-cache", "int4-srft"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1
    assert line.startswith("[mlx_kvq] error: mlx_lm ")
    assert line.endswith(f"is not supported: {name}.{gone} is missing")


@pytest.mark.parametrize("gone", programs.NEEDED["utils"])
def test_utils_that_lack_a_name(gone, capsys, monkeypatch):
    """They are not taken for a command, nor changed by half."""
    monkeypatch.setattr(wanted, "lacking", "")
    module = command("utils", gone)
    codes = {k: v.__code__ for k, v in vars(module).items() if isinstance(v, types.FunctionType)}
    programs.patch(module)
    assert module.argparse is argparse
    assert all(vars(module)[k].__code__ is code for k, code in codes.items())
    working = command("generate")
    programs.patch(working)
    with pytest.raises(SystemExit):
        working.argparse.ArgumentParser().parse_args(["--kv-cache", "int4-srft"])
    assert f"is not supported: utils.{gone} is missing" in capsys.readouterr().err


def test_an_option_that_is_not_ours_is_left_alone(capsys):
    module = command("generate")
    programs.patch(module)
    parser = module.argparse.ArgumentParser(prog="mlx_lm.generate")
    parser.add_argument("--kv-cache", default="standard")
    assert parser.parse_args([]).kv_cache == "standard"
    assert wanted.spec is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[mlx_kvq] warning: mlx_lm.generate has an option --kv-cache that is no")
    assert parser.parse_args(["--kv-cache", "int4-srft"]).kv_cache == "int4-srft"
    assert wanted.spec is None


@pytest.mark.parametrize("size", ["0", "-3"])
def test_max_kv_size_of_a_command(size, capsys):
    module = command("generate")
    programs.patch(module)
    parser = module.argparse.ArgumentParser()
    parser.add_argument("--max-kv-size", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-cache", "int4-srft", "--max-kv-size", size])
    assert f"error: --max-kv-size is at least 1, got {size}" in capsys.readouterr().err
    assert parser.parse_args(["--max-kv-size", size]).max_kv_size == int(size)


def test_ctrl_c_while_a_command_enables(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_kvq.model.enable.enable", interrupted)
    monkeypatch.setattr(wanted, "spec", "int4-srft")
    with pytest.raises(SystemExit) as stop:
        programs._enabling(lambda: (types.SimpleNamespace(), None), is_server=False)()
    assert (stop.value.code, capsys.readouterr().err) == (130, "[mlx_kvq] interrupted\n")


def test_a_prompt_cache_without_the_draft_model(model):
    speculate = importlib.import_module("mlx_lm.generate").speculative_generate_step
    caches = mlx_kvq.make_prompt_cache(model, SPEC)
    with pytest.raises(ValueError, match="holds nothing of the draft model"):
        list(speculate(mx.array([1]), model, model, prompt_cache=caches, max_tokens=1))
    both = caches + mlx_kvq.make_prompt_cache(model, SPEC)
    assert list(speculate(mx.array([1]), model, model, prompt_cache=both, max_tokens=1))


def test_a_command_with_a_prompt_cache_and_a_draft_model(model, monkeypatch):
    caches = mlx_kvq.make_prompt_cache(model, SPEC)
    monkeypatch.setattr(programs, "_unchecked", [caches])
    monkeypatch.setattr(programs, "_packed_file", False)
    monkeypatch.setattr(wanted, "spec", None)
    load = programs._enabling(lambda: (model, None), is_server=False)
    load()
    with pytest.raises(SystemExit, match="error: The prompt cache holds nothing of the draft mod"):
        load()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_an_enabled_model_can_be_copied_and_pickled(model, way):
    mlx_kvq.enable(model, "int4-srft", verbose=False)
    other = way(model)
    caches = stock.make_prompt_cache(other), stock.make_prompt_cache(model)
    assert [type(c).__name__ for c in caches[0]] == ["PackedKVCache"] * 4
    assert [c.format.signature for c in caches[0]] == [c.format.signature for c in caches[1]]
    assert caches[0][0].model == caches[1][0].model
    assert other.make_cache.make.model is other
    mlx_kvq.disable(other)
    assert type(stock.make_prompt_cache(other)[0]) is stock.KVCache
    assert type(stock.make_prompt_cache(model)[0]) is not stock.KVCache


def test_unpickled_where_nothing_was_enabled(model, tmp_path):
    mlx_kvq.enable(model, SPEC, verbose=False)
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    code = (
        "import pickle\n"
        "from mlx_lm.models.cache import make_prompt_cache\n"
        f"model = pickle.load(open({str(tmp_path / 'model')!r}, 'rb'))\n"
        "print(*{(type(c).__name__) for c in make_prompt_cache(model, 16)})\n"
    )
    assert python(code) == ["PackedRotatingKVCache"]


def names(model):
    return {c.model for c in stock.make_prompt_cache(model)}


@pytest.mark.parametrize("spec", [SPEC, "int4-srft"])
def test_caches_belong_to_the_weights_as_they_are(model, tmp_path, capsys, spec):
    """Of adapters loaded after enable: neither model takes the other's file, each its own."""
    mlx_kvq.enable(model, spec, verbose=False)
    (before,) = names(model)
    base = str(tmp_path / "base.safetensors")
    stock.save_prompt_cache(base, stock.make_prompt_cache(model))
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 8.0, "dropout": 0.0})
    adapted = str(tmp_path / "adapted.safetensors")
    (after,) = names(model)
    assert after != before == identity(load(QWEN)[0])
    stock.save_prompt_cache(adapted, stock.make_prompt_cache(model))
    err = capsys.readouterr().err
    assert err.count("\n") == err.count("weights have changed") == 1
    assert ("calibration is of the weights before" in err) == (spec != SPEC)
    prompt_file.check(stock.load_prompt_cache(adapted), model)
    with pytest.raises(ValueError, match="with other weights"):
        prompt_file.check(stock.load_prompt_cache(base), model)
    with pytest.raises(ValueError, match="with other weights"):
        prompt_file.check(stock.load_prompt_cache(adapted), load(QWEN)[0])
    model.layers[-1].self_attn.q_proj.scale = 1.0  # no parameter, and all that an adapter weighs
    assert names(model) not in ({before}, {after})
    mlx_kvq.enable(model, spec, verbose=False)
    names(model)
    assert capsys.readouterr().err == ""


def test_other_weights_get_another_automatic_calibration(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path))
    first = mlx_kvq.enable(model, "int4-srft", verbose=False)
    linear_to_lora_layers(model, 4, {"rank": 4, "scale": 50.0, "dropout": 0.0})
    for layer in model.layers:
        layer.self_attn.q_proj.lora_b += 0.1
    second = mlx_kvq.enable(model, "int4-srft", verbose=False)
    assert first.calibration.digest != second.calibration.digest
    for layer in model.layers:
        layer.self_attn.q_proj.scale = -50.0
    third = mlx_kvq.enable(model, "int4-srft", verbose=False)
    assert third.calibration.digest != second.calibration.digest
    assert len(list(tmp_path.iterdir())) == 3


def test_a_cache_of_the_same_weights_costs_no_hash(model, monkeypatch):
    mlx_kvq.enable(model, SPEC, verbose=False)
    monkeypatch.setattr(kvq_stock, "identity", None)
    stock.make_prompt_cache(model)


@pytest.mark.parametrize("place", ["a_file", "no_home"])
def test_a_cache_folder_that_cannot_be_used(place, model, tmp_path, monkeypatch, capsys):
    if place == "a_file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path / "file" / "below"))
    else:

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(automatic, "kept_folder", no_home)
    report = mlx_kvq.enable(model, "int4-srft")
    assert report.calibration is not None
    lines = capsys.readouterr().err.splitlines()
    (warning,) = [line for line in lines if "could not be kept" in line]
    assert warning.startswith("[mlx_kvq] warning: the calibration is used")


CALLS = {
    "max_kv_size": lambda m, given: mlx_kvq.make_prompt_cache(m, SPEC, given),
    "max_kv_size of fp16": lambda m, given: mlx_kvq.make_prompt_cache(m, "fp16", given),
    "max_kv_size once enabled": lambda m, given: stock.make_prompt_cache(m, given),
    "tokens": lambda m, given: mlx_kvq.calibrate(m, None, "text", tokens=given),
    "length": lambda m, given: mlx_kvq.calibrate(m, None, "text", length=given),
    "windows": lambda m, given: mlx_kvq.evaluate(m, None, [SPEC], ["text"], windows=given),
    "chunk": lambda m, given: mlx_kvq.evaluate(m, None, [SPEC], ["text"], chunk=given),
}


@pytest.fixture(scope="module")
def enabled():
    model = load(QWEN)[0]
    mlx_kvq.enable(model, SPEC, verbose=False)
    return model


@pytest.mark.parametrize("given", [0, -1, 2.5, "8", True, float("nan")])
@pytest.mark.parametrize("name", CALLS)
def test_sizes_are_positive_integers(enabled, name, given):
    with pytest.raises(ValueError, match=f"^{name.partition(' ')[0]} is an integer, at least"):
        CALLS[name](enabled, given)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_smallest_sizes_work(enabled, size):
    """With fewer tokens than mlx-lm's 4 first ones; its own cache then keeps no new one."""
    own: list = mlx_kvq.make_prompt_cache(enabled, "fp16", size)
    caches = stock.make_prompt_cache(enabled, size)
    for ours, theirs in zip(caches, own, strict=True):
        assert (ours.max_size, ours.keep) == (theirs.max_size, size - 1)
    for L in (1, 1, 30, 1, 1, 3, 1):
        logits = enabled(mx.arange(L)[None], cache=caches)
        assert bool(mx.isfinite(logits).all())
    assert all(c.size() == size and c.rows.shape[2] == size for c in caches)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m: mlx_kvq.enable("model", SPEC),
            "model is a model from mlx_lm.load or mlx_vlm.load, got a str",
        ),
        (
            lambda m: mlx_kvq.enable(None, "fp16"),
            "model is a model from mlx_lm.load or mlx_vlm.load, got a None",
        ),
        (lambda m: mlx_kvq.make_prompt_cache([], SPEC), "model is a model .* got a list"),
        (lambda m: mlx_kvq.calibrate(3, None), "model is a model .* got a int"),
        (lambda m: mlx_kvq.enable(m, SPEC, calibration=3), "calibration is a CalibrationSet or a"),
        (lambda m: mlx_kvq.enable(m, SPEC, policy=["int4"]), "policy is a dict .* got a list"),
        (lambda m: mlx_kvq.enable(m, SPEC, policy={0: "int4"}), "policy names caches by paths"),
        (lambda m: mlx_kvq.enable(m, SPEC, policy={(0,): "int6"}), "policy of .* got 'int6'"),
        (lambda m: mlx_kvq.evaluate(m, None, SPEC, ["text"]), "specs is a list, got"),
        (lambda m: mlx_kvq.evaluate(m, None, [SPEC], "text"), "texts is a list, got 'text'"),
    ],
)
def test_what_is_no_model_and_no_option(enabled, call, message):
    with pytest.raises(ValueError, match=message):
        call(enabled)
    assert type(enabled.make_cache()[0]).__name__ == "PackedKVCache"


def test_rewinding_is_for_speculation_alone(model):
    """Others that trim, as the server's prompt cache does, ask what mlx-lm's caches answer."""
    caches = mlx_kvq.make_prompt_cache(model, SPEC, 8)
    model(mx.arange(12)[None], cache=caches)
    assert not stock.can_trim_prompt_cache(caches)
    assert stock.trim_prompt_cache(caches, 1) == 0
    names = {"__name__": "mlx_lm.generate", "stock": stock, "caches": caches}
    assert eval("(lambda: stock.can_trim_prompt_cache(caches))()", names)
    assert eval("(lambda: stock.trim_prompt_cache(caches, 1))()", names) == 1
