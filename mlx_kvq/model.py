"""Switch a model to a packed cache: ``enable``, ``disable`` and ``make_prompt_cache``."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as stock

from . import arguments, automatic, seams, shards
from .budget import STEPS, allocate
from .cache import PackedKVCache, PackedRotatingKVCache, _PackedCache
from .calibrate import lambda_of
from .calibration import CalibrationSet
from .format import Format, make_format
from .seams import KEEP, CacheFactory, factory_of, own_caches, same_layers
from .spec import Spec

PACKABLE = (stock.KVCache, stock.RotatingKVCache)
LATENT = "latent attention (MLA), whose cache is small already"
SPARSE = "sparse attention, which reads the arrays of its caches"


@dataclass
class Report:
    """What a spec does to a model's caches.

    Args:
        spec (Spec): What was asked for.
        packed (dict): Layer -> format, for every packed layer.
        left (dict): Layer -> why its cache stays as it is.
        unpacked (list): Packed layers that attend on their own, not through mlx-lm's shared
            function, and get keys and values unpacked for it.
        calibration (CalibrationSet, optional): What the packed layers were calibrated with.
        alone (str): Why the model answers one request at a time: what it raises in a batch.
    """

    spec: Spec
    packed: dict[int, Format] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)
    unpacked: list[int] = field(default_factory=list)
    calibration: CalibrationSet | None = None
    alone: str = ""

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value over the packed layers, scales included."""
        bits = sum(32 * f.layout.words for f in self.packed.values())
        return bits / sum(f.layout.k_dim + f.layout.v_dim for f in self.packed.values())

    @property
    def compression(self) -> float:
        """fp16 bytes over packed bytes, in the packed layers; the exact tail, a few tokens for each
        sequence, comes to them."""
        return 16 / self.bits_per_value

    def __str__(self) -> str:
        layers = len(set(self.packed) | set(self.left))
        line = (
            f"{self.spec}: packed {len(self.packed)} of {layers} layers, "
            f"{self.bits_per_value:.2f} bits per value, "
            f"{self.compression:.2f}x smaller than fp16, "
        )
        if self.spec.recent:
            line += f"the newest {self.spec.recent} tokens exact, "
        if self.calibration is None:
            line += "not calibrated"
        else:
            line += f"calibrated ({self.calibration.metadata.get('text', 'given')})"
        for bits in dict.fromkeys(f.spec.bits for f in self.packed.values()):
            which = [i for i, f in self.packed.items() if f.spec.bits == bits]
            if bits != self.spec.bits:
                line += f"; {bits} in {_ranges(which)}"
        if self.unpacked:
            line += f"; unpacked to attend, without the shared function: {_ranges(self.unpacked)}"
        if self.alone:
            line += f"; not in batches, where the model itself raises {self.alone}"
        reasons: dict[str, list[int]] = {}
        for layer, reason in self.left.items():
            reasons.setdefault(reason, []).append(layer)
        for reason, which in reasons.items():
            line += f"; left {_ranges(which)}: {reason}"
        return line


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
    caches of other kinds stay as they are. A wrapper and the language model in it are enabled
    together. Weights that change afterwards are noticed with the next cache: one warning, and
    what is saved from then on belongs to the new weights.

    Args:
        model (nn.Module): A model from ``mlx_lm.load``.
        spec (str or Spec): For example ``"int4-srft"``; ``"fp16"`` is :func:`disable`.
        calibration (CalibrationSet or path, optional): From :func:`mlx_kvq.calibrate`. Without
            one a converted repository's own is used (``mlx_kvq.repository``); any other model
            is calibrated on a built-in text, once: the result is kept in the user's cache
            directory (``mlx_kvq.automatic``). ``calibrate=off`` in the spec leaves
            calibration out.
        tokenizer (optional): For that text; without it random tokens are used.
        policy (dict, optional): Path of every cache to pack -> ``"int4"``, ``"k8v4"`` or
            ``"int8"``, in place of what ``skip``, ``high`` and ``budget`` of the spec say.
        verbose (bool): Print one line to stderr that says what was applied.

    Returns:
        Report: What was packed and what was left; ``None`` for ``"fp16"``.

    Raises:
        ValueError: If the spec is not valid, nothing in this model can be packed, or the
            calibration is not one of this model.
    """
    arguments.model(model)
    parsed = Spec.parse(spec)
    if parsed is None:
        disable(model)
        return None
    say = _say if verbose else automatic.silent
    packing, report = _plan(model, parsed, calibration, tokenizer, say, policy)
    seams.install()
    disable(model)
    holders: list = []
    for part in (model, *same_layers(model)):
        part.make_cache = CacheFactory(packing, part, holders)
    say(str(report))
    return report


def disable(model: nn.Module) -> None:
    """Give the model, and the other half of a wrapper, its own cache back. Does nothing to a model
    that is not enabled."""
    while (factory := factory_of(model)) is not None:
        for part in factory.holders:
            if getattr(vars(part).get("make_cache"), "holders", None) is factory.holders:
                del part.make_cache


def _say(line: str) -> None:
    print(f"[mlx_kvq] {line}", file=sys.stderr)


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
        model (nn.Module): A model from ``mlx_lm.load``.
        spec (str or Spec): For example ``"int4-srft"``.
        max_kv_size (int, optional): Bounds every growing layer to so many tokens, at least 1,
            of which the first 4 are never dropped.
        calibration, tokenizer: As for :func:`enable`.

    Raises:
        ValueError: As :func:`enable`.
    """
    arguments.model(model)
    parsed = Spec.parse(spec)
    _check_size(max_kv_size)
    if parsed is None:
        return own_caches(model, max_kv_size)
    packing, _ = _plan(model, parsed, calibration, tokenizer, automatic.silent)
    seams.install()
    return packing(max_kv_size)


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
    identity: automatic.Identity | None = None
    _of: str = ""  # the identity that it was made for
    _warned: bool = False

    def made(self, identity: automatic.Identity) -> None:
        """From now on say of which model the caches are."""
        self.identity, self._of = identity, identity()

    def __call__(self, max_kv_size: int | None = None) -> list:
        _check_size(max_kv_size)
        name = "" if self.identity is None else self.identity()
        if name != self._of and not self._warned:
            self._warned = True
            stays = "; its calibration is of the weights before" if self.calibrated else ""
            _say(
                "warning: the model's weights have changed since its cache was packed first: new "
                f"caches belong to the new ones{stays}. enable() makes it anew"
            )
        made = [
            _pack(c, (i,), self.formats, max_kv_size) for i, c in enumerate(own_caches(self.model))
        ]
        for path, cache in _leaves(made):
            if isinstance(cache, _PackedCache):
                if path in self.as_arrays:
                    cache.as_arrays = True
                cache.model, cache.alone = name, self.alone
        return made


