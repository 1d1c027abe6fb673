"""The scripts that measure a GPU run from end to end, and make tables of what they wrote."""

import json
import sys
from importlib import import_module

import pytest

from mlx_kvq.measure.shapes import SHAPES


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name; its ``main`` gets these arguments."""

    def load(name: str, *arguments: str):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        return import_module(name)

    return load


def test_a_run_keeps_its_rows_and_they_become_tables(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", None)  # taken out again
    bench = script("bench_gpu", str(tmp_path), "--tiny")
    with pytest.raises(SystemExit) as exit_:
        bench.main()
    assert exit_.value.code == 0
    ops = json.loads((tmp_path / "ops.json").read_text())
    assert [(r["batch"], r["cache"], r["class"]) for r in ops["rows"]] == [
        (B, name, cls[B > 1])
        for B in (1, 2)
        for name, cls in (
            ("fp16", ("KVCache", "BatchKVCache")),
            ("int4-srft", ("PackedKVCache", "PackedBatchKVCache")),
            ("kv4", ("QuantizedKVCache",) * 2),
            ("kv8", ("QuantizedKVCache",) * 2),
            ("fp16-even", (None, "KVCache")),
        )
        if cls[B > 1]
    ]
    models = json.loads((tmp_path / "models.json").read_text())
    assert [(r["batch"], r["class"]) for r in models["rows"]] == [
        (1, "KVCache"), (1, "PackedKVCache"), (2, "BatchKVCache"), (2, "PackedBatchKVCache"),
    ]  # fmt: skip
    assert {"device", "mlx", "mlx-lm", "commit", "command", "date"} <= set(ops["record"])
    capsys.readouterr()
    script("tables", str(tmp_path / "ops.json"), str(tmp_path / "models.json")).main()
    out = capsys.readouterr().out
    row = next(r for r in ops["rows"] if r["cache"] == "int4-srft")
    assert f"{row['us']:.1f} ({row['us_low']:.1f}–{row['us_high']:.1f})" in out
    x = row["x_fp16"]
    assert f"{x[0]:.2f} ({x[1]:.2f}–{x[2]:.2f})" in out
    assert "| attend | batch | tokens | fp16, µs | int4-srft, µs |" in out
    assert "decoding, tiny, int4-srft, batch 2" in out and "BatchKVCache" in out
    assert "int4-srft × fp16-even" in out
    for table in out.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1


def test_no_row_is_begun_without_time(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", None)
    bench = script("bench_gpu", str(tmp_path), "--tiny", "--budget", "0")
    with pytest.raises(SystemExit) as exit_:
        bench.main()
    assert exit_.value.code == 1
    assert capsys.readouterr().out.count("left out, no time") == 4
    assert not list(tmp_path.iterdir())


def test_tables_of_something_else(script, tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(SystemExit, match="no result of a benchmark"):
        script("tables", str(path)).main()


def test_a_contender_that_failed_is_said_under_the_table(script):
    tables = script("tables")
    rows = [{"op": "attend", "heads": "h", "batch": 1, "tokens": 9, "cache": "torch", "note": "no"}]
    assert tables.tables(rows)[0].endswith("| h | 1 | 9 | – |")
    assert "h, batch 1, 9, torch: no" in tables.classes(rows)


def test_pytorch_is_asked_for_in_one_line(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # not installed
    with pytest.raises(SystemExit, match=r"^bench_torch.py needs PyTorch with CUDA"):
        script("bench_torch").main()
