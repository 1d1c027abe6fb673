"""Bits of every packed cache: from a spec's options or from a given policy."""

from collections.abc import Mapping

import mlx.nn as nn

from ..calibration import shards
from ..format.spec import Spec
from ..stock import CachePath
from .budget import STEPS
from .report import Report, layer_ranges


def bits_by_spec(spec: Spec, paths: list[CachePath]) -> dict[CachePath, str]:
    """The bits of every cache that the spec does not skip. ValueError if the spec names a layer
    that is not in ``paths``, or skips all."""
    layers = sorted({path[0] for path in paths})
    names: dict[int | str, int] = {"first": layers[0], "last": layers[-1]}
    chosen = {}
    for option in ("skip", "high"):
        chosen[option] = {names.get(layer, layer) for layer in getattr(spec, option)}
        if unknown := chosen[option] - set(layers):
            raise ValueError(
                f"{spec}: {option} names layer {min(map(int, unknown))}; the layers that can be "
                f"packed are {layer_ranges(layers)}."
            )
    bits = {
        path: "int8" if path[0] in chosen["high"] else spec.bits
        for path in paths
        if path[0] not in chosen["skip"]
    }
    if not bits:
        raise ValueError(f"{spec} skips every layer: use 'fp16'.")
    return bits


def bits_by_policy(
    policy: Mapping[CachePath, str], paths: list[CachePath], report: Report, model: nn.Module
) -> dict[CachePath, str]:
    """The bits of every cache in ``paths`` that the policy names; ``policy`` is of the whole model.
    ValueError if the policy is not valid, or names a cache that cannot be packed."""
    for path, bits in policy.items():
        if not isinstance(path, tuple) or not all(type(n) is int and n >= 0 for n in path):
            raise ValueError(f"policy names caches by paths such as (0,), got {path!r}.")
        if bits not in STEPS:
            raise ValueError(f"policy of {path} is one of {', '.join(STEPS)}, got {bits!r}.")
    local = shards.local_paths(policy, model)
    if not shards.is_sharded(model) and (unknown := sorted(set(local) - set(paths))):
        layer = unknown[0][0]
        reason = report.left.get(layer)
        raise ValueError(
            f"Layer {layer} is to be packed, but "
            + (f"cannot be: {reason}." if reason else "this model has no such cache.")
        )
    return {path: local[path] for path in paths if path in local}
