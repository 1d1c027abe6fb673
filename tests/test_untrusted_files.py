"""Files of strangers: nothing in one makes a command hang, run code, or paint on the terminal.

Whoever makes a file can make its hash; the prompt caches here have a valid one.
"""

import json
import os
import signal
import struct

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

from mlx_kvq import cli
from mlx_kvq.caches import seams
from mlx_kvq.caches.rotating import PackedRotatingKVCache
from mlx_kvq.caches.single import PackedKVCache
from mlx_kvq.calibration.set import CalibrationSet
from mlx_kvq.files import NESTING, line, parse_json, quoted
from mlx_kvq.format import format
from mlx_kvq.repositories import repository, summary
from mlx_kvq.repositories import section as repositories_section
from tests.fixtures import make
from tests.support.converted import write

PLAIN = "mlx_kvq/1;int4-srft;scale=search;seed=0;dims=64,64;groups=32,32"


@pytest.fixture(autouse=True)
def _at_once():
    """A minute for any test here: what hangs fails."""

    def expired(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def nest(depth: int) -> str:
    return "[" * depth + "]" * depth


def save(path, caches, metadata=None):
    seams.install()
    stock.save_prompt_cache(str(path), caches, metadata or {})


def filled(
    kind=PackedKVCache, *arguments, calibrated=False, spec="int4-srft:group_size=32,recent=16"
):
    cache = kind(make.fmt_of(spec, calibrated), *arguments)
    make.fill(cache, mx.float32, 20)
    return cache


class Forged(PackedKVCache):
    """A packed cache that says of itself what a test wants."""

    said: dict = {}  # noqa: RUF012

    @property
    def state(self):
        names = ("rows", "offset", "as_arrays", "model", "dtype", "signature", "arrays", "tail")
        state = dict(zip(names, super().state, strict=False)) | self.said
        return tuple(state.values())


Forged.__name__ = "PackedKVCache"


def forged(path, **said):
    cache = filled(Forged, spec="int4-srft:group_size=32,recent=0,first=0")
    cache.said = said
    save(path, [cache])
    return path


def refused(path) -> str:
    with pytest.raises(ValueError) as caught:
        stock.load_prompt_cache(str(path))
    said = str(caught.value)
    assert said.startswith(f"The prompt cache '{path}' cannot be used: ")
    assert said.isprintable()
    assert len(said) < 1000
    return said


@pytest.mark.parametrize(
    "signature, says",
    [
        (PLAIN.replace("64,64", "1000000000000,32").replace("32,32", "7,32"), "sizes up to 4096"),
        (PLAIN.replace("32,32", "1000000000000,32"), "sizes up to 4096"),
        (PLAIN.replace("seed=0", f"seed={'9' * 40}"), "seed is 0 to 2"),
        (PLAIN.replace("seed=0", f"seed={'9' * 5000}"), "is not the signature"),
        (PLAIN.replace("kvq/1", f"kvq/{'9' * 5000}"), "is not the signature"),
        (PLAIN + f";recent={'9' * 100}", "recent is 0 to 1024"),
        (PLAIN.replace("seed=0", "seed=٣"), "is not the signature"),
        (PLAIN.replace("int4-srft", "int4-" + "x" * 100), "unknown cache"),
        ("\x1b[2J" + PLAIN, "'\\x1b[2J"),
    ],
)
def test_numbers_in_a_signature_are_bounded(signature, says, tmp_path):
    with pytest.raises(ValueError) as caught:
        format.parse_signature(signature)
    assert says in str(caught.value)
    assert str(caught.value).isprintable()
    assert says in refused(forged(tmp_path / "c.safetensors", signature=signature))


@pytest.mark.parametrize(
    "said, says",
    [
        ({"offset": 10**9}, "1000000000 of its 256 rows hold tokens"),
        ({"offset": -1}, "offset in it is -1"),
        ({"offset": 2.5}, "offset in it is 2.5"),
        ({"offset": "twenty"}, "offset in it is 'twenty'"),
        ({"rows": None}, "20 of its 0 rows"),
        ({"rows": mx.zeros((1, 2, 0, 18), mx.uint32)}, "which are none"),
        ({"rows": mx.zeros((1, 2, 256, 18))}, "not the uint32 rows"),
        ({"dtype": "\x1b[31m"}, "\\x1b[31m"),
        ({"signature": f"{PLAIN};recent=16"}, "The cache's tail, none, is not what"),
        ({"tail": mx.zeros((1, 2, 16, 128))}, "The cache's tail, mlx.core.float32"),
    ],
)
def test_a_cache_cannot_say_more_than_it_holds(said, says, tmp_path):
    assert says in refused(forged(tmp_path / "c.safetensors", **said))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"_idx": 999}, "999 of its"),
        ({"_idx": -1}, "_idx in it is -1"),
        ({"max_size": 0}, "max_size in it is 0"),
        ({"max_size": 1 << 40}, "max_size in it is 1099511627776"),
        ({"keep": 1 << 20}, "keeps the first 1048576"),
    ],
)
def test_a_ring_cannot_either(change, says, tmp_path):
    cache = filled(PackedRotatingKVCache, 16)
    vars(cache).update(change)
    save(tmp_path / "c.safetensors", [cache])
    assert says in refused(tmp_path / "c.safetensors")


