"""``position_error``: least where a calibration is made for, and what it prints."""

import sys
from pathlib import Path

import position_error

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = EXAMPLES / "models" / "tiny-qwen2-8bit"
TEXT = EXAMPLES / "text" / "novel.txt"


def test_the_table(monkeypatch, capsys):
    given = ("--model", MODEL, "--tokens", 64, "--for", 512, 8192, "mix:8192", "--at", 512, 8192)
    monkeypatch.setattr(sys, "argv", ["position_error.py", *map(str, given)])
    position_error.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {r[1]: [float(x) for x in (r[3], r[5])] for r in (line.split(" ") for line in lines[2:])}
    assert rows["512"][0] == rows["8192"][1] == 1.0
    assert rows["512"][1] > rows["mix:8192"][1] > 1 and rows["8192"][0] > rows["mix:8192"][0] > 1


def test_windows_read_for_real(monkeypatch, capsys):
    """What the columns' own windows give is right there, and the closed form is near."""
    given = ("--model", MODEL, "--calibration-text", TEXT, "--text", TEXT, "--tokens", 512)
    made = ("--for", "read:128", "read:512", 512, "--at", 128, 512)
    monkeypatch.setattr(sys, "argv", ["position_error.py", *map(str, given + made)])
    monkeypatch.setattr(position_error, "LENGTH", 128)
    position_error.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {r[1]: [float(x) for x in (r[3], r[5])] for r in (line.split(" ") for line in lines[2:])}
    assert rows["read:128"][0] == rows["read:512"][1] == 1.0
    assert 1 < rows["512"][1] < 1.1 and rows["read:128"][1] > rows["512"][1]
