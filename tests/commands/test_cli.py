"""What ends a command of mlx_kvq: one line, and nothing half-written."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from mlx_kvq import cli
from mlx_kvq.commands import inspection
from tests.support.float32 import MODELS

QWEN = str(MODELS / "tiny-qwen2-8bit")


@pytest.mark.parametrize(
    "error, line, status",
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/no/such"),
            "mlx_kvq inspect: error: '/no/such': No such file or directory",
            None,
        ),
        (OSError("the disk is full"), "mlx_kvq inspect: error: the disk is full", None),
        (ValueError("a value"), "mlx_kvq inspect: error: a value", None),
        (KeyboardInterrupt(), "mlx_kvq inspect: interrupted", 130),
    ],
)
def test_what_a_command_raises(error, line, status, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr(inspection, "run", run)
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", "repository"])
    said = capsys.readouterr().err.strip()
    assert (stop.value.code, said) == ((status, line) if status else (line, ""))


@pytest.mark.parametrize("error", [RuntimeError("a fault"), TypeError("a fault")])
def test_faults_of_the_program_stay_visible(error, monkeypatch):
    def run(args):
        raise error

    monkeypatch.setattr(inspection, "run", run)
    with pytest.raises(type(error)):
        cli.main(["inspect", "repository"])


def test_calibrate_to_a_bad_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "calibration.safetensors"
    process = subprocess.run(
        [sys.executable, "-m", "mlx_kvq", "calibrate", "--model", QWEN, "--tokens", "64",
         "--output", str(output)], capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith("mlx_kvq calibrate: error: ")


def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    """While it calibrates: one line, status 130, no file."""
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night. " * 20000)
    folder = tmp_path / "out"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_kvq", "calibrate", "--model", QWEN, "--text", str(text),
         "--tokens", "100000", "--output", str(folder / "calibration.safetensors")],
        stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        # A shell's background job, as CI may be, ignores it, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    said = b""
    while b"calibrating" not in said:
        said += process.stderr.read1()
        assert process.poll() is None, said
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 130
    assert rest.strip().endswith(b"mlx_kvq calibrate: interrupted")
    assert b"Traceback" not in said + rest
    assert list(folder.iterdir()) == []