def test_nor_a_batch(tmp_path):
    from mlx_kvq.caches.batch import PackedBatchKVCache

    path = tmp_path / "c.safetensors"
    for padding, says in [([-5, 0], "left_padding in it is -5 to 0"), ([1, 2, 3], "not int32")]:
        batch = PackedBatchKVCache(make.fmt_of("int4-srft", False), [3, 0])
        make.fill(batch, mx.float32, 20, batch=2)
        batch.left_padding = mx.array(padding)
        save(path, [batch])
        assert says in refused(path)


def test_a_calibration_in_a_cache_is_of_its_heads(tmp_path):
    cache = filled(calibrated=True)
    cache.rows = mx.concatenate([cache.rows] * 2, axis=1)
    cache.newest.array = mx.concatenate([cache.tail] * 2, axis=1)
    cache.oldest.array = mx.concatenate([cache.oldest.array] * 2, axis=1)
    save(tmp_path / "c.safetensors", [cache])
    assert "mu of its keys is of 2 KV heads, its rows of 4" in refused(tmp_path / "c.safetensors")


def raw(path, header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = {
    "an absurd shape": ({"a": TENSOR | {"shape": [10**12]}}, b"\0" * 4),
    "an absurd product": ({"a": TENSOR | {"shape": [1 << 62, 1 << 62]}}, b"\0" * 4),
    "an absurd number": ({"a": TENSOR | {"shape": [10**100]}}, b"\0" * 4),
    "a negative shape": ({"a": TENSOR | {"shape": [-1]}}, b"\0" * 4),
    "offsets beyond the end": ({"a": TENSOR | {"data_offsets": [1 << 50, (1 << 50) + 4]}}, b""),
    "tensors in one place": ({"a": TENSOR, "b": TENSOR}, b"\0" * 4),
    "nested": (b'{"a":' + nest(100_000).encode() + b"}", b""),
    "nested metadata": (b'{"__metadata__":{"a":' + nest(100_000).encode() + b"}}", b""),
    "no object": (b'"text"', b""),
    "painting": ({"a": TENSOR | {"dtype": "\x1b[2J"}}, b"\0" * 4),
    "nothing": (b"", b""),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_checked_before_anything_is_made_of_them(case, tmp_path):
    path = raw(tmp_path / "c.safetensors", *HEADERS[case])
    seams.install()
    assert "no complete safetensors file" in refused(path)
    with pytest.raises(ValueError, match="is not a readable safetensors file") as caught:
        CalibrationSet.load(path)
    assert str(caught.value).isprintable()


def test_a_header_larger_than_the_file_is_not_read(tmp_path):
    path = raw(tmp_path / "c.safetensors", {}, size=1 << 62)
    os.truncate(path, 1 << 40)  # a hole, on disk next to nothing
    assert "no complete safetensors file" in refused(path)


@pytest.mark.parametrize(
    "names",
    [
        {"0.a": "", "1.1000000000000": "KVCache"},
        {"0.1000000000000": "", "1.0": "KVCache"},
        {f"0.{i}.100000": "" for i in range(100)},
        {"0" + ".0" * 5000: ""},
    ],
)
def test_numbers_in_names_are_bounded(names, tmp_path):
    """mlx-lm makes lists as long as these say."""
    path = tmp_path / "c.safetensors"
    mx.save_safetensors(str(path), {"0.0": mx.zeros(1)}, {**names, "2.0": ""})
    seams.install()
    assert "in it" in refused(path) or "in its names" in refused(path)
    mx.save_safetensors(str(path), {name: mx.zeros(1) for name in names}, {"2.0": ""})
    refused(path)


def test_names_of_users_are_left_alone(tmp_path):
    path = tmp_path / "c.safetensors"
    metadata = {"model": "m", "20241128": "a date", "a.b": "dots"}
    save(path, [filled()], metadata)
    found = stock.load_prompt_cache(str(path), return_metadata=True)[1]
    assert found == {"model": "m", "20241128": "a date", "a": {"b": "dots"}}


def test_a_class_that_is_none(tmp_path):
    path = tmp_path / "c.safetensors"
    for name in ("save_prompt_cache", "mx", "\x1b[2J", "__builtins__"):
        metadata = {"0.a": "b", "1.0": name, "2.0": ""}
        mx.save_safetensors(str(path), {"0.0": mx.zeros(1)}, metadata)
        refused(path)


def test_packed_caches_without_a_hash(tmp_path):
    path = tmp_path / "c.safetensors"
    save(path, [filled()])
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"0.mlx_kvq":"', b'"0.mlx_kvp":"'))
    assert "has lost its hash" in refused(path)


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return "a named pipe"


def device(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")
    return "a device"


def directory(path):
    path.unlink(missing_ok=True)
    path.mkdir()
    return "a folder"


@pytest.mark.parametrize("kind", [pipe, device, directory])
def test_what_is_no_file_is_refused_at_once(kind, tmp_path, capsys):
    path = tmp_path / "c.safetensors"
    says = f"is {kind(path)}, not a file"
    seams.install()
    assert says in refused(path)
    with pytest.raises(ValueError, match=says):
        CalibrationSet.load(path)
    folder = write(tmp_path / "model")
    for name in (repository.FILE, "config.json"):
        kind(folder / name)
        with pytest.raises(SystemExit) as ended:
            cli.main(["inspect", str(folder)])
        assert says in str(ended.value.code)


@pytest.mark.parametrize("depth", [NESTING + 1, 900, 100_000])
def test_nested_json_is_one_clear_error(depth, tmp_path):
    deep = f"nested more than {NESTING} levels deep"
    with pytest.raises(ValueError, match=deep):
        parse_json(nest(depth))
    folder = write(tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", f'{{"x": {nest(depth)},', 1))
    with pytest.raises(repositories_section.RepositoryError, match=deep):
        summary.find(str(folder))

    path = tmp_path / "c.safetensors"
    header = {"format": "mlx_kvq calibration", "version": "1", "metadata": nest(depth)}
    mx.save_safetensors(str(path), {"layers.0.keys.mu": mx.zeros((1, 8))}, header)
    with pytest.raises(ValueError, match=deep):
        CalibrationSet.load(path)
    save(path, [filled()], {"tokenizer_config": nest(depth)})
    assert deep in refused(path)


@pytest.mark.parametrize("depth", [NESTING + 1, 50_000])
@pytest.mark.parametrize("field", ["format", "spec", "seed", "layers", "calibration", "made", "x"])
def test_a_nested_section_is_one_clear_error(depth, field):
    """From ``mlx_lm.load``, which has parsed config.json."""
    section = {
        "format": "mlx_kvq", "version": 1, "spec": "int4-srft:calibrate=off", "seed": 0,
        "layers": {"0": "int4"}, "calibration": None, "made": {},
    }  # fmt: skip
    repositories_section.Section.parse(section)
    inner: list = []
    for _ in range(depth):
        inner = [inner]
    with pytest.raises(repositories_section.RepositoryError) as caught:
        repositories_section.Section.parse(section | {field: inner})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("where", ["num_hidden_layers", "n_layer", "text_config"])
def test_inspect_builds_no_endless_model(where, tmp_path):
    folder = write(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {where: {"num_layers": 10**9} if where == "text_config" else 10**9}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", str(folder)])
    assert "says 1000000000 for" in str(ended.value.code)


def test_as_deep_as_allowed():
    assert len(parse_json(nest(NESTING))) == 1


def test_a_number_of_thousands_of_digits(tmp_path):
    path = tmp_path / "c.safetensors"
    digits = "9" * 5000
    with pytest.raises(ValueError, match="is not JSON"):
        parse_json(digits)
    mx.save_safetensors(
        str(path),
        {f"layers.{digits}.keys.mu": mx.zeros((1, 8))},
        {"format": "mlx_kvq calibration", "version": "1", "metadata": "{}"},
    )
    with pytest.raises(ValueError, match="unknown tensor 'layers.999"):
        CalibrationSet.load(path)
    section = repositories_section.Section(
        format.Spec.parse("int4-srft:calibrate=off"), {(0,): "int4"}, None, {}
    ).to_dict()
    with pytest.raises(repositories_section.RepositoryError, match="'made' is"):
        repositories_section.Section.parse(section | {"made": {"tokens": 10**4000}})


@pytest.mark.parametrize("paint", ["\x1b[31m", "\r", "\x07", "\u202e", "\ud800"])
def test_what_a_file_says_is_shown_escaped(paint):
    for text in (quoted(paint + "a"), line(paint + "a"), line(ValueError(f"a{paint}b"))):
        assert text.isprintable()
    with pytest.raises(ValueError) as caught:
        format.Spec.parse(f"int4-srft:{paint}=1")
    assert str(caught.value).isprintable()
    with pytest.raises(ValueError) as caught:
        format.Spec.parse(f"int4-{paint}")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("field", ["text", "lambda", "by"])
def test_notes_of_a_calibration_are_short_texts(field, tmp_path):
    """They are in the line that ``enable`` prints, and in model cards."""
    path = tmp_path / "c.safetensors"
    found = CalibrationSet({(0,): make_layer()}, {field: "\x1b[2J"})
    with pytest.raises(ValueError, match="is no short text"):
        found.save(path)
    header = {"format": "mlx_kvq calibration", "version": "1"}
    mx.save_safetensors(
        str(path), found.arrays(), header | {"metadata": json.dumps({field: "\x1b[2J"})}
    )
    with pytest.raises(ValueError) as caught:
        CalibrationSet.load(path)
    assert f"its metadata says '\\x1b[2J' for '{field}'" in str(caught.value)


def make_layer():
    from mlx_kvq.calibration.set import LayerCalibration

    return LayerCalibration(make.side(1), make.side(2))


def test_a_tensor_that_paints(tmp_path):
    path = tmp_path / "c.safetensors"
    header = {"format": "mlx_kvq calibration", "version": "1", "metadata": "{}"}
    mx.save_safetensors(str(path), {"\x1b[2J": mx.zeros((1, 8))}, header)
    with pytest.raises(ValueError, match=r"unknown tensor '\\x1b\[2J'"):
        CalibrationSet.load(path)
