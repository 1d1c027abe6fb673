"""A calibration of the whole model, cut down to what one rank of a distributed run holds."""

from collections.abc import Mapping
from dataclasses import fields, replace

import mlx.core as mx
import mlx.nn as nn

from ..format.transform import Calibration
from .set import CalibrationSet, LayerCalibration


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a part of the model: some layers, or some heads of each."""
    if getattr(getattr(model, "model", None), "pipeline_size", 1) > 1:
        return True
    return any("Sharded" in type(m).__name__ for _, m in model.named_modules())


def local(
    calibration: CalibrationSet,
    model: nn.Module,
    shapes: Mapping[tuple[int, ...], tuple[int, int, int]],
) -> CalibrationSet:
    """The layers of a pipeline's rank, numbered from 0, and the KV heads of a tensor-parallel
    rank.

    Args:
        calibration (CalibrationSet): Of the whole model.
        model (nn.Module): What this rank holds.
        shapes: Path -> (Hkv, Dk, Dv) of its caches.
    """
    if not is_sharded(model):
        return calibration
    rank = mx.distributed.init().rank()
    first = getattr(getattr(model, "model", None), "start_idx", 0)

    def heads(c: Calibration, held: int) -> Calibration:
        cut = {}
        for name in (f.name for f in fields(c)):
            a = getattr(c, name)
            if isinstance(a, mx.array) and a.shape[0] > held and a.shape[0] % held == 0:
                cut[name] = a[rank * held : (rank + 1) * held]
        return replace(c, **cut)

    layers = {}
    for path, (held, _, _) in shapes.items():
        if layer := calibration.layers.get((path[0] + first, *path[1:])):
            layers[path] = LayerCalibration(heads(layer.keys, held), heads(layer.values, held))
    return CalibrationSet(layers, calibration.metadata)


def local_paths(policy: Mapping[tuple[int, ...], str], model: nn.Module):
    """A policy of the whole model, numbered from this rank's first layer."""
    first = getattr(getattr(model, "model", None), "start_idx", 0) if is_sharded(model) else 0
    return {(path[0] - first, *path[1:]): bits for path, bits in policy.items()}


def all_ranks(known: bool, model: nn.Module) -> bool:
    """Whether ``known`` holds on every rank, as what follows if not is done by all together."""
    if not is_sharded(model):
        return known
    group = mx.distributed.init()
    agreeing = mx.distributed.all_sum(mx.array(int(known)), group=group, stream=mx.cpu)
    return agreeing.item() == group.size()
