"""What a repository says of its cache: written whole, read back, and not trusted."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm import convert, generate, load, utils
from mlx_lm.models.cache import make_prompt_cache

import mlx_kvq
from mlx_kvq.caches.rotating import PackedRotatingKVCache
from mlx_kvq.caches.single import PackedKVCache
from mlx_kvq.calibration import shards
from mlx_kvq.calibration.set import CalibrationSet
from mlx_kvq.format.spec import BITS, Spec
from mlx_kvq.plugin.option import Parser, wanted
from mlx_kvq.repositories import repository
from mlx_kvq.repositories.repository import FILE
from mlx_kvq.repositories.section import RepositoryError, Section
from tests.support.converted import MODELS, made_up, write

QWEN = MODELS / "tiny-qwen2-8bit"


def load_quietly(folder):
    return load(str(folder))[0]


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model")


@pytest.fixture
def no_tokenizer(monkeypatch):
    """Loading it is most of the time of a test that loads and no more."""
    monkeypatch.setattr(utils, "load_tokenizer", lambda *args, **kwargs: None)


@pytest.mark.parametrize("name", ["tiny-qwen2-8bit", "tiny-gemma3-8bit"])
def test_load_picks_the_cache_up(name, tmp_path, capsys):
    folder = write(tmp_path / "model", "int4-srft:group_size=64", name)
    model, tokenizer = load(str(folder))
    layers = len(model.layers)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"[mlx_kvq] int4-srft:group_size=64: packed {layers} of {layers} layers, 4.25 bits per "
        "value, 3.76x smaller than fp16, the newest 64 to 256 and the first 4 tokens exact, "
        "calibrated (made up); as the model's repository says"
    )
    caches = make_prompt_cache(model)
    assert {type(c) for c in caches} <= {PackedKVCache, PackedRotatingKVCache}
    text = generate(model, tokenizer, "It was", max_tokens=6)

    by_hand, _ = load(str(MODELS / name))
    mlx_kvq.enable(by_hand, "int4-srft:group_size=64", calibration=made_up(name), verbose=False)
    assert generate(by_hand, tokenizer, "It was", max_tokens=6) == text
    for a, b in zip(caches, make_prompt_cache(by_hand), strict=True):
        assert a.format.signature == b.format.signature


def test_a_plain_model_is_left_alone(capsys):
    model = load_quietly(QWEN)
    assert capsys.readouterr().err == ""
    assert "make_cache" not in vars(model)
    assert repository.of(model) is None


def test_the_policy_is_the_one_that_was_written(tmp_path, capsys):
    """Also where the spec alone would have to measure it again, or could not say it."""
    layers = {(0,): "int8", (1,): "k8v4", (3,): "int4"}
    model = load_quietly(write(tmp_path / "model", "int4-srft:budget=6", layers=layers))
    caches = make_prompt_cache(model)
    bits = [c.format.spec.bits if isinstance(c, PackedKVCache) else None for c in caches]
    assert bits == ["int8", "k8v4", None, "int4"]
    line = capsys.readouterr().err
    assert "packed 3 of 4 layers" in line
    assert "left 2: skipped" in line


def test_calibrate_off_brings_no_file(tmp_path, capsys):
    folder = write(tmp_path / "model", "int4-srft:calibrate=off")
    assert not (folder / FILE).exists()
    model = load_quietly(folder)
    assert "not calibrated" in capsys.readouterr().err
    assert make_prompt_cache(model)[0].format.arrays is None


@pytest.mark.parametrize(
    "asked, option",
    [
        ("fp16", "--kv-cache fp16"),
        ("int8-srft", "--kv-cache int8-srft"),
        ("fp16", "--kv-bits 4"),
    ],
)
def test_what_is_asked_for_comes_first(asked, option, folder, capsys, monkeypatch):
    """The command's own load then enables it, or nothing."""
    monkeypatch.setattr(wanted, "spec", asked)
    monkeypatch.setattr(wanted, "option", option)
    model = load_quietly(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"[mlx_kvq] {option} in place of the repository's int4-srft"
    assert "make_cache" not in vars(model)


def test_options_of_a_command_set_what_is_asked(monkeypatch):
    for arguments, asked, option in [
        ([], None, None),
        (["--kv-cache", "int8-srft"], "int8-srft", "--kv-cache int8-srft"),
        (["--kv-bits", "4"], "fp16", "--kv-bits 4"),
    ]:
        monkeypatch.setattr(wanted, "spec", "before")
        parser = Parser()
        parser.add_argument("--kv-bits", type=int)
        parser.parse_args(arguments)
        assert wanted.spec == asked
        assert option is None or wanted.option == option


def test_a_damaged_repository_still_runs_with_fp16(folder, monkeypatch, capsys):
    (folder / FILE).write_bytes(b"")
    monkeypatch.setattr(wanted, "spec", "fp16")
    monkeypatch.setattr(wanted, "option", "--kv-cache fp16")
    load_quietly(folder)
    assert "in place of" in capsys.readouterr().err


def test_another_spec_takes_the_repositorys_calibration(folder, capsys):
    model = load_quietly(folder)
    report = mlx_kvq.enable(model, "k8v4-srft:seed=3", verbose=False)
    assert report.calibration.metadata["text"] == "made up"
    cache: Any = mlx_kvq.make_prompt_cache(model, "int8-srft")[0]
    assert mx.array_equal(cache.format.keys.calibration.mu, made_up().layers[0,].keys.mu)
    off = mlx_kvq.enable(model, "int4-srft:calibrate=off", verbose=False)
    assert off.calibration is None


def test_feedback_needs_a_metric_that_nearest_rounding_leaves_out(tmp_path, folder):
    feedback = Spec.parse("int4-srft:rounding=feedback")
    assert repository.of(load_quietly(folder)).offered(feedback).layers[0,].keys.metric is not None
    without = load_quietly(write(tmp_path / "nearest", "int4-srft:rounding=nearest"))
    assert repository.of(without).offered(feedback) is None
    for spec in ("int4-srft", "int4-srft:rounding=nearest"):
        assert repository.of(without).offered(Spec.parse(spec)).layers[0,].keys.metric is None
    assert (folder / FILE).stat().st_size > 8 * (tmp_path / "nearest" / FILE).stat().st_size


def test_of_another_program(folder, capsys):
    edit(folder, format="other", spec=3)
    model = load_quietly(folder)
    assert "make_cache" not in vars(model)
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == "[mlx_kvq] the KV cache in config.json is not mlx_kvq's but 'other''s, and not used"
    )
    assert repository.of(model).offered(Spec.parse("int4-srft")) is None


