"""--kv-cache on every command of mlx-lm, run from its arguments to its output: tokens are packed,
and what comes out is not what comes out without."""

import importlib
import io
import json
import pkgutil
import sys
import types

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_kvq import _startup, ops
from mlx_kvq.plugin.option import wanted
from tests.support.float32 import MODELS, TEXT, write_float32

LAYERS = 4
TRIED = 14  # tokens that enable() runs the model on, in sequences and in a batch
COARSE = (
    "int4-none:group_size=128,calibrate=off,recent=0,first=0"  # so coarse that every text changes
)
COMMANDS = {"generate", "chat", "server", "cache_prompt", "benchmark", "perplexity", "evaluate"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_float32("tiny-qwen2-8bit", tmp_path_factory.mktemp("models"))
    path = folder / "tokenizer_config.json"  # chat needs a template
    config = json.loads(path.read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture
def run(monkeypatch, capsys, folder):
    """Run ``mlx_lm.<command>``; returns its output and how many tokens were packed, per layer."""
    packed = []
    quantize_pack = ops.quantize_pack

    def counting(k, v, fmt):
        packed.append(k.shape[0] * k.shape[2])
        return quantize_pack(k, v, fmt)

    def command(name, *options, spec=COARSE, stdin="", prepare=lambda module: None):
        packed.clear()
        module = importlib.import_module(f"mlx_lm.{name}")
        prepare(module)
        argv = [f"mlx_lm.{name}", "--model", folder, *options, "--kv-cache", spec]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr(ops, "quantize_pack", counting)
        capsys.readouterr()
        module.main()
        out, err = capsys.readouterr()
        assert ("packed 4 of 4 layers" in err) == (spec != "fp16")
        return out, sum(packed) / LAYERS - (TRIED if packed else 0)

    yield command
    wanted.spec = None


def test_these_are_all(folder):
    """Every module of mlx-lm that makes a cache has the option; test_server.py runs the server."""
    makers = set()
    for module in pkgutil.iter_modules(mlx_lm.__path__):
        path = f"{mlx_lm.__path__[0]}/{module.name}.py"
        if module.ispkg or module.name.startswith("_"):
            continue
        with open(path) as file:
            source = file.read()
        if "def main(" in source and any(
            word in source for word in ("make_prompt_cache", "stream_generate", "eval_ppl(")
        ):
            makers.add(module.name)
    assert (
        makers
        == COMMANDS
        == {name.removeprefix("mlx_lm.") for name in _startup.COMMANDS} - {"utils"}
    )


def test_generate(run):
    options = ["--prompt", TEXT[:150], "-m", 24, "--ignore-chat-template"]
    text, packed = run("generate", *options)
    assert packed >= 12
    other, _ = run("generate", *options, spec="fp16")
    first, second = (out.split("==========")[1].strip() for out in (text, other))
    assert first != second
    assert min(len(first), len(second)) > 8


def test_chat(run):
    text, packed = run("chat", "-m", 12, stdin="It was\nq\n")
    assert packed >= 12
    assert text != run("chat", "-m", 12, stdin="It was\nq\n", spec="fp16")[0]


def test_cache_prompt(run, tmp_path):
    files = {}
    for spec in (COARSE, "fp16"):
        path = tmp_path / f"{spec[:4]}.safetensors"
        _, packed = run(
            "cache_prompt", "--prompt", TEXT[:100], "--prompt-cache-file", path, spec=spec
        )
        files[spec] = mx.load(str(path))
        assert (packed > 10) == (spec == COARSE)
    words = [a for a in files[COARSE].values() if a.dtype == mx.uint32 and a.ndim == 4]
    assert len(words) == LAYERS
    assert not any(a.dtype == mx.uint32 and a.ndim == 4 for a in files["fp16"].values())


@pytest.mark.parametrize("batch", [1, 3])
def test_benchmark(run, batch):
    options = ["-p", 20, "-g", 6, "-n", 1, "-b", batch]
    out, packed = run("benchmark", *options)
    assert "Averages:" in out
    assert packed >= 2 * batch * (20 + 5)  # a warm-up and a trial
    assert run("benchmark", *options, spec="fp16")[1] == 0


def test_perplexity(run):
    def prepare(module):
        data = mx.array(np.random.default_rng(0).integers(5, 4000, (2, 300)))
        module.load_data = lambda *args, **kwargs: data

    found = {}
    for spec in (COARSE, "fp16"):
        out, packed = run("perplexity", "--batch-size", 2, spec=spec, prepare=prepare)
        found[spec] = next(line for line in out.splitlines() if line.startswith("Perplexity:"))
        assert packed == (2 * 299 if spec == COARSE else 0)
    assert found[COARSE] != found["fp16"]


class Instance:
    def __init__(self, *args):
        self.args = args


def _lm_eval():
    """As much of lm-evaluation-harness as mlx_lm.evaluate calls: one request of each kind."""

    def simple_evaluate(model, **_):
        text = TEXT * 2
        scored = model.loglikelihood([Instance(text, " of the"), Instance(text, " in his house")])
        (rolling,) = model.loglikelihood_rolling([Instance(text)])
        (made,) = model.generate_until([Instance(text, {"until": ["zzz"], "max_gen_toks": 24})])
        found = {"scored": [s for s, _ in scored], "rolling": rolling, "made": made}
        return {"results": {"all": found}}

    class LM:
        pass

    root, api = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.api")
    model, registry = types.ModuleType("lm_eval.api.model"), types.ModuleType("lm_eval.registry")
    vars(root)["simple_evaluate"], vars(model)["LM"] = simple_evaluate, LM
    vars(registry)["register_model"] = lambda name: lambda cls: cls
    return {
        "lm_eval": root,
        "lm_eval.api": api,
        "lm_eval.api.model": model,
        "lm_eval.api.registry": registry,
    }


def test_evaluate(run, monkeypatch, tmp_path):
    for name, module in _lm_eval().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)

    def prepare(module):
        monkeypatch.setattr(module, "version", lambda name: "0")

    found = {}
    # mlx-lm 0.31.3 does not know the harness's "max_gen_toks": it would make 8192 tokens.
    options = ["--tasks", "t", "--max-tokens", 24, "--output-dir", tmp_path]
    for spec in (COARSE, "fp16"):
        _, packed = run("evaluate", *options, spec=spec, prepare=prepare)
        (path,) = tmp_path.iterdir()
        found[spec] = json.loads(path.read_text())["all"]
        path.unlink()
        assert (packed > 300) == (spec == COARSE)
    sys.modules.pop("mlx_lm.evaluate")
    for kind in ("scored", "rolling", "made"):  # none of the three is left out
        assert found[COARSE][kind] != found["fp16"][kind]


def test_a_draft_model_is_packed_too(run):
    options = ["--prompt", "It was", "-m", 8, "--draft-model", MODELS / "tiny-qwen2-8bit"]
    _, alone = run("generate", *options[:4])
    _, both = run("generate", *options, "--num-draft-tokens", 2)
    assert both > 1.5 * alone
