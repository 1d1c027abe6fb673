"""Switch a model to a packed cache: ``enable``, ``disable`` and ``make_prompt_cache``."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache as cache_once
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as stock

from . import automatic, seams, shards
from .budget import STEPS, allocate
from .cache import PackedKVCache, PackedRotatingKVCache, _PackedCache
from .calibrate import lambda_of
from .calibration import CalibrationSet
from .format import Format, make_format
from .spec import Spec

KEEP = 4  # first tokens kept when max_kv_size bounds a cache, as in mlx-lm


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
    caches of other kinds stay as they are.

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
    parsed = Spec.parse(spec)
    if parsed is None:
        disable(model)
        return None
    say = _say if verbose else automatic.silent
    make, report = _plan(model, parsed, calibration, tokenizer, say, policy)
    seams.install()
    model.make_cache = seams.CacheFactory(make)
    say(str(report))
    return report


def disable(model: nn.Module) -> None:
    """Give the model its own cache back. Does nothing to a model that is not enabled."""
    if isinstance(vars(model).get("make_cache"), seams.CacheFactory):
        del model.make_cache


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
        max_kv_size (int, optional): Bounds every growing layer to so many tokens, of which the
            first 4 are never dropped.
        calibration, tokenizer: As for :func:`enable`.

    Raises:
        ValueError: As :func:`enable`.
    """
    parsed = Spec.parse(spec)
    if parsed is None:
        return _stock_make(model)(max_kv_size)
    make, _ = _plan(model, parsed, calibration, tokenizer, automatic.silent)
    seams.install()
    return make(max_kv_size)


def _stock_make(model: nn.Module) -> Callable[[int | None], list]:
    """What makes the model's caches when it is not enabled."""
    own = getattr(type(model), "make_cache", None)
    if own is not None:
        return lambda max_kv_size: own(model)

    def default(max_kv_size: int | None) -> list:
        if max_kv_size is not None:
            return [stock.RotatingKVCache(max_kv_size, KEEP) for _ in model.layers]
        return [stock.KVCache() for _ in model.layers]

    return default


def _plan(
    model: nn.Module,
    spec: Spec,
    calibration: CalibrationSet | str | Path | None,
    tokenizer,
    say: Callable[[str], None],
    policy: Mapping[tuple[int, ...], str] | None = None,
) -> tuple[Callable[[int | None], list], Report]:
    """Find the layers that can be packed, by running the model without evaluating anything,
    then calibrate them and apply the spec's policy."""
    if isinstance(calibration, str | Path):
        calibration = CalibrationSet.load(calibration)
    if calibration is not None and spec.calibrate == "off":
        raise ValueError(f"{spec} says calibrate=off, but a calibration is given.")
    if calibration is None and spec.calibrate == "auto":
        from . import repository  # which imports this module

        calibration = repository.calibration(model, spec)
    own = _stock_make(model)
    report = Report(spec)
    formats: dict[tuple[int, ...], Format] = {}  # by path in the caches
    shapes = _head_sizes(model, own(None))
    for path, cache in _leaves(own(None)):
        layer = path[0]
        if type(cache) not in (stock.KVCache, stock.RotatingKVCache):
            report.left[layer] = f"{type(cache).__name__} is not a plain key/value cache"
        elif path not in shapes:
            report.left[layer] = "not reached by a forward pass"
        else:
            try:
                formats[path] = make_format(spec, *shapes[path][1:])
            except ValueError as error:
                report.left[layer] = str(error)

    def make(max_kv_size: int | None) -> list:
        caches = own(None)
        made = [_pack(c, (i,), formats, max_kv_size) for i, c in enumerate(caches)]
        for path, cache in _leaves(made):
            if path in as_arrays and isinstance(cache, _PackedCache):
                cache.as_arrays = True
        return made

    as_arrays: set[tuple[int, ...]] = set()
    seams.install()
    while formats and (failed := _first_failure(model, make(None))):
        path, failure = failed
        # Beside a latent cache there may be one of an indexer, which is read apart as well, in
        # prompts longer than those that are tried here.
        latent = {p[0] for p in formats if shapes[p][0] == 1 and shapes[p][1] != shapes[p][2]}
        reason = "latent attention (MLA), whose cache is small already"
        # Layers of the same shape run the same code.
        alike = [
            p for p in formats if (p[0] in latent if latent else shapes[p] == shapes.get(path))
        ]
        if not alike:
            raise ValueError(
                f"{spec} cannot be used with this model: running it on packed caches raised "
                f"{type(failure).__name__}: {failure}"
            ) from failure
        if not latent:
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
            lambda bits: _mixed(own, _formats(replace(spec, recent=0), bits, shapes, calibration)),
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
    name = cache_once(lambda: automatic.identity(model))

    def made_for_this_model(max_kv_size: int | None) -> list:
        caches = make(max_kv_size)
        for _, cache in _leaves(caches):
            if isinstance(cache, _PackedCache):
                cache.model = name()
                cache.alone = bool(report.alone)
        return caches

    return made_for_this_model, report


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


def _mixed(own: Callable[[int | None], list], formats: dict[tuple[int, ...], Format]) -> list:
    """Caches of which some are packed and the others the model's own."""
    return [_pack(c, (i,), formats, None) for i, c in enumerate(own(None))]


def packable(
    model: nn.Module,
) -> tuple[Callable[[], list], dict[tuple[int, ...], tuple[int, int, int]]]:
    """What makes the model's own caches, and (Hkv, Dk, Dv) of each that a spec could pack."""
    own = _stock_make(model)
    kinds = {path: type(cache) for path, cache in _leaves(own(None))}
    sizes = _head_sizes(model, own(None))
    packed = (stock.KVCache, stock.RotatingKVCache)
    return lambda: own(None), {p: s for p, s in sizes.items() if kinds[p] in packed}


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
        singles.append(make(None))
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
