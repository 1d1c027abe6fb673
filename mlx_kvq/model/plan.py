"""Which caches of a model are packed, and how: the steps from a spec to formats."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.nn as nn
from mlx_lm.models import cache as stock

from .. import arguments
from ..caches import seams
from ..caches.packed import PackedCache
from ..caches.rotating import PackedRotatingKVCache
from ..caches.single import PackedKVCache
from ..calibration import automatic, shards
from ..calibration.fit import lambda_of
from ..calibration.set import CalibrationSet
from ..format.format import Format, make_format
from ..format.spec import Spec
from ..stock import KEEP, PACKABLE, Identity, head_sizes, is_packable, kinds_of, leaves, own_caches
from .budget import STEPS, allocate
from .policy import bits_by_policy, bits_by_spec
from .report import Report, log
from .trial import batch_failure, first_failure

LATENT = "latent attention (MLA), whose cache is small already"
SPARSE = "sparse attention, which reads the arrays of its caches"


def _check_size(max_kv_size: object) -> None:
    if max_kv_size is not None:
        arguments.integer("max_kv_size", max_kv_size)


@dataclass
class Packing:
    """Makes the caches of a model, packed where they can be.

    Args:
        model (nn.Module): That was enabled.
        formats (dict): Path of a packed cache -> its format.
        as_arrays (set): Paths of those that attend without mlx-lm's shared function.
    """

    model: nn.Module
    formats: dict[tuple[int, ...], Format] = field(default_factory=dict)
    as_arrays: set[tuple[int, ...]] = field(default_factory=set)
    alone: bool = False
    calibrated: bool = False
    identity: Identity | None = None
    _of: str = ""  # the identity that it was made for
    _warned: bool = False

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        seams.install()  # unpickled where nothing was enabled yet

    def made(self, identity: Identity) -> None:
        """From now on say of which model the caches are."""
        self.identity, self._of = identity, identity()

    def __call__(self, max_kv_size: int | None = None) -> list:
        _check_size(max_kv_size)
        name = "" if self.identity is None else self.identity()
        if name != self._of and not self._warned:
            self._warned = True
            stays = "; its calibration is of the weights before" if self.calibrated else ""
            log(
                "warning: the model's weights have changed since its cache was packed first: new "
                f"caches belong to the new ones{stays}. enable() makes it anew"
            )
        made = [
            _pack(c, (i,), self.formats, max_kv_size) for i, c in enumerate(own_caches(self.model))
        ]
        for path, cache in leaves(made):
            if isinstance(cache, PackedCache):
                if path in self.as_arrays:
                    cache.as_arrays = True
                cache.model, cache.alone = name, self.alone
        return made


def make_plan(
    model: nn.Module,
    spec: Spec,
    calibration: CalibrationSet | str | Path | None,
    tokenizer,
    say: Callable[[str], None],
    policy: Mapping[tuple[int, ...], str] | None = None,
) -> tuple[Packing, Report]:
    """Find the layers that can be packed, by running the model without evaluating anything,
    then calibrate them and apply the spec's policy."""
    arguments.instance(
        "calibration", calibration, (CalibrationSet, str, Path), "a CalibrationSet or a file"
    )
    arguments.instance("policy", policy, (Mapping,), "a dict of paths and bits")
    if isinstance(calibration, str | Path):
        calibration = CalibrationSet.load(calibration)
    if calibration is not None and spec.calibrate == "off":
        raise ValueError(f"{spec} says calibrate=off, but a calibration is given.")
    source = vars(model).get("_mlx_kvq_repository")  # attached when the model was loaded
    if calibration is None and spec.calibrate == "auto" and source is not None:
        own_calibration: CalibrationSet | None = source.offered(spec)
        calibration = own_calibration
    report = Report(spec)
    make = Packing(model)
    formats, as_arrays = make.formats, make.as_arrays
    shapes = head_sizes(model, own_caches(model))
    own = dict(leaves(own_caches(model)))
    kinds = kinds_of(shapes)
    for path, cache in own.items():
        layer = path[0]
        if type(cache) not in PACKABLE:
            report.left[layer] = f"{type(cache).__name__} is not a plain key/value cache"
        elif path not in shapes:
            report.left[layer] = "not reached by a forward pass"
        elif kinds[layer].indexed:  # read in longer prompts only than those that are tried below
            report.left[layer] = LATENT if kinds[layer].latent else SPARSE
        else:
            try:
                formats[path] = make_format(spec, *shapes[path][1:])
            except ValueError as error:
                report.left[layer] = str(error)

    seams.install()
    while formats and (failed := first_failure(model, make())):
        path, failure = failed
        alike = [p for p in formats if kinds[p[0]].latent]
        reason = LATENT
        if not alike:
            # Layers of the same kind run the same code.
            alike = [
                p
                for p in formats
                if path and kinds[p[0]] == kinds[path[0]] and shapes[p] == shapes.get(path)
            ]
            if not alike:
                raise ValueError(
                    f"{spec} cannot be used with this model: running it on packed caches raised "
                    f"{type(failure).__name__}: {failure}"
                ) from failure
            if path not in as_arrays:
                as_arrays.update(alike)
                continue
            reason = f"its attention is not mlx-lm's shared one ({type(failure).__name__})"
        for other in alike:
            del formats[other]
            report.left[other[0]] = reason
    if not formats:
        reasons = "; ".join(dict.fromkeys(report.left.values())) or "it makes no caches"
        raise ValueError(f"{spec} cannot pack any layer of this model: {reasons}.")
    # What calibrates is watched in the shared attention function.
    watched = {path: shapes[path] for path in formats if path not in as_arrays}
    if calibration is not None:
        calibration = shards.local(calibration, model, watched)
    elif spec.calibrate == "auto" and watched:
        calibration = automatic.automatic(model, tokenizer, say)
    report.calibration = calibration
    if spec.rounding == "feedback" and (
        calibration is None or any(c.keys.metric is None for c in calibration.layers.values())
    ):
        raise ValueError(f"{spec}: rounding=feedback needs a calibration that holds 'metric'.")
    if policy is None:
        bits = bits_by_spec(spec, formats, report)
    else:
        bits = bits_by_policy(policy, formats, report, model)
    if calibration is not None:
        try:
            calibration.check({path: s for path, s in watched.items() if path in formats})
        except ValueError as error:
            raise ValueError(f"The calibration does not fit this model: {error}") from None
        if (of := calibration.metadata.get("lambda")) not in (None, lambda_of(spec)):
            raise ValueError(
                f"The calibration holds λ for {of}, but {spec} is {lambda_of(spec)}: make one for "
                "it, or one without λ."
            )
    formats.update(_formats(spec, bits, shapes, calibration))
    if spec.budget is not None and policy is None:
        bits = allocate(
            model,
            # Without an exact tail: it would hide much of what is compared.
            lambda bits: _mixed(
                model, _formats(replace(spec, recent=0), bits, shapes, calibration)
            ),
            bits,
            {p: {b: _formats(spec, {p: b}, shapes, None)[p].layout for b in STEPS} for p in bits},
            spec.budget,
            tokenizer,
        )
        formats.update(_formats(spec, bits, shapes, calibration))
    for path, fmt in formats.items():
        report.packed[path[0]] = fmt
        report.left.pop(path[0], None)
        if path in as_arrays:
            report.unpacked.append(path[0])
    report.alone = batch_failure(model, make)
    make.alone, make.calibrated = bool(report.alone), calibration is not None
    sizes = {p: s for p, s in shapes.items() if is_packable(own[p], kinds[p[0]])}
    make.made(Identity(model, sizes))
    return make, report


