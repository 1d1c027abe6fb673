"""``sharded_load`` of a converted repository: each rank of a pipeline packs its own layers, with
their bits and their calibration. Run by ``mlx.launch``, this file is one of the ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import sharded_load

from tests.support.converted import made_up, write
from tests.support.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
BITS = {(0,): "int4", (1,): "int8", (2,): "k8v4", (3,): "int4"}


def rank(folder: str, out: str) -> None:
    group = mx.distributed.init(backend="ring", strict=True)
    model, _ = sharded_load(folder, group, None)
    found = [
        (c.format.spec.bits, float(c.format.keys.calibration.mu[0, 0].item()))
        for c in make_prompt_cache(model)
    ]
    first = model.model.start_idx
    Path(out, f"{group.rank()}.json").write_text(json.dumps([first, found]))


def test_each_rank_has_its_layers(tmp_path):
    folder = write(tmp_path / "model", layers=BITS)
    port = free_ports(2)
    command = [
        Path(sys.executable).parent / "mlx.launch", "-n", 2, "--backend", "ring",
        "--starting-port", port, "--env", f"PYTHONPATH={ROOT}", "--", sys.executable, __file__,
        folder, tmp_path,
    ]  # fmt: skip
    process = subprocess.run(
        [str(c) for c in command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    said = process.stdout + process.stderr
    assert process.returncode == 0, said
    want = made_up().layers
    seen = set()
    for i in (0, 1):
        first, found = json.loads((tmp_path / f"{i}.json").read_text())
        for layer, (bits, mu) in enumerate(found, first):
            seen.add(layer)
            assert bits == BITS[layer,]
            assert mu == float(want[layer,].keys.mu[0, 0].item())
    assert seen == {0, 1, 2, 3}, said
    assert said.count("packed 2 of 2 layers") == 2


if __name__ == "__main__":
    rank(*sys.argv[1:])
