"""``mlx_kvq cache``: lists what is kept, and deletes it and nothing else."""

import pytest

from mlx_kvq import cli
from mlx_kvq.calibration import automatic
from mlx_kvq.ops import cubins, passed
from tests.calibration.test_calibrate import Attention, Model, Words


@pytest.fixture(autouse=True)
def _mlx_folder(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path_factory.mktemp("ptx")))


def run(*options):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["cache", *options])
    assert exit_.value.code is None


def test_list_and_clear(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path))
    automatic.automatic(Model(Attention()), Words())
    (file,) = tmp_path.iterdir()
    (tmp_path / "damaged.safetensors").write_bytes(b"no\x1b[1m")
    (tmp_path / "mine.txt").write_text("mine")
    run()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path}: 2 of at most 512 MiB in all"
    made, damaged = sorted(lines, key=lambda text: "damaged" in text)
    assert made.endswith(f"{file.name}  ?: built-in sample, 256 tokens")
    assert "is not a readable safetensors file" in damaged and "\x1b" not in damaged
    run("--clear")
    assert capsys.readouterr().out == f"2 deleted from {tmp_path}\n"
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_passed_trials_are_listed_and_deleted_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path))
    passed.add("a1", "attend float16")
    passed.add("a2", "restore float16")
    (tmp_path / "trials-0.json").write_text("{")
    run()
    _, damaged, made = capsys.readouterr().out.splitlines()
    assert f"2 kernels passed on {passed.machine()['device']}, " in made
    assert damaged.endswith("trials-0.json  is damaged: kernels are tried again")
    run("--clear")
    assert capsys.readouterr().out == f"2 deleted from {tmp_path}\n"


def test_compiled_kernels_are_listed_and_deleted_with_what_mlx_has_of_them(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path))
    cubin, handed = cubins.Cubin("symbol", b"\x7fELF\n\0"), cubins.mlx_folder()
    file = cubins.path(["text", "sm_90a"])
    cubins.keep(file, cubin, "attend_join_0123, sm_90a, NVRTC 13.0")
    cubins.hand_over(handed, "custom_kernel_kvq_attend_join_0123", "kernel", cubin)
    (handed / "gather.ptx").write_text("MLX's own")
    (tmp_path / "kernel-0.cubin").write_bytes(file.read_bytes()[:-1])
    run()
    _, damaged, made = capsys.readouterr().out.splitlines()
    assert made.endswith(f"{file.name}  attend_join_0123, sm_90a, NVRTC 13.0")
    assert damaged.endswith("kernel-0.cubin  is damaged: the kernel is compiled again")
    run("--clear")
    said = capsys.readouterr().out
    assert said == f"2 deleted from {tmp_path}\n1 deleted from {handed}\n"
    assert not list(tmp_path.iterdir()) and [p.name for p in handed.iterdir()] == ["gather.ptx"]


def test_no_folder_is_an_empty_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path / "none"))
    run()
    run("--clear")
    assert "0 of at most" in capsys.readouterr().out
