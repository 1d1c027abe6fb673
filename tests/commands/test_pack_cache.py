"""mlx_kvq pack-cache: what a file says is shown, not obeyed, and every error is one line."""

import inspect
import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import utils
from mlx_lm.models import cache as stock

from mlx_kvq import cli
from mlx_kvq.caches import seams
from mlx_kvq.format.spec import Spec
from mlx_kvq.model import loading, pack
from mlx_kvq.model.loading import code_options
from mlx_kvq.repositories.section import Section
from tests.fixtures import make
from tests.support.converted import MODELS

QWEN = MODELS / "tiny-qwen2-8bit"
SPEC = "int4-srft:calibrate=off"
CODE = """\
from pathlib import Path
Path({path!r}).touch()
from mlx_lm.models.qwen2 import Model, ModelArgs
"""


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of the command, in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["pack-cache", *map(str, arguments)])
    out, err = capsys.readouterr()
    if isinstance(ended.value.code, str):
        return 1, out, err + ended.value.code
    return ended.value.code or 0, out, err


def prompt(path, metadata, layers=4):
    """A file as mlx_lm.cache_prompt writes it."""
    seams.install()
    caches = [stock.KVCache() for _ in range(layers)]
    for i, cache in enumerate(caches):
        cache.update_and_fetch(*(make.normal(2 * i + j, 1, 1, 9, 128) for j in (0, 1)))
    stock.save_prompt_cache(str(path), caches, metadata)
    return path


@pytest.fixture
def source(tmp_path):
    return prompt(tmp_path / "in.safetensors", {"model": str(QWEN), "tokenizer_config": "{}"})


@pytest.fixture
def loads(monkeypatch):
    """What mlx_lm.load is called with."""
    calls, load = [], mlx_lm.load

    def watched(*args, **kwargs):
        calls.append((args, kwargs))
        return load(*args, **kwargs)

    vars(watched)["__signature__"] = inspect.signature(load)
    monkeypatch.setattr(mlx_lm, "load", watched)
    return calls


def test_a_file_is_packed(source, tmp_path, capsys):
    status, out, err = run(capsys, source, tmp_path / "out", "--kv-cache", SPEC)
    assert status == 0, err
    assert "out.safetensors: " in out
    found = stock.load_prompt_cache(str(tmp_path / "out.safetensors"), return_metadata=True)
    assert [c.offset for c in found[0]] == [9] * 4
    assert found[1]["model"] == str(QWEN)
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out.safetensors"]


