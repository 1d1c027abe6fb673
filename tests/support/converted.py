"""Converted repositories for tests: a bundled model with a made-up calibration, in no time."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_kvq.calibration.set import CalibrationSet, LayerCalibration
from mlx_kvq.format.spec import Spec
from mlx_kvq.format.transform import Calibration
from mlx_kvq.repositories import repository

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"
SHAPES = {"tiny-qwen2-8bit": (4, 1, 128), "tiny-gemma3-8bit": (6, 1, 256)}  # layers, Hkv, D


def made_up(name: str = "tiny-qwen2-8bit", **shape) -> CalibrationSet:
    """μ, σ, λ that differ everywhere, and a metric."""
    layers, heads, dim = SHAPES[name]
    heads, dim = shape.get("heads", heads), shape.get("dim", dim)
    rng = np.random.default_rng(0)

    def normal():
        return mx.array(rng.standard_normal((heads, dim)).astype(np.float32) / 10)

    def scale():
        return mx.array(np.exp(rng.uniform(-0.2, 0.2, (heads, dim))).astype(np.float32))

    def side(**more):
        return Calibration(mu=normal(), sigma=scale(), lam=scale(), **more)

    metric = mx.broadcast_to(mx.eye(dim), (heads, dim, dim))
    found = {
        (i,): LayerCalibration(side(metric=metric), side())
        for i in range(shape.get("layers", layers))
    }
    return CalibrationSet(found, {"text": "made up", "tokens": 9, "length": 9})


def write(
    folder: Path,
    spec: str = "int4-srft",
    name: str = "tiny-qwen2-8bit",
    layers: dict | None = None,
    calibration: CalibrationSet | None = None,
) -> Path:
    """A copy of a bundled model with a section; its weights are linked, not copied."""
    shutil.copytree(MODELS / name, folder, copy_function=_link)
    (folder / "config.json").unlink()
    shutil.copy(MODELS / name / "config.json", folder)
    parsed = Spec.parse(spec)
    if layers is None:
        layers = {(i,): parsed.bits for i in range(SHAPES[name][0])}
    if calibration is None and parsed.calibrate != "off":
        calibration = made_up(name)
    repository.write(folder, parsed, layers, calibration, {"mlx_kvq": "0.1.0"})
    return folder


def _link(source, target):
    Path(target).symlink_to(source)
