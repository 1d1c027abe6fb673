"""A kernel's first use on a machine, in the emulator: compared with plain operations, once for each
set of compile-time constants, and not again by the next process if it passed."""

import json
import threading

import mlx.core as mx
import pytest

from mlx_kvq import ops
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.ops import gpu, passed, plain, trial
from mlx_kvq.ops.gpu import jit
from tests.emulator import emulated
from tests.support import calls

SPEC = Spec.parse("int4-srft:recent=16")


def layers(n):
    """Formats of layers that differ in the numbers of their calibration alone."""
    mus = [mx.random.normal((2, 64)) for _ in range(2 * n)]
    return [
        make_format(SPEC, 64, keys=Calibration(mu=a), values=Calibration(mu=b))
        for a, b in zip(mus[::2], mus[1::2], strict=True)
    ]


def step(fmt):
    """What a layer asks of the operations for a prompt and a token."""
    k, q = mx.random.normal((1, 2, 20, 64)), mx.random.normal((1, 4, 1, 64))
    rows, tail = ops.quantize_pack(k, k, fmt, None, 16)
    out = calls.attend(ops, q, rows, 20, fmt, 0.125, tail=tail)
    restored = calls.restore(ops, rows, 20, fmt, mx.float32, tail)
    mx.eval(out, restored)
    return q, rows, tail, out, restored


WRONG = {
    "attend": lambda right: lambda *a: right(*a)[..., ::-1],
    "quantize_pack": lambda right: lambda *a: (right(*a)[0][..., ::-1], right(*a)[1]),
    "restore": lambda right: lambda *a: right(*a)[::-1],
}


@pytest.mark.parametrize("op", WRONG)
def test_a_kernel_with_a_wrong_layout_is_not_used(op, monkeypatch, capsys):
    """On zeros these would pass."""
    (fmt,) = layers(1)
    with emulated("fast"):
        monkeypatch.setattr(gpu, op, WRONG[op](getattr(gpu, op)))
        q, rows, tail, out, restored = step(fmt)
        want = calls.attend(plain, q, rows, 20, fmt, 0.125, tail=tail)
        assert mx.allclose(out, want, atol=1e-3)
        wanted = calls.restore(plain, rows, 20, fmt, mx.float32, tail)
        assert all(mx.allclose(a, b, atol=1e-3) for a, b in zip(restored, wanted, strict=True))
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the {op} kernel failed on this machine (its results are wrong)" in line


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_large_centres_fail_no_kernel(dtype, capsys):
    """Of keys as in Qwen2.5: the trial's data lie around them, as the model's do."""
    mu = 300 * mx.random.normal((2, 64))
    given = Calibration(mu=mu, sigma=mx.exp(mx.random.normal((2, 64))))
    fmt = make_format(SPEC, 64, keys=given, values=given)
    k = (mu[None, :, None] + mx.random.normal((1, 2, 20, 64))).astype(dtype)
    q = mx.random.normal((1, 4, 1, 64)).astype(dtype)
    with emulated("fast") as e:
        rows, tail = ops.quantize_pack(k, k, fmt, None, 16)
        mx.eval(calls.attend(ops, q, rows, 20, fmt, 0.125, tail=tail))
        mx.eval(calls.restore(ops, rows, 20, fmt, dtype, tail))
        assert len(e.counters) >= 3
    assert not capsys.readouterr().err


@pytest.fixture
def tried(monkeypatch):
    """The operations whose kernels are tried, as they are."""
    found = []
    for op in WRONG:
        right = getattr(gpu, op)
        monkeypatch.setattr(gpu, op, lambda *a, op=op, right=right: found.append(op) or right(*a))
    return found


def test_layers_of_one_kind_are_tried_once(tried):
    with emulated("fast"):
        for fmt in layers(3):
            step(fmt)
    assert sorted(tried) == sorted(WRONG)


def test_a_trial_leaves_the_users_random_numbers_alone():
    (fmt,) = layers(1)
    found = []
    for _ in range(2):
        mx.random.seed(3)
        with emulated("fast"):
            step(fmt)
        found.append(mx.random.normal((4,)))
    mx.random.seed(3)
    step(fmt)  # on the CPU nothing is tried
    assert all(mx.array_equal(x, mx.random.normal((4,))) for x in found[:1])
    assert mx.array_equal(*found)


