"""What ``mlx_kvq fit`` says of a config: for pictures.py and scale.py."""

import json
import tempfile
from pathlib import Path

from mlx_kvq.commands import fit
from mlx_kvq.commands.options import size
from mlx_kvq.repositories.repository import Repository
from mlx_kvq.repositories.summary import build


class Model:
    """What ``mlx_kvq fit`` says of a config."""

    def __init__(self, name: str, config: dict, weight_bits: int):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            model = build(Repository(Path(folder), None, name))
            self.weights, _ = fit.weight_bytes(model, Path(folder), config, weight_bits)
            self.layers = fit.layers_of(model)
        self.most = fit.longest(config)

    def plan(self, cache: str) -> fit.Plan:
        return fit.Plan(self.layers, cache)

    def cell(self, cache: str, memory: str, sequences: int = 1) -> str:
        """Tokens of context, as ``mlx_kvq fit`` prints them; "" if the weights do not fit."""
        left = fit.wired(size(memory))[0] - self.weights - fit.RESERVE
        return self.plan(cache).cell(left, sequences, self.most) if left > 0 else ""
