"""Spills of the kernels on Apple's G13, by Mesa's compiler where it is built."""

import json
import os
from pathlib import Path

import pytest

from . import agx_table

STORED = json.loads((Path(__file__).parent / "agx" / "table.json").read_text())


def by_variant(rows):
    return {(r["kernel"], r["D"], r["dtype"], v): r for r in rows for v in r["variants"]}


def test_stored_table():
    """Every kernel at every head size and dtype, and none that could not be compiled."""
    assert not [row for row in STORED if row["error"]]
    there = {(row["kernel"], row["D"], row["dtype"]) for row in STORED}
    kernels = {kernel for kernel, _, _ in there}
    assert kernels == set(agx_table.KERNELS) - {"attend_join"}
    assert there == {(k, D, t) for k in kernels for D in agx_table.DIMS for t in agx_table.DTYPES}
    for bits in ("int3", "int4"):
        assert any(f"{bits}, calibrated, feedback, tail, L=1" in row["variants"] for row in STORED)
    for row in STORED:
        assert row["spills"] == row["fills"] == 0, row


@pytest.mark.skipif(
    "MLX_KVQ_AGX" not in os.environ,
    reason="Mesa's compiler for Apple GPUs is not built: MLX_KVQ_AGX names it",
)
def test_spills_do_not_rise():
    rows = agx_table.sources()
    agx_table.compile_rows(rows, Path(os.environ["MLX_KVQ_AGX"]))
    found, stored = by_variant(map(vars, rows)), by_variant(STORED)
    assert found.keys() == stored.keys()
    worse = {
        key: (row["error"], row["spills"], row["fills"])
        for key, row in found.items()
        if row["error"]
        or row["spills"] > stored[key]["spills"]
        or row["fills"] > stored[key]["fills"]
    }
    assert not worse