# ---- what is kept for the next process --------------------------------------------------------
@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def process(fmt=None):
    """What a process tries and computes: memory is dropped before and after."""
    with emulated("fast", keep=True):
        return step(fmt or make_format(SPEC, 64))


def test_the_next_process_does_not_try_what_passed(folder, tried):
    process()
    assert sorted(tried) == sorted(WRONG)
    (file,) = folder.iterdir()
    text = json.loads(file.read_text())
    assert text["machine"] == passed.machine() and len(text["passed"]) == 3
    assert "restore float32 float32" in text["passed"].values()
    tried.clear()
    process()
    assert tried == [] and json.loads(file.read_text()) == text


@pytest.mark.parametrize("part", ["device", "system", "mlx", "mlx_kvq"])
def test_another_machine_or_version_tries_anew(part, folder, tried, monkeypatch):
    process()
    tried.clear()
    other = {**passed.machine(), part: "another"}
    monkeypatch.setattr(passed, "machine", lambda: other)
    process()
    assert sorted(tried) == sorted(WRONG)
    assert len(list(folder.iterdir())) == 2


def test_another_text_constant_or_dtype_tries_anew(folder, tried, monkeypatch):
    process()
    tried.clear()
    process(make_format(Spec.parse("int8-srft:recent=16"), 64))
    assert sorted(tried) == sorted(WRONG)
    tried.clear()
    source = jit.kernel_source
    monkeypatch.setattr(
        jit, "kernel_source", lambda n: source(n) + ("int more;" if n == "restore.metal" else "")
    )
    jit._source.cache_clear()
    process()
    jit._source.cache_clear()
    assert tried == ["restore"]
    keys = {passed.key("attend", ["a"], dtypes) for dtypes in ((mx.float16,), (mx.bfloat16,))}
    assert len(keys) == 2


def test_a_failure_is_not_kept(folder, tried, monkeypatch, capsys):
    right = gpu.attend
    monkeypatch.setattr(trial, "_said", set())
    with monkeypatch.context() as m:
        m.setattr(gpu, "attend", WRONG["attend"](right))
        process()
    assert "attend kernel failed" in capsys.readouterr().err
    tried.clear()
    process()  # of another version of the system, say
    assert tried == ["attend"]


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"\xff\xfe", b"[1]", b'{"passed": 3}', b'{"passed": {}}', b"[" * 9999,
     b'{"passed": {"a": 1}, "machine": {}}'],
)  # fmt: skip
def test_a_damaged_file_is_made_anew(damage, folder, tried, capsys):
    process()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    tried.clear()
    process()
    assert sorted(tried) == sorted(WRONG)
    assert file.read_bytes() == whole and not capsys.readouterr().err


def test_where_nothing_can_be_kept_it_is_tried_each_time(monkeypatch, tmp_path, tried, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path / "file" / "below"))
    for _ in range(2):
        process()
    assert len(tried) == 2 * len(WRONG)
    monkeypatch.delenv("MLX_KVQ_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(passed, "kept_folder", nowhere)
    process()
    passed.forget()
    assert len(tried) == 3 * len(WRONG) and not capsys.readouterr().err


def test_forgetting_tries_anew(folder, tried):
    process()
    (folder / "mine.json").write_text("mine")
    passed.forget()
    assert [p.name for p in folder.iterdir()] == ["mine.json"]
    tried.clear()
    process()
    assert sorted(tried) == sorted(WRONG)


def test_the_file_is_whole_at_any_time(folder):
    """Several threads, as several processes: what is read is always one of the texts written."""

    def write(n):
        for i in range(20):
            passed.add(f"{n}-{i}", "x" * 5000)

    writers = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for w in writers:
        w.start()
    file, read = passed.path(), 0
    while any(w.is_alive() for w in writers):
        if file.exists():
            assert passed.read(file)
            read += 1
    for w in writers:
        w.join()
    assert read and [p.name for p in folder.iterdir()] == [file.name]


def test_the_file_has_an_end(folder, monkeypatch):
    monkeypatch.setattr(passed, "MOST", 3)
    for i in range(9):
        passed.add(str(i), "x")
    assert list(passed.read(passed.path())) == ["6", "7", "8"]
