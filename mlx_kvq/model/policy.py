"""Bits of every packed cache: from a spec's options or from a given policy."""

from collections.abc import Mapping

import mlx.nn as nn

from ..calibration import shards
from ..format.format import Format
from ..format.spec import Spec
from .budget import STEPS
from .report import Report, layer_ranges


def bits_by_spec(
    spec: Spec, formats: dict[tuple[int, ...], Format], report: Report
) -> dict[tuple[int, ...], str]:
    """The bits of every packed cache; takes those that the spec skips out of ``formats``."""
    layers = sorted({path[0] for path in formats})
    names: dict[int | str, int] = {"first": layers[0], "last": layers[-1]}
    chosen = {}
    for option in ("skip", "high"):
        chosen[option] = {names.get(layer, layer) for layer in getattr(spec, option)}
        if unknown := chosen[option] - set(layers):
            raise ValueError(
                f"{spec}: {option} names layer {min(map(int, unknown))}; the layers that can be "
                f"packed are {layer_ranges(layers)}."
            )
    for path in [p for p in formats if p[0] in chosen["skip"]]:
        del formats[path]
        report.left[path[0]] = "skipped"
    if not formats:
        raise ValueError(f"{spec} skips every layer: use 'fp16'.")
    return {path: "int8" if path[0] in chosen["high"] else spec.bits for path in formats}


def bits_by_policy(
    policy: Mapping[tuple[int, ...], str],
    formats: dict[tuple[int, ...], Format],
    report: Report,
    model: nn.Module,
) -> dict[tuple[int, ...], str]:
    """:func:`_policy` where the bits of the whole model's caches are known."""
    for path, bits in policy.items():
        if not isinstance(path, tuple) or not all(type(n) is int and n >= 0 for n in path):
            raise ValueError(f"policy names caches by paths such as (0,), got {path!r}.")
        if bits not in STEPS:
            raise ValueError(f"policy of {path} is one of {', '.join(STEPS)}, got {bits!r}.")
    local = shards.local_paths(policy, model)
    if not shards.is_sharded(model) and (unknown := sorted(set(local) - set(formats))):
        layer = unknown[0][0]
        reason = report.left.get(layer)
        raise ValueError(
            f"Layer {layer} is to be packed, but "
            + (f"cannot be: {reason}." if reason else "this model has no such cache.")
        )
    for path in [p for p in formats if p not in local]:
        del formats[path]
        report.left[path[0]] = "skipped"
    return {path: local[path] for path in formats}