@pytest.mark.parametrize("folder, revision", [("a" * 40, "a" * 40), ("model", "v2")])
def test_the_file_is_of_the_models_commit(folder, revision, tmp_path, monkeypatch):
    """Also when the hub has moved on between the two downloads."""
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        (tmp_path / FILE).touch()
        return tmp_path

    monkeypatch.setattr(utils, "_download", download)
    source = repository.Repository(tmp_path / folder, {}, "someone/model", "v2")
    assert source.path == tmp_path / FILE
    assert asked == {"name": "someone/model", "revision": revision, "allow_patterns": [FILE]}


@pytest.mark.parametrize("spec", ["int4-srft", "int4-srft:calibrate=off"])
def test_mlx_lms_own_tools_take_the_file_along(spec, tmp_path, capsys):
    """They write the section with the rest of config.json; the file they would leave behind."""
    source, target = write(tmp_path / "source", spec), tmp_path / "target"
    convert(str(source), str(target), dequantize=True)
    assert (target / FILE).exists() == (source / FILE).exists()
    capsys.readouterr()
    model = load_quietly(target)
    assert f"{spec}: packed 4 of 4 layers" in capsys.readouterr().err
    assert "scales" not in model.layers[0].self_attn.q_proj


def test_a_rank_of_a_pipeline_takes_its_layers():
    model = load_quietly(QWEN)
    model.model.pipeline_size, model.model.start_idx = 2, 2
    policy = {(i,): bits for i, bits in enumerate(["int4", "int8", "int4", "k8v4"])}
    local = shards.local_paths(policy, model)
    assert (local[0,], local[1,]) == ("int4", "k8v4")


