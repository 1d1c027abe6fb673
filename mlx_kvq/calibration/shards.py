"""The part of a model's calibration for one rank of a distributed run."""

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from ..format.transform import Calibration
from ..stock import CachePath, Shapes
from .set import CalibrationSet, LayerCalibration


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a part of the model: some layers, or some heads of each."""
    if getattr(getattr(model, "model", None), "pipeline_size", 1) > 1:
        return True
    return any("Sharded" in type(m).__name__ for _, m in model.named_modules())


def _first_layer(model: nn.Module) -> int:
    return getattr(getattr(model, "model", None), "start_idx", 0) if is_sharded(model) else 0


def local(calibration: CalibrationSet, model: nn.Module, shapes: Shapes) -> CalibrationSet:
    """The part of a model's calibration for this rank: the layers of a pipeline's rank, numbered
    from 0, and the KV heads of a tensor-parallel rank."""
    if not is_sharded(model):
        return calibration
    rank, first = mx.distributed.init().rank(), _first_layer(model)

    def heads(c: Calibration, held: int) -> Calibration:
        return replace(c, **{
            name: a[rank * held : (rank + 1) * held]
            for name, a in c.arrays().items()
            if a.shape[0] > held and a.shape[0] % held == 0
        })  # fmt: skip

    layers = {}
    for path, (held, _, _) in shapes.items():
        if layer := calibration.layers.get((path[0] + first, *path[1:])):
            layers[path] = LayerCalibration(heads(layer.keys, held), heads(layer.values, held))
    return CalibrationSet(layers, calibration.metadata)


def local_paths(policy: Mapping[CachePath, str], model: nn.Module) -> dict[CachePath, str]:
    """A policy of the whole model, numbered from this rank's first layer."""
    first = _first_layer(model)
    return {(path[0] - first, *path[1:]): bits for path, bits in policy.items()}


def all_ranks(known: bool, model: nn.Module) -> bool:
    """Whether ``known`` holds on every rank; all ranks must take the same way from here."""
    if not is_sharded(model):
        return known
    group = mx.distributed.init()
    agreeing = mx.distributed.all_sum(mx.array(int(known)), group=group, stream=mx.cpu)
    return agreeing.item() == group.size()
