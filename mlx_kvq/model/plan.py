"""From a spec to packed caches: which caches of a model are packed, and in which format."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import mlx.nn as nn

from .. import arguments, ops, stock
from ..caches import seams
from ..caches.packed import PackedCache
from ..caches.rotating import PackedRotatingKVCache
from ..caches.single import PackedKVCache
from ..calibration import automatic, shards
from ..calibration.fit import lambda_of
from ..calibration.set import CalibrationSet, LayerCalibration
from ..format.format import Format, make_format
from ..format.spec import Spec
from ..host import bounded, is_growing, is_rotating
from ..stock import CachePath, Identity, Shapes, leaves, own_caches
from .bits import allocate, bits_by_policy, bits_by_spec, costs, room_of, steps_from
from .report import Report, log
from .trial import batch_failure, first_failure

LATENT = "latent attention (MLA), whose cache is small already"
SPARSE = "sparse attention, which reads the arrays of its caches"


@dataclass
class Packing:
    """Makes the caches of an enabled model, packed where they can be."""

    model: nn.Module
    formats: dict[CachePath, Format] = field(default_factory=dict)
    # Layers that attend without mlx-lm's shared function.
    as_arrays: set[CachePath] = field(default_factory=set)
    alone: bool = False  # the model itself fails in a batch
    calibrated: bool = False
    identity: Identity | None = None  # of the model, for the caches' files
    made_for: str = ""  # ``identity()`` when the formats were made
    _warned: bool = False

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        seams.install(self.model)  # unpickled where nothing was enabled yet

    def __call__(self, max_kv_size: int | None = None) -> list:
        arguments.integer("max_kv_size", max_kv_size, optional=True)
        identity = "" if self.identity is None else self.identity()
        if identity != self.made_for and not self._warned:
            self._warned = True
            stays = "; its calibration is of the weights before" if self.calibrated else ""
            log(
                "warning: the model's weights have changed since its cache was packed first: new "
                f"caches belong to the new ones{stays}. enable() makes it anew"
            )
        made = pack_caches(own_caches(self.model), self.formats, max_kv_size)
        for path, cache in leaves(made):
            if isinstance(cache, PackedCache):
                if path in self.as_arrays:
                    cache.as_arrays = True
                cache.model, cache.alone = identity, self.alone
        return made


def pack_caches(
    caches: list, formats: Mapping[CachePath, Format], max_kv_size: int | None = None
) -> list:
    """Empty caches in place of a model's own ones: packed at the paths in ``formats``, growing
    ones bounded by ``max_kv_size``."""

    def packed(path: CachePath, cache):
        if is_growing(cache) and max_kv_size is not None:
            cache = bounded(cache, max_kv_size, stock.KEEP)
        if (fmt := formats.get(path)) is None:
            return cache
        if is_rotating(cache):
            return PackedRotatingKVCache(fmt, cache.max_size, cache.keep)
        return PackedKVCache(fmt)

    return stock.map_leaves(packed, caches)


def make_plan(
    model: nn.Module,
    spec: Spec,
    calibration: CalibrationSet | str | Path | None,
    tokenizer,
    say: Callable[[str], None],
    policy: Mapping[CachePath, str] | None = None,
) -> tuple[Packing, Report]:
    """How ``spec`` packs the caches of ``model``; arguments and errors of
    :func:`mlx_kvq.enable`."""
    given = _given_calibration(model, spec, calibration)
    arguments.instance("policy", policy, (Mapping,), "a dict of paths and bits")
    plan = _Plan(model, spec)
    plan.find_packable()
    plan.leave_failing()
    plan.choose_bits(policy)
    plan.calibrate(given, tokenizer, say)
    plan.choose_rounding()
    plan.check_calibration()
    plan.packing.formats = plan.formats_of(plan.bits)
    if spec.budget is not None and policy is None:
        plan.spend_budget(tokenizer, say is not automatic.silent)
    plan.finish()
    return plan.packing, plan.report


def _given_calibration(model, spec: Spec, calibration) -> CalibrationSet | None:
    """The calibration given, or that of the repository the model was loaded from."""
    arguments.instance(
        "calibration", calibration, (CalibrationSet, str, Path), "a CalibrationSet or a file"
    )
    if isinstance(calibration, str | Path):
        calibration = CalibrationSet.load(calibration)
    if calibration is not None and spec.calibrate == "off":
        raise ValueError(f"{spec} says calibrate=off, but a calibration is given.")
    source = vars(model).get("_mlx_kvq_repository")  # attached when the model was loaded
    if calibration is None and spec.calibrate == "auto" and source is not None:
        return source.offered(spec)
    return calibration


class _Plan:
    """The steps of :func:`make_plan` and their results."""

    def __init__(self, model: nn.Module, spec: Spec):
        self.model, self.spec = model, spec
        self.report, self.packing = Report(spec), Packing(model)
        self.own = dict(leaves(own_caches(model)))
        self.shapes = stock.head_sizes(model, own_caches(model))
        self.kinds = stock.kinds_of(self.shapes)
        self.bits: dict[CachePath, str] = {}
        self.calibration: CalibrationSet | None = None

    def find_packable(self) -> None:
        """A first format for every cache whose class and head sizes allow one."""
        for path, cache in self.own.items():
            reason = self._why_not(path, cache)
            if not reason:
                try:
                    self.packing.formats[path] = self._format(path, self.spec)
                except ValueError as error:
                    reason = str(error)
            if reason:
                self.report.left[path[0]] = reason

    def _why_not(self, path: CachePath, cache) -> str:
        if not (is_growing(cache) or is_rotating(cache)):
            return f"{type(cache).__name__} is not a plain key/value cache"
        if path not in self.shapes:
            return "not reached by a forward pass"
        kind = self.kinds[path[0]]
        if kind.indexed:  # only prompts longer than those of the trial run show it
            return LATENT if kind.latent else SPARSE
        return ""

    def leave_failing(self) -> None:
        """Try the model on packed caches. Layers that fail are given arrays to attend to, and keep
        their own caches if they fail again."""
        seams.install(self.model)
        formats, as_arrays = self.packing.formats, self.packing.as_arrays
        while formats and (failed := first_failure(self.model, self.packing())):
            path, error = failed
            latent = [p for p in formats if self.kinds[p[0]].latent]
            if latent:
                self._leave(latent, LATENT)
            elif not (alike := self._alike(path)):
                raise ValueError(
                    f"{self.spec} cannot be used with this model: running it on packed caches "
                    f"raised {type(error).__name__}: {error}"
                ) from error
            elif path not in as_arrays:
                as_arrays.update(alike)
            else:
                shared = f"its attention is not mlx-lm's shared one ({type(error).__name__})"
                self._leave(alike, shared)
        if not formats:
            reasons = "; ".join(dict.fromkeys(self.report.left.values())) or "it makes no caches"
            raise ValueError(f"{self.spec} cannot pack any layer of this model: {reasons}.")

    def _alike(self, path: CachePath) -> list[CachePath]:
        """The packed caches that the same code reads."""
        if not path:
            return []
        same = (self.kinds[path[0]], self.shapes.get(path))
        return [p for p in self.packing.formats if (self.kinds[p[0]], self.shapes[p]) == same]

    def _leave(self, paths: list[CachePath], reason: str) -> None:
        for path in paths:
            del self.packing.formats[path]
            self.report.left[path[0]] = reason

    def calibrate(self, given: CalibrationSet | None, tokenizer, say) -> None:
        """The part of a given calibration that this rank needs, or an automatic one."""
        if given is not None:
            self.calibration = shards.local(given, self.model, self._to_calibrate())
        elif self.spec.calibrate == "auto" and self._to_calibrate():
            self.calibration = automatic.automatic(self.model, tokenizer, say)
        self.report.calibration = self.calibration

    def choose_rounding(self) -> None:
        """``rounding=auto`` becomes ``feedback`` where that costs little."""
        layers = () if self.calibration is None else self.calibration.layers.values()
        possible = bool(layers) and all(layer.keys.metric is not None for layer in layers)
        if self.spec.rounding == "feedback" and not possible:
            raise ValueError(
                f"{self.spec}: rounding=feedback needs a calibration that holds 'metric'."
            )
        fused = all(map(ops.feeds_back, self.packing.formats.values()))
        if self.spec.rounding == "auto" and possible and fused:
            self.spec = replace(self.spec, rounding="feedback")

    def _to_calibrate(self) -> Shapes:
        """Shapes of the packed caches read by the shared attention function, where calibrating
        watches."""
        paths = [p for p in self.packing.formats if p not in self.packing.as_arrays]
        return {path: self.shapes[path] for path in paths}

    def choose_bits(self, policy: Mapping[CachePath, str] | None) -> None:
        """The bits of every cache; a cache without bits keeps 16."""
        paths = list(self.packing.formats)
        if policy is None:
            self.bits = bits_by_spec(self.spec, paths)
        else:
            self.bits = bits_by_policy(policy, paths, self.report, self.model)
        self._leave([p for p in paths if p not in self.bits], "skipped")

    def check_calibration(self) -> None:
        if self.calibration is None:
            return
        try:
            self.calibration.check(self._to_calibrate())
        except ValueError as error:
            raise ValueError(f"The calibration does not fit this model: {error}") from None
        wanted, found = lambda_of(self.spec), self.calibration.metadata.get("lambda")
        if found not in (None, wanted):
            raise ValueError(
                f"The calibration holds λ for {found}, but {self.spec} is {wanted}: make one for "
                "it, or one without λ."
            )

    def formats_of(self, bits: Mapping[CachePath, str], **changes) -> dict[CachePath, Format]:
        """Calibrated formats with these bits, and ``changes`` of the spec."""
        calibrated = {} if self.calibration is None else self.calibration.layers
        formats = {}
        for path, name in bits.items():
            spec = replace(self.spec, bits=name, **changes)
            c = calibrated.get(path, LayerCalibration())
            formats[path] = self._format(path, spec, keys=c.keys, values=c.values)
        return formats

    def _format(self, path: CachePath, spec: Spec, **calibrations) -> Format:
        window = getattr(self.own[path], "max_size", None)
        return make_format(spec, *self.shapes[path][1:], window=window, **calibrations)

    def spend_budget(self, tokenizer, progress: bool) -> None:
        """More bits where they lower the error most."""
        assert self.spec.budget is not None
        formats = {path: self._steps(path, least) for path, least in self.bits.items()}
        layouts = {p: {s: f.layout for s, f in steps.items()} for p, steps in formats.items()}
        room = room_of(self.spec.budget, self.bits, layouts)
        shapes = {path: self.shapes[path] for path in formats}
        own = partial(own_caches, self.model)
        apart = self.packing.as_arrays
        cost = costs(self.model, own, shapes, formats, apart, tokenizer, progress)
        self.packing.formats = self.formats_of(allocate(self.bits, layouts, cost, room))

    def _steps(self, path: CachePath, least: str) -> dict[str, Format]:
        """Formats of a cache with more and more bits; 3 and 5 bits cannot pack every head size."""
        formats = {least: self.packing.formats[path]}
        for bits in steps_from(least)[1:]:
            with suppress(ValueError):
                formats[bits] = self.formats_of({path: bits})[path]
        return formats

    def finish(self) -> None:
        """Complete the report, try a batch and note the model's identity."""
        report, packing = self.report, self.packing
        for path, fmt in packing.formats.items():
            report.packed[path[0]] = fmt
            report.left.pop(path[0], None)
        report.unpacked += [path[0] for path in packing.formats if path in packing.as_arrays]
        report.alone = batch_failure(self.model, packing)
        packing.alone, packing.calibrated = bool(report.alone), self.calibration is not None
        packing.identity = Identity(self.model, stock.packable_shapes(self.own, self.shapes))
        packing.made_for = packing.identity()
