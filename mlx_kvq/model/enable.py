"""Switch a model to a packed cache: ``enable``, ``disable`` and ``make_prompt_cache``."""

from collections.abc import Mapping
from pathlib import Path

import mlx.nn as nn
from mlx_lm.models import cache as stock

from .. import arguments
from ..caches import seams
from ..calibration import automatic
from ..calibration.set import CalibrationSet
from ..format.spec import Spec
from ..host import language_model, undisturbed
from ..stock import CacheFactory, factory_of, own_caches, same_layers
from .plan import make_plan
from .report import Report, log


def enable(
    model: nn.Module,
    spec: str | Spec,
    *,
    calibration: CalibrationSet | str | Path | None = None,
    tokenizer=None,
    policy: Mapping[tuple[int, ...], str] | None = None,
    verbose: bool = True,
) -> Report | None:
    """Make every mlx-lm entry point use a packed cache for this model.

    Layers with a ``KVCache`` get a packed growing cache, sliding layers a packed rotating one;
    caches of other kinds stay as they are. A wrapper and its language model are enabled together.
    If weights change afterwards, the next cache warns once; files then belong to the new weights.

    Args:
        model (nn.Module): A model from ``mlx_lm.load`` or ``mlx_vlm.load``.
        spec (str or Spec): For example ``"int4-srft"``; ``"fp16"`` is :func:`disable`.
        calibration (CalibrationSet or path, optional): From :func:`mlx_kvq.calibrate`. Default:
            the converted repository's own, or an automatic one on a built-in text, kept in the
            user's cache directory (``mlx_kvq.calibration.automatic``).
        tokenizer (optional): For that text; without it random tokens are used.
        policy (dict, optional): Path of every cache to pack -> ``"int3"``, ``"k4v3"``,
            ``"int4"``, ``"k5v4"``, ``"int5"``, ``"k8v4"`` or ``"int8"``; replaces ``skip``,
            ``high`` and ``budget`` of the spec.
        verbose (bool): Print one line to stderr about the result.

    Returns:
        Report: The packed layers and the others; ``None`` for ``"fp16"``.

    Raises:
        ValueError: If the spec is not valid, nothing in this model can be packed, or the
            calibration is not one of this model.
    """
    model = language_model(model)
    arguments.model(model)
    parsed = Spec.parse(spec)
    if parsed is None:
        disable(model)
        return None
    say = log if verbose else automatic.silent
    with undisturbed(model):
        packing, report = make_plan(model, parsed, calibration, tokenizer, say, policy)
    seams.install(model)
    disable(model)
    holders: list = []
    for part in (model, *same_layers(model)):
        part.make_cache = CacheFactory(packing, part, holders)
    say(str(report))
    return report


def disable(model: nn.Module) -> None:
    """Give a model, or both halves of a wrapper, its own cache back."""
    model = language_model(model)
    while (factory := factory_of(model)) is not None:
        for part in factory.holders:
            if getattr(vars(part).get("make_cache"), "holders", None) is factory.holders:
                del part.make_cache


def make_prompt_cache(
    model: nn.Module,
    spec: str | Spec,
    max_kv_size: int | None = None,
    *,
    calibration: CalibrationSet | str | Path | None = None,
    tokenizer=None,
) -> list[stock._BaseCache]:
    """A packed prompt cache for one conversation, without enabling the model.

    Args:
        model (nn.Module): A model from ``mlx_lm.load`` or ``mlx_vlm.load``.
        spec (str or Spec): For example ``"int4-srft"``.
        max_kv_size (int, optional): Bounds every growing layer to so many tokens, at least 1,
            of which the first 4 are never dropped.
        calibration, tokenizer: As for :func:`enable`.

    Raises:
        ValueError: As :func:`enable`.
    """
    model = language_model(model)
    arguments.model(model)
    parsed = Spec.parse(spec)
    arguments.integer("max_kv_size", max_kv_size, optional=True)
    if parsed is None:
        return own_caches(model, max_kv_size)
    with undisturbed(model):
        packing, _ = make_plan(model, parsed, calibration, tokenizer, automatic.silent)
    seams.install(model)
    return packing(max_kv_size)