def _plan(
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
    if calibration is None and spec.calibrate == "auto":
        from . import repository  # which imports this module

        calibration = repository.calibration(model, spec)
    report = Report(spec)
    make = Packing(model)
    formats, as_arrays = make.formats, make.as_arrays
    shapes = _head_sizes(model, own_caches(model))
    own = dict(_leaves(own_caches(model)))
    kinds = _kinds(shapes)
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
    while formats and (failed := _first_failure(model, make())):
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
        bits = _policy(spec, formats, report)
    else:
        bits = _given(policy, formats, report, model)
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
    report.alone = _batch_failure(model, make)
    make.alone, make.calibrated = bool(report.alone), calibration is not None
    sizes = {p: s for p, s in shapes.items() if _is_packable(own[p], kinds[p[0]])}
    make.made(automatic.Identity(model, sizes))
    return make, report


@dataclass(frozen=True)
class _Kind:
    """What tells layers apart that run different code: the sizes of their caches."""

    sizes: tuple[tuple[int, int, int], ...]

    @property
    def latent(self) -> bool:
        """Whether keys and values are one latent vector and a position, in a single head."""
        heads, keys, values = self.sizes[0]
        return heads == 1 and keys != values

    @property
    def indexed(self) -> bool:
        """Whether a second cache, of a single head, says which tokens are read."""
        return len(self.sizes) > 1 and self.sizes[1][0] == 1 and self.sizes[1] != self.sizes[0]


def _is_packable(cache: object, kind: _Kind) -> bool:
    return type(cache) in PACKABLE and not kind.indexed


def _kinds(shapes: Mapping[tuple[int, ...], tuple[int, int, int]]) -> dict[int, _Kind]:
    """Layer -> its kind."""
    sizes: dict[int, list[tuple[int, int, int]]] = {}
    for path in sorted(shapes):
        sizes.setdefault(path[0], []).append(shapes[path])
    return {layer: _Kind(tuple(s)) for layer, s in sizes.items()}


def _policy(
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
                f"packed are {_ranges(layers)}."
            )
    for path in [p for p in formats if p[0] in chosen["skip"]]:
        del formats[path]
        report.left[path[0]] = "skipped"
    if not formats:
        raise ValueError(f"{spec} skips every layer: use 'fp16'.")
    return {path: "int8" if path[0] in chosen["high"] else spec.bits for path in formats}


def _given(
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


def packable(
    model: nn.Module,
) -> tuple[Callable[[], list], dict[tuple[int, ...], tuple[int, int, int]]]:
    """What makes the model's own caches, and (Hkv, Dk, Dv) of each that a spec could pack."""
    own = dict(_leaves(own_caches(model)))
    sizes = _head_sizes(model, own_caches(model))
    kinds = _kinds(sizes)
    could = {p: s for p, s in sizes.items() if _is_packable(own[p], kinds[p[0]])}
    return lambda: own_caches(model), could


def _leaves(caches, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], object]]:
    """Every single cache with its path: (layer,) or (layer, place in a CacheList)."""
    for i, cache in enumerate(caches):
        if isinstance(cache, stock.CacheList):
            yield from _leaves(cache.caches, (*path, i))
        else:
            yield (*path, i), cache


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


