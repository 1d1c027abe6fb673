"""``mlx_kvq convert --evaluate``: one calibration serves the repository and its card."""

import shutil
from importlib import import_module

import mlx_kvq
from mlx_kvq.calibration import automatic
from tests.support.float32 import MODELS


def test_evaluate_uses_the_calibration_of_the_repository(tmp_path, monkeypatch):
    module = import_module("mlx_kvq.repositories.convert")
    made, used = [], []
    calibrate, evaluate = module.calibrate, module.evaluate

    def calibrating(*args, **options):
        made.append(calibrate(*args, **options))
        return made[-1]

    def evaluating(*args, **options):
        used.append(options["calibration"])
        return evaluate(*args, **options | {"windows": 1, "tokens": 64})

    def never(*args, **options):
        raise AssertionError("calibrated a second time")

    monkeypatch.setattr(module, "calibrate", calibrating)
    monkeypatch.setattr(module, "evaluate", evaluating)
    monkeypatch.setattr(automatic, "automatic", never)
    shutil.copytree(MODELS / "tiny-qwen2-8bit", tmp_path / "model")
    text = (MODELS.parent / "text" / "novel.txt").read_text(encoding="utf-8")
    mlx_kvq.convert(
        mlx_path=tmp_path / "model", calibration_text=text[:1000], evaluate_on={"a": text[-2400:]}
    )
    assert len(made) == 1 and used == made