def test_the_rest_of_config_json_stays(folder):
    config = json.loads((folder / "config.json").read_text())
    section = config.pop("kv_cache")
    original = json.loads((QWEN / "config.json").read_text())
    assert config == original
    assert list(config) == list(original)
    assert section["version"] == 1
    assert section["seed"] == 0
    assert section["layers"] == {str(i): "int4" for i in range(4)}
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*os.listdir(QWEN), FILE]
    )  # no part is left


@pytest.mark.parametrize("old", ["plain", "calibrated", "off"])
@pytest.mark.parametrize("new", ["calibrated", "off"])
def test_an_interrupted_write_leaves_a_whole_repository(
    old, new, tmp_path, monkeypatch, capsys, no_tokenizer
):
    specs = {"calibrated": "int4-srft", "off": "int4-srft:calibrate=off"}
    replace = os.replace
    outcomes = set()
    for stop in range(5):
        folder = tmp_path / f"model{stop}"
        write(folder, specs.get(old, "int4-srft:calibrate=off"))
        if old == "plain":
            shutil.copy(QWEN / "config.json", folder / "config.json")
        calls = 0

        def interrupted(source, target, stop=stop):
            nonlocal calls
            calls += 1
            if calls > stop:
                raise KeyboardInterrupt
            replace(source, target)

        spec = Spec.parse(specs[new].replace("int4", "int8"))
        calibration = made_up() if new == "calibrated" else None
        monkeypatch.setattr(os, "replace", interrupted)
        try:
            repository.write(folder, spec, {(0,): "int8"}, calibration, {})
            done = True
        except KeyboardInterrupt:
            done = False
        monkeypatch.setattr(os, "replace", replace)
        load_quietly(folder)  # raises if what is there does not belong together
        said = capsys.readouterr().err
        assert ("int8" in said) == done
        outcomes.add("new" if "int8" in said else "old" if "int4" in said else "plain")
        assert not [p for p in os.listdir(folder) if p.startswith(".")]
    assert {"new", "plain" if old == "plain" else "old"} <= outcomes


def copied(folder):
    shutil.copytree(QWEN, folder)
    return folder


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in repository.contents(folder))


def test_what_a_repository_consists_of(tmp_path):
    folder = copied(tmp_path / "model")
    own = sorted(os.listdir(QWEN))
    assert names(folder) == own
    for name in (".env", "leftover.safetensors", "id_rsa", "data.json", "a.py", "train.log"):
        (folder / name).write_text("")
    (folder / "additional_chat_templates").mkdir()
    more = ["additional_chat_templates/tools.jinja", "model-00001-of-00002.safetensors", FILE]
    for name in more:
        (folder / name).write_text("")
    assert names(folder) == sorted([*own, *more])