def _watch(caches, seen: Callable) -> None:
    """Call ``seen(path, keys, values)`` before each update of a cache."""
    for path, cache in _leaves(caches):
        if (update := getattr(cache, "update_and_fetch", None)) is None:
            continue

        def watched(keys, values, path=path, update=update):
            seen(path, keys, values)
            return update(keys, values)

        cache.update_and_fetch = watched  # type: ignore[attr-defined]


def _head_sizes(model: nn.Module, caches: list) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """(Hkv, Dk, Dv) of every cache that one token reaches; builds the graph, evaluates nothing."""
    sizes: dict[tuple[int, ...], tuple[int, int, int]] = {}

    def seen(path, keys, values):
        sizes[path] = (keys.shape[1], keys.shape[-1], values.shape[-1])

    _watch(caches, seen)
    model(mx.array([[0]]), cache=caches)
    return sizes


def _first_failure(model: nn.Module, caches: list) -> tuple[tuple[int, ...], Exception] | None:
    """The cache after whose update the model raises, if it does on a prompt, a chunk, a token."""
    last: list[tuple[int, ...]] = [()]
    _watch(caches, lambda path, keys, values: last.__setitem__(0, path))
    try:
        for tokens in ([0, 0], [0, 0], [0]):
            model(mx.array([tokens]), cache=caches)
    except Exception as error:
        return last[0], error
    return None


def _batch_failure(model: nn.Module, make: Callable) -> str:
    """What the model raises on three sequences together, if mlx-lm's server would try that."""
    singles = []
    for length in (3, 1, 2):
        singles.append(make())
        model(mx.array([[0] * length]), cache=singles[-1])
    if not all(hasattr(cache, "merge") for cache in singles[0]):
        return ""
    try:
        batch = [caches[0].merge(list(caches)) for caches in zip(*singles, strict=True)]
        model(mx.array([[0]] * 3), cache=batch)
    except Exception as error:
        return type(error).__name__
    return ""


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
