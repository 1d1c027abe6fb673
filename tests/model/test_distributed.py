"""Tensor- and pipeline-parallel generation on two ranks over loopback: the text of one process,
and each rank's rows packed with its own heads' and layers' calibration."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_kvq
from mlx_kvq.calibration.set import CalibrationSet, LayerCalibration
from mlx_kvq.format.transform import Calibration
from tests.support.distributed_run import two_heads
from tests.support.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "support" / "distributed_run.py"
LAYERS, HEADS, D = 4, 2, 128


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """A file in which all heads and all layers differ."""
    rng = np.random.default_rng(0)

    def side():
        return Calibration(
            mx.array(rng.standard_normal((HEADS, D)).astype(np.float32)),
            mx.array(np.exp(rng.uniform(-0.5, 0.5, (HEADS, D))).astype(np.float32)),
        )

    layers = {(i,): LayerCalibration(side(), side()) for i in range(LAYERS)}
    path = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    CalibrationSet(layers, {"text": "made up"}).save(path)
    return path


def run(mode, folder, *calibrations):
    """(tokens, rows) by rank for each of the calibrations."""
    command = [SCRIPT, mode, folder, *calibrations]
    if mode != "single":
        port = free_ports(2)
        launch = Path(sys.executable).parent / "mlx.launch"
        command = [launch, "-n", 2, "--backend", "ring", "--starting-port", port,
                   "--env", f"PYTHONPATH={ROOT}", "--", sys.executable, *command]  # fmt: skip
    else:
        command = [sys.executable, *command]
    process = subprocess.run(
        [str(c) for c in command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "MLX_KVQ_CACHE": str(folder)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    ranks = 1 if mode == "single" else 2
    found = []
    for i in range(len(calibrations)):
        tokens, rows = [], []
        for rank in range(ranks):
            path = Path(folder) / f"{mode}-{rank}-{i}"
            assert path.with_suffix(".json").exists(), process.stdout + process.stderr
            tokens.append(json.loads(path.with_suffix(".json").read_text()))
            rows.append(mx.load(f"{path}.safetensors"))
        found.append((tokens, rows))
    return found


@pytest.fixture(scope="module")
def results(calibration, tmp_path_factory):
    """By mode: what came of no calibration, and of the one whose heads all differ."""
    modes = ("single", "tensor", "pipeline")
    return {m: run(m, tmp_path_factory.mktemp(m), "off", calibration) for m in modes}


@pytest.mark.parametrize("mode", ["tensor", "pipeline"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_text_of_one_process(mode, calibrated, results):
    (expected,), (whole,) = results["single"][calibrated]
    tokens, rows = results[mode][calibrated]
    assert tokens == [expected, expected]
    seen = set()
    for rank, found in enumerate(rows):
        for layer, packed in found.items():
            seen.add((rank, layer))
            mine = whole[layer]
            if mode == "tensor":
                mine = mine[:, rank : rank + 1]
            assert packed.shape == mine.shape
            # A sum in another order may turn a code; other heads' values would turn most.
            assert np.mean(np.array(packed) == np.array(mine)) > 0.97
    layers = {str(i) for i in range(LAYERS)}
    if mode == "tensor":
        assert seen == {(rank, layer) for rank in (0, 1) for layer in layers}
    else:
        assert seen == {(0, "2"), (0, "3"), (1, "0"), (1, "1")}


@pytest.mark.parametrize("mode", ["tensor", "pipeline"])
def test_automatic_calibration_of_shards(mode, tmp_path):
    """Made by all ranks together, also when one of them has kept its part."""
    ((first, _),) = run(mode, tmp_path, "auto")
    assert first[0] == first[1]
    kept = sorted(tmp_path.glob("*-sample.safetensors"))
    assert len(kept) == 2  # each rank has heads or layers of its own
    kept[0].unlink()
    ((again, _),) = run(mode, tmp_path, "auto")
    assert again == first
    assert len(list(tmp_path.glob("*-sample.safetensors"))) == 2


def test_a_whole_model_keeps_its_calibration(calibration):
    model, _ = two_heads()
    given = CalibrationSet.load(calibration)
    report = mlx_kvq.enable(model, "int4-srft", calibration=given, verbose=False)
    assert report.calibration is given