def test_code_belongs_to_it_if_it_is_named(tmp_path):
    folder = copied(tmp_path / "model")
    sources = {
        "mine": "", "modeling_x": "from .layers_x import Layer", "layers_x": "", "train": "",
        "tokenization_x": "import os", "slow": "from . import mine",
    }  # fmt: skip
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text)
    before = names(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_file": "mine.py"}
    config["auto_map"] = {
        "AutoModel": "modeling_x.Model",
        "AutoConfig": "someone/else--configuration_x.Config",
        "AutoProcessor": "../../train.X",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_x.Slow", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    code = ["layers_x.py", "mine.py", "modeling_x.py", "tokenization_x.py"]
    assert names(folder) == sorted([*before, *code])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md", "mine.py"])
def test_links_go_to_the_hubs_cache_only(name, tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    blob = hub / "models--a--b" / "blobs" / "0"
    blob.parent.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    folder = copied(tmp_path / "model")
    (folder / "mine.py").write_text("")
    config = json.loads((folder / "config.json").read_text()) | {"model_file": "mine.py"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / name).rename(blob)
    (folder / name).symlink_to(blob)
    assert name in names(folder)
    secret = tmp_path / "secret"
    blob.rename(secret)
    for target in (secret, hub / ".." / "secret", tmp_path / "nothing"):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        with pytest.raises(RepositoryError, match=r"is a link to '.*secret'|No such file"):
            repository.contents(folder)
    folder.rename(tmp_path / "real")
    (tmp_path / "real" / name).unlink()
    secret.rename(tmp_path / "real" / name)
    folder.symlink_to(tmp_path / "real")
    assert name in names(folder)  # the folder itself may be a link


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
GOOD = Section(Spec.parse("int4-srft:seed=7"), {(0,): "int4", (1, 1): "int8"}, "0" * 64, {"a": 1})


def test_a_section_comes_back():
    assert Section.parse(json.loads(json.dumps(GOOD.to_dict()))) == GOOD


@given(st.sampled_from(sorted(GOOD.to_dict())), json_values)
def test_no_json_in_a_field_raises_anything_else(name, value):
    given = GOOD.to_dict() | {name: value}
    try:
        parsed = Section.parse(given)
    except RepositoryError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 500
    else:
        assert isinstance(parsed.spec, Spec)
        assert set(parsed.layers.values()) <= set(BITS)


def edit(folder: Path, **changes) -> None:
    """Change fields of the section; ``...`` takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config["kv_cache"][name] = value
        if value is ...:
            del config["kv_cache"][name]
    path.write_text(json.dumps(config))


def section(value):
    def tamper(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "kv_cache": value}))

    return tamper


def fields(**changes):
    return lambda folder: edit(folder, **changes)


def with_bytes(change, honest=True):
    """Change the file; an ``honest`` publisher's section has its hash."""

    def tamper(folder):
        path = folder / FILE
        path.write_bytes(change(path.read_bytes()))
        if honest:
            edit(folder, calibration={"sha256": repository._file_sha256(path)})

    return tamper


def tensors(change, header=None):
    """Change a tensor, by name and value; None takes it away."""

    def rewritten(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        entries = json.loads(data[8 : 8 + size])
        metadata = entries.pop("__metadata__")
        arrays = {
            name: np.frombuffer(
                data[8 + size + e["data_offsets"][0] : 8 + size + e["data_offsets"][1]], np.float32
            ).reshape(e["shape"])
            for name, e in entries.items()
        }
        arrays = {k: mx.array(v) for k, v in arrays.items()}
        for name, value in change(arrays).items():
            arrays[name] = value
        arrays = {k: v for k, v in arrays.items() if v is not None}
        path = f"{os.environ['MLX_KVQ_CACHE']}/tampered.safetensors"
        mx.save_safetensors(path, arrays, metadata | (header or {}))
        return Path(path).read_bytes()

    return with_bytes(rewritten)


def header(**changes):
    return tensors(lambda arrays: {}, changes)


def value(name, at):
    def change(arrays):
        a = np.array(arrays[name])
        a[0, 5] = at
        return {name: mx.array(a)}

    return tensors(change)


def other(**shape):
    """The calibration of a model of another shape, put in honestly."""

    def tamper(folder):
        made_up(**shape).save(folder / FILE)
        edit(folder, calibration={"sha256": repository._file_sha256(folder / FILE)})

    return tamper


class Payload:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, (f"{os.environ['MLX_KVQ_CACHE']}/executed",))


KEYS = "layers.2.keys"
LAYERS = {str(i): "int4" for i in range(4)}
BAD = {
    # the section
    "section is a string": (section("int4-srft"), "'kv_cache' in config.json is 'int4-srft', not"),
    "section is a list": (section([1]), "is [1], not an object"),
    "section is null": (section(None), "is None, not an object"),
    "section is empty": (section({}), "'format' of 'kv_cache' is None, not 'mlx_kvq'"),
    "format of another type": (fields(format=1), "'format' of 'kv_cache' is 1"),
    "version of the future": (fields(version=2), "it has format version 2; this mlx_kvq reads 1"),
    "version as text": (fields(version="1"), "it has format version '1'"),
    "version true": (fields(version=True), "it has format version True"),
    "no version": (fields(version=...), "it has format version None"),
    "unknown spec": (fields(spec="int2-srft"), "unknown cache 'int2-srft'"),
    "unknown option": (fields(spec="int4-srft:group=8"), "unknown option 'group'"),
    "spec is a number": (fields(spec=4), "'spec' is 4, not a text"),
    "spec is fp16": (fields(spec="fp16"), "its spec is 'fp16'"),
    "no spec": (fields(spec=...), "'spec' is None"),
    "a page of spec": (fields(spec="x" * 9999), "'spec' is 'xxx"),
    "seed of another spec": (fields(seed=1), "'seed' is 1 and the spec's is 0"),
    "seed as text": (fields(seed="0"), "'seed' is '0'"),
    "seed false": (fields(seed=False), "'seed' is False"),
    "no seed": (fields(seed=...), "'seed' is None"),
    "no layers": (fields(layers={}), "'layers' is {}"),
    "layers as a list": (fields(layers=["int4"]), "'layers' is ['int4']"),
    "unknown bits": (fields(layers=LAYERS | {"1": "int2"}), "layer 1 is said to have 'int2'"),
    "bits as a number": (fields(layers=LAYERS | {"1": 4}), "layer 1 is said to have 4"),
    "bits as a list": (fields(layers=LAYERS | {"1": ["int4"]}), "layer 1 is said to have ['int4']"),
    "a layer's name": (fields(layers={"a": "int4"}), "'layers' names 'a', which is no layer"),
    "a negative layer": (fields(layers={"-1": "int4"}), "'layers' names '-1'"),
    "a layer the model lacks": (fields(layers=LAYERS | {"9": "int4"}), "this model has no such"),
    "a cache the layer lacks": (fields(layers=LAYERS | {"0.1": "int4"}), "this model has no such"),
    "control characters": (fields(made={"text": "\x1b[31m"}), "'made' is {'text': '\\x1b[31m'}"),
    "made is a list": (fields(made=["x"]), "'made' is ['x']"),
    "a group that does not fit": (fields(spec="int4-srft:group_size=48"), "group_size"),
    "a rotation that does not fit": (
        lambda folder: (fields(spec="int4-srht")(folder), five_thirds(folder)),
        "srht",
    ),
    # the calibration
    "calibration is a string": (fields(calibration="0" * 64), "'calibration' is '0000"),
    "calibration without a hash": (fields(calibration={}), "'calibration' is {}"),
    "half a hash": (fields(calibration={"sha256": "0" * 32}), "not an object with a sha256"),
    "another hash": (fields(calibration={"sha256": "0" * 64}), "it is damaged, or of another"),
    "calibrated without a file": (fields(calibration=None), "its calibration is missing"),
    "a file but calibrate=off": (
        fields(spec="int4-srft:calibrate=off"), "its calibration is there all the same"
    ),
    "a file without end": (
        lambda folder: os.truncate(folder / FILE, (1 << 30) + 1), "more than any calibration"
    ),
    "no file": (lambda folder: (folder / FILE).unlink(), f"{FILE} is missing"),
    "a folder for the file": (
        lambda folder: ((folder / FILE).unlink(), (folder / FILE).mkdir()), f"'{FILE}' is a folder"
    ),
    "a flipped bit": (with_bytes(lambda d: d[:-1] + bytes([d[-1] ^ 1]), False), "it is damaged"),
    "half a file": (with_bytes(lambda d: d[: len(d) // 2]), "is not a readable safetensors file"),
    "an empty file": (with_bytes(lambda d: b""), "is not a readable safetensors file"),
    "a pickle": (with_bytes(lambda d: pickle.dumps(Payload())), "is not a readable safetensors"),
    "an endless header": (
        with_bytes(lambda d: struct.pack("<Q", 1 << 62) + d[8:]), "is not a readable safetensors"
    ),
    "not marked as ours": (header(format="pt"), "is not marked as an mlx_kvq calibration"),
    "file of another version": (header(version="7"), "it has format version '7'"),
    "metadata is no JSON": (header(metadata="{"), "its metadata is not JSON"),
    "metadata is a list": (header(metadata="[]"), "its metadata is not a JSON object"),
    "metadata that paints": (header(metadata='{"text": "\\u001b[2J"}'), "is no short text"),
    # the tensors
    "NaN in mu": (value(f"{KEYS}.mu", np.nan), f"'{KEYS}.mu' holds a NaN or an infinity"),
    "infinite sigma": (value(f"{KEYS}.sigma", np.inf), f"'{KEYS}.sigma' holds a NaN or an"),
    "infinite lambda": (value("layers.0.values.lam", -np.inf), "holds a NaN or an infinity"),
    "absurd mu": (value(f"{KEYS}.mu", 1e9), "reaches 1e+09, more than any key or value"),
    "sigma of zero": (value(f"{KEYS}.sigma", 0), f"'{KEYS}.sigma' is not positive everywhere"),
    "negative lambda": (value(f"{KEYS}.lam", -1), f"'{KEYS}.lam' is not positive everywhere"),
    "absurd sigma": (value(f"{KEYS}.sigma", 1e8), "scales lie within 1e-06 to 1e+06"),
    "absurd lambda": (value(f"{KEYS}.lam", 1e-8), "scales lie within"),
    "mu in half precision": (
        tensors(lambda a: {f"{KEYS}.mu": a[f"{KEYS}.mu"].astype(mx.float16)}), "mlx.core.float16"
    ),
    "mu of one axis": (tensors(lambda a: {f"{KEYS}.mu": a[f"{KEYS}.mu"][0]}), "not float32 [heads"),
    "another tensor": (tensors(lambda a: {"model.weight": mx.ones((1,))}), "unknown tensor"),
    "no tensors of a layer": (
        tensors(lambda a: {n: None for n in a if n.startswith("layers.1.")}),
        "it has nothing for layer 1, which is to be packed",
    ),
    "no tensors": (tensors(lambda a: dict.fromkeys(a)), "it holds no tensors"),
    "sigma of another head size": (
        tensors(lambda a: {f"{KEYS}.sigma": mx.ones((1, 64))}), "sigma of the keys of layer 2 is"
    ),
    "another head size": (other(dim=64), "the model has 1 KV heads of 128 channels"),
    "another head count": (other(heads=2), "the model has 1 KV heads of 128 channels"),
    "fewer layers": (other(layers=3), "it has nothing for layer 3"),
}  # fmt: skip


def five_thirds(folder):
    """Give the model a head size that is no power of two; its weights are then made up."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1}
    config.pop("quantization"), config.pop("quantization_config")
    config["intermediate_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    from mlx.utils import tree_flatten
    from mlx_lm.models.qwen2 import Model, ModelArgs

    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_repository_is_one_clear_error(case, folder, capsys, no_tokenizer):
    tamper, message = BAD[case]
    tamper(folder)
    with pytest.raises(RepositoryError) as caught:
        load(str(folder))
    line = str(caught.value)
    assert message in line
    assert line.startswith(f"The KV cache of '{folder}' cannot be used: ")
    assert line.endswith("with '--kv-cache fp16', or with MLX_KVQ_DISABLE=1.")
    assert line.isprintable()
    assert len(line) < 1000
    assert capsys.readouterr().err == ""
    assert not Path(os.environ["MLX_KVQ_CACHE"], "executed").exists()


def test_the_table_is_long_enough_and_the_original_good(folder, capsys):
    assert len(BAD) >= 20
    load(str(folder))
    assert "as the model's repository says" in capsys.readouterr().err


def test_the_payload_would_have_run():
    """Else the row with the pickle would show nothing."""
    path = Path(os.environ["MLX_KVQ_CACHE"], "executed")
    pickle.loads(pickle.dumps(Payload()))
    assert path.is_dir()
    path.rmdir()


def test_a_config_that_cannot_be_read(tmp_path):
    for text, message in [
        ("{", "is not JSON"),
        ("[]", r"is \[\], not an object"),
        (None, "No such"),
    ]:
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        else:
            (tmp_path / "config.json").unlink()
        with pytest.raises(RepositoryError, match=message):
            repository.read_config(tmp_path)


def test_saved_sets_are_what_was_given(folder):
    assert CalibrationSet.load(folder / FILE).digest == made_up().digest