@pytest.fixture
def with_code(tmp_path):
    """A model that brings its own code along, and the file that the code makes when it runs."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(QWEN, folder)
    (folder / "mine.py").write_text(CODE.format(path=str(ran)))
    config = json.loads((folder / "config.json").read_text()) | {"model_file": "mine.py"}
    config["model_type"] = "mine"  # which mlx-lm does not know
    (folder / "config.json").write_text(json.dumps(config))
    return folder, ran


def as_mlx_lm_0_31(monkeypatch):
    """There a model_file is run, whatever anyone says."""
    original = utils.load_model

    def load_model(path, lazy=False, strict=True, model_config=None):
        options = code_options(original, True)
        return original(path, lazy, strict, model_config, **options)

    def load(name, tokenizer_config=None, model_config=None):
        model, _ = utils.load_model(Path(name), model_config=model_config)
        return model, utils.load_tokenizer(Path(name), tokenizer_config)

    monkeypatch.setattr(utils, "load_model", load_model)
    monkeypatch.setattr(mlx_lm, "load", load)


@pytest.mark.parametrize("version", ["0.31", "this"])
@pytest.mark.parametrize("trust", [False, True])
def test_only_the_user_lets_code_run(version, trust, with_code, tmp_path, capsys, monkeypatch):
    folder, ran = with_code
    says_yes = json.dumps({"trust_remote_code": True})
    source = prompt(
        tmp_path / "in.safetensors", {"model": str(folder), "tokenizer_config": says_yes}
    )
    if version == "0.31":
        as_mlx_lm_0_31(monkeypatch)
    options = ["--trust-remote-code"] if trust else []
    status, _, err = run(capsys, source, tmp_path / "out", "--kv-cache", SPEC, *options)
    assert ran.exists() == trust
    assert status == (0 if trust else 1), err
    if not trust:
        lines = err.splitlines()
        assert lines[0] == f"[mlx_kvq] '{source}' names the model '{folder}'"
        assert f"The model '{folder}' cannot be loaded: " in lines[-1]
        assert "'mine.py'" in lines[-1]
        assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("version", ["0.31", "this"])
def test_nor_does_inspect(version, with_code, capsys, monkeypatch):
    folder, ran = with_code
    section = Section(Spec.parse(SPEC), {(0,): "int4"}).to_dict()
    config = json.loads((folder / "config.json").read_text()) | {"kv_cache": section}
    (folder / "config.json").write_text(json.dumps(config))
    if version == "0.31":
        as_mlx_lm_0_31(monkeypatch)
    for options in ([], ["--trust-remote-code"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["inspect", str(folder), *options])
        assert ran.exists() == bool(options)
        assert (ended.value.code is None) == bool(options)


def test_the_tokenizer_is_asked_the_same(source, tmp_path, capsys, loads):
    for trust in (False, True):
        options = ["--trust-remote-code"] if trust else []
        assert run(capsys, source, tmp_path / "out", "--kv-cache", SPEC, *options)[0] == 0
        args, kwargs = loads.pop()
        assert args == (str(QWEN),)
        assert kwargs["tokenizer_config"] == {"trust_remote_code": trust}


def test_the_model_is_named_before_it_is_loaded(source, tmp_path, capsys, monkeypatch):
    said = []

    def load(*args, **kwargs):
        said.append(capsys.readouterr().err)
        raise RuntimeError("no net")

    monkeypatch.setattr(mlx_lm, "load", load)
    assert run(capsys, source, tmp_path / "out")[0] == 1
    assert said == [f"[mlx_kvq] '{source}' names the model '{QWEN}'\n"]


@pytest.mark.parametrize("kind", ["packed", "quantized"])
def test_packed_already_is_noticed_before_a_model_is_loaded(kind, source, tmp_path, capsys, loads):
    caches, metadata = stock.load_prompt_cache(str(source), return_metadata=True)
    if kind == "quantized":
        caches = [c.to_quantized() for c in caches]
    else:
        model, _ = loading.load(str(QWEN))
        caches = pack.pack(caches, model, SPEC)
    stock.save_prompt_cache(str(source), caches, metadata)
    loads.clear()
    status, _, err = run(capsys, source, tmp_path / "out")
    assert status == 1
    assert "it is quantized already" in err
    assert len(err.splitlines()) == 1
    assert loads == []


@pytest.mark.parametrize(
    "metadata, says",
    [
        ({"tokenizer_config": "[1]"}, "the tokenizer_config in its metadata is [1], no object"),
        ({"tokenizer_config": "{"}, "the tokenizer_config in its metadata is not JSON"),
        ({"tokenizer_config": "[" * 99999}, "is nested more than|is not JSON"),
        ({"tokenizer_config.a": "1"}, "the tokenizer_config in its metadata"),
        ({"model": "\x1b[2J"}, "it names the model '\\x1b[2J', which is no name"),
        ({"model.a": "b"}, "it names the model {'a': 'b'}, which is no name"),
        ({"0": "a"}, "its metadata is no object"),
        ({}, "does not say of which model it is: give --model"),
    ],
)
def test_metadata_that_is_none(metadata, says, tmp_path, capsys, loads):
    source = prompt(tmp_path / "in.safetensors", metadata)
    status, _, err = run(capsys, source, tmp_path / "out")
    assert status == 1
    assert any(part in err for part in says.split("|")), err
    assert len(err.splitlines()) == 1
    assert err.isprintable()
    assert loads == []


@pytest.mark.parametrize("place", ["in no folder", "in a file", "a folder", "in a full folder"])
def test_where_nothing_can_be_written(place, source, tmp_path, capsys, loads, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    target = {
        "in no folder": tmp_path / "none" / "out",
        "in a file": tmp_path / "file" / "out",
        "a folder": tmp_path / "folder",
        "in a full folder": tmp_path / "out",
    }[place]
    if place == "in a full folder":

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("tempfile.mkdtemp", full)
    status, _, err = run(capsys, source, target, "--kv-cache", SPEC)
    assert status == 1
    assert f"'{target}.safetensors' cannot be written: " in err.splitlines()[-1]
    assert loads == []  # minutes before anything is lost


def test_a_disk_that_fills_up_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    def full(path, *args):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[save_safetensors] disk full")

    monkeypatch.setattr(mx, "save_safetensors", full)
    status, _, err = run(capsys, source, tmp_path / "out", "--kv-cache", SPEC)
    assert status == 1
    assert err.splitlines()[-1].endswith("cannot be written: [save_safetensors] disk full.")
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_no_file(tmp_path, capsys, loads):
    status, _, err = run(capsys, tmp_path / "none", tmp_path / "out")
    assert (status, loads) == (1, [])
    assert err == f"mlx_kvq pack-cache: error: There is no prompt cache '{tmp_path / 'none'}'."