def _formats(
    spec: Spec,
    bits: dict[tuple[int, ...], str],
    shapes: dict[tuple[int, ...], tuple[int, int, int]],
    calibration: CalibrationSet | None,
) -> dict[tuple[int, ...], Format]:
    formats = {}
    for path, name in bits.items():
        layer = None if calibration is None else calibration.layers.get(path)
        formats[path] = make_format(
            replace(spec, bits=name),
            *shapes[path][1:],
            keys=None if layer is None else layer.keys,
            values=None if layer is None else layer.values,
        )
    return formats


def _mixed(model: nn.Module, formats: dict[tuple[int, ...], Format]) -> list:
    """Caches of which some are packed and the others the model's own."""
    return [_pack(c, (i,), formats, None) for i, c in enumerate(own_caches(model))]


def _pack(cache, path: tuple[int, ...], formats: dict, max_kv_size: int | None):
    if isinstance(cache, stock.CacheList):
        parts = enumerate(cache.caches)
        return stock.CacheList(*(_pack(c, (*path, i), formats, max_kv_size) for i, c in parts))
    fmt = formats.get(path)
    if isinstance(cache, stock.RotatingKVCache) and fmt is not None:
        return PackedRotatingKVCache(fmt, cache.max_size, cache.keep)
    if type(cache) is stock.KVCache and max_kv_size is not None:
        if fmt is None:
            return stock.RotatingKVCache(max_kv_size, KEEP)
        return PackedRotatingKVCache(fmt, max_kv_size, KEEP)
    return cache if fmt is None else PackedKVCache(fmt)
