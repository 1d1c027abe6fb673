"""Switch a model to a packed cache: ``enable``, ``disable`` and ``make_prompt_cache``."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as stock

from . import seams
from .cache import PackedKVCache, PackedRotatingKVCache
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
    """

    spec: Spec
    packed: dict[int, Format] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value over the packed layers, scales included."""
        bits = sum(32 * f.layout.words for f in self.packed.values())
        return bits / sum(f.layout.k_dim + f.layout.v_dim for f in self.packed.values())

    @property
    def compression(self) -> float:
        """fp16 bytes over packed bytes, in the packed layers."""
        return 16 / self.bits_per_value

    def __str__(self) -> str:
        layers = len(set(self.packed) | set(self.left))
        line = (
            f"{self.spec}: packed {len(self.packed)} of {layers} layers, "
            f"{self.bits_per_value:.2f} bits per value, "
            f"{self.compression:.2f}x smaller than fp16"
        )
        reasons: dict[str, list[int]] = {}
        for layer, reason in self.left.items():
            reasons.setdefault(reason, []).append(layer)
        for reason, which in reasons.items():
            line += f"; left {_ranges(which)}: {reason}"
        return line


def enable(model: nn.Module, spec: str | Spec, *, verbose: bool = True) -> Report | None:
    """Make every mlx-lm entry point use a packed cache for this model.

    Layers with a ``KVCache`` get a packed growing cache, sliding layers a packed rotating one;
    caches of other kinds stay as they are.

    Args:
        model (nn.Module): A model from ``mlx_lm.load``.
        spec (str or Spec): For example ``"int4-srft"``; ``"fp16"`` is :func:`disable`.
        verbose (bool): Print one line to stderr that says what was applied.

    Returns:
        Report: What was packed and what was left; ``None`` for ``"fp16"``.

    Raises:
        ValueError: If the spec is not valid, or nothing in this model can be packed.
    """
    parsed = Spec.parse(spec)
    if parsed is None:
        disable(model)
        return None
    make, report = _plan(model, parsed)
    seams.install()
    model.make_cache = seams.CacheFactory(make)
    if verbose:
        print(f"[mlx_kvq] {report}", file=sys.stderr)
    return report


def disable(model: nn.Module) -> None:
    """Give the model its own cache back. Does nothing to a model that is not enabled."""
    if isinstance(vars(model).get("make_cache"), seams.CacheFactory):
        del model.make_cache


def make_prompt_cache(
    model: nn.Module, spec: str | Spec, max_kv_size: int | None = None
) -> list[stock._BaseCache]:
    """A packed prompt cache for one conversation, without enabling the model.

    Args:
        model (nn.Module): A model from ``mlx_lm.load``.
        spec (str or Spec): For example ``"int4-srft"``.
        max_kv_size (int, optional): Bounds every growing layer to so many tokens, of which the
            first 4 are never dropped.

    Raises:
        ValueError: As :func:`enable`.
    """
    parsed = Spec.parse(spec)
    if parsed is None:
        return _stock_make(model)(max_kv_size)
    make, _ = _plan(model, parsed)
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


def _plan(model: nn.Module, spec: Spec) -> tuple[Callable[[int | None], list], Report]:
    """Find the layers that can be packed, by running the model without evaluating anything."""
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
                formats[path] = make_format(spec, *shapes[path])
            except ValueError as error:
                report.left[layer] = str(error)

    def make(max_kv_size: int | None) -> list:
        caches = own(None)
        return [_pack(c, (i,), formats, max_kv_size) for i, c in enumerate(caches)]

    seams.install()
    while formats and (failed := _first_failure(model, make(None))):
        path, failure = failed
        reason = f"its attention is not mlx-lm's shared one ({type(failure).__name__})"
        if path not in formats:
            raise ValueError(
                f"{spec} cannot be used with this model: running it on packed caches raised "
                f"{type(failure).__name__}: {failure}"
            ) from failure
        # Layers of the same shape run the same code.
        for other in [p for p in formats if shapes[p] == shapes[path]]:
            del formats[other]
            report.left[other[0]] = reason
    if not formats:
        reasons = "; ".join(dict.fromkeys(report.left.values())) or "it makes no caches"
        raise ValueError(f"{spec} cannot pack any layer of this model: {reasons}.")
    for path, fmt in formats.items():
        report.packed[path[0]] = fmt
        report.left.pop(path[0], None)
    return make, report


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


def _head_sizes(model: nn.Module, caches: list) -> dict[tuple[int, ...], tuple[int, int]]:
    """(Dk, Dv) of every cache that one token reaches; builds the graph, evaluates nothing."""
    sizes: dict[tuple[int, ...], tuple[int, int]] = {}

    def seen(path, keys, values):
        sizes[path] = (keys.shape[-1], values.shape[-1])

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


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
