"""--kv-cache for mlx-vlm's commands."""

import argparse
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mlx_kvq import _startup
from mlx_kvq.plugin import vlm
from mlx_kvq.plugin.option import asked, wanted

ROOT = Path(__file__).resolve().parents[2]
QWEN = ROOT / "examples" / "models" / "tiny-qwen2-8bit"
BIN = Path(sys.executable).parent


def module(name: str, **names: Any) -> Any:
    made: Any = types.ModuleType(f"mlx_vlm.{name}")
    vars(made).update(names)
    return made


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    for name in ("spec", "option", "lacking"):
        monkeypatch.setattr(wanted, name, getattr(wanted, name))
    monkeypatch.delenv("MLX_KVQ_SPEC", raising=False)


@pytest.mark.parametrize("name", ["generate.dispatch", "server.cli"])
def test_a_command_gets_the_option(name, capsys):
    assert f"mlx_vlm.{name}" in _startup.MODULES
    made = module(name, argparse=argparse)
    vlm.patch(made)
    parser = made.argparse.ArgumentParser()
    parser.add_argument("--kv-bits", type=float)
    assert parser.parse_args(["--kv-cache", "INT4"]).mlx_kvq_cache == "int4-srft"
    assert asked() == "int4-srft"
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-cache", "int4", "--kv-bits", "4"])
    assert "two ways to quantize" in capsys.readouterr().err
    assert parser.parse_args([]).mlx_kvq_cache is None and asked() is None


def test_a_command_of_another_make_is_left_alone(monkeypatch, capsys):
    made = module("server.cli", argparse=None)
    vlm.patch(made)
    assert made.argparse is None and capsys.readouterr().err == ""


def test_without_load_the_option_is_an_error(monkeypatch, capsys):
    fake = module("__init__", __version__="9.9")
    monkeypatch.setitem(sys.modules, "mlx_vlm", fake)
    vlm.patch(module("utils"))
    made = module("generate.dispatch", argparse=argparse)
    vlm.patch(made)
    with pytest.raises(SystemExit):
        made.argparse.ArgumentParser().parse_args(["--kv-cache", "int4"])
    expected = "[mlx_kvq] error: mlx_vlm 9.9 is not supported: utils.load is missing"
    assert capsys.readouterr().err.strip() == expected


def run(*command, **env):
    return subprocess.run(
        [str(c) for c in command],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | env,
        capture_output=True,
        text=True,
    )


def test_the_commands_themselves():
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    command = [BIN / "mlx_vlm.generate", "--model", QWEN, "--prompt", "They walked", "--max-tokens"]
    process = run(*command, 8, "--kv-cache", "int8:calibrate=off")
    assert process.returncode == 0, process.stderr
    assert "[mlx_kvq] int8-srft:calibrate=off: packed 4 of 4 layers" in process.stderr
    assert process.stdout == run(*command, 8).stdout
    process = run(*command, 8, MLX_KVQ_SPEC="int4:calibrate=off")
    assert "[mlx_kvq] int4-srft:calibrate=off: packed 4 of 4 layers" in process.stderr
    assert "--kv-cache" in run(BIN / "mlx_vlm.server", "--help").stdout
    process = run(*command, 8, "--kv-cache", "int4:group_size=48")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "[mlx_kvq] error: int4-srft:group_size=48 cannot pack any layer" in process.stderr
