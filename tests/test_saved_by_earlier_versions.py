"""Files of version 0.1.0 load as they did: prompt caches, calibrations, converted repositories."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.models import cache as stock

from mlx_kvq.caches import seams
from mlx_kvq.calibration.set import CalibrationSet
from mlx_kvq.repositories import repository
from tests.fixtures import make

FILES = Path(__file__).parent / "fixtures" / "v0.1.0"
EXPECTED = json.loads((FILES / "expected.json").read_text())
CACHES = sorted(p.stem for p in FILES.glob("*.safetensors") if p.stem in EXPECTED)


def packed(caches) -> list:
    return [c for c in caches if hasattr(c, "rows") and c.rows is not None]


@pytest.mark.parametrize("name", CACHES)
def test_prompt_caches_read_as_before(name):
    seams.install()
    caches, metadata = stock.load_prompt_cache(
        str(FILES / f"{name}.safetensors"), return_metadata=True
    )
    assert metadata == {"made": "0.1.0"}
    found = packed(caches)
    assert len(found) == len(EXPECTED[name])
    for cache, expected in zip(found, EXPECTED[name], strict=True):
        out = np.array(make.read(cache), dtype=np.float64).ravel()[:16]
        np.testing.assert_allclose(out, expected, atol=2e-3 if "float32" not in name else 1e-5)


@pytest.mark.parametrize("name", CACHES)
def test_prompt_caches_go_on(name):
    seams.install()
    for cache in packed(stock.load_prompt_cache(str(FILES / f"{name}.safetensors"))):
        B = cache.rows.shape[0]
        for i in range(20):
            k, v = (
                make.normal(i + j, B, make.HEADS, 1, make.D).astype(cache.dtype) for j in (0, 1)
            )
            cache.update_and_fetch(k, v)
        assert bool(mx.isfinite(make.read(cache)).all())


@pytest.mark.parametrize("name", ["calibration", "calibration-metric"])
def test_calibrations(name):
    found = CalibrationSet.load(FILES / f"{name}.safetensors")
    assert sorted(found.layers) == ([(0,), (1,)] if name == "calibration" else [(0,), (1, 0)])
    assert found.metadata["text"] == "given"


@pytest.mark.parametrize("name", ["tiny-qwen2-8bit", "tiny-gemma3-8bit"])
def test_converted_repositories(name, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make.MODELS / name, folder)
    for part in (FILES / f"repository-{name}").iterdir():
        shutil.copy(part, folder)
    model, _ = load(str(folder))
    report = repository.apply(model, verbose=False)
    assert str(report.spec) == ("int4-srft" if "qwen2" in name else "k8v4-srft:skip=first")
    assert len(report.packed) == (4 if "qwen2" in name else 5)
