"""mlx-lm's own models and caches: the leaves of a list, packable ones, head sizes, identity."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as stock

PACKABLE = (stock.KVCache, stock.RotatingKVCache)


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


def is_packable(cache: object, kind: _Kind) -> bool:
    return type(cache) in PACKABLE and not kind.indexed


def kinds_of(shapes: Mapping[tuple[int, ...], tuple[int, int, int]]) -> dict[int, _Kind]:
    """Layer -> its kind."""
    sizes: dict[int, list[tuple[int, int, int]]] = {}
    for path in sorted(shapes):
        sizes.setdefault(path[0], []).append(shapes[path])
    return {layer: _Kind(tuple(s)) for layer, s in sizes.items()}


def packable(
    model: nn.Module,
) -> tuple[Callable[[], list], dict[tuple[int, ...], tuple[int, int, int]]]:
    """What makes the model's own caches, and (Hkv, Dk, Dv) of each that a spec could pack."""
    own = dict(leaves(own_caches(model)))
    sizes = head_sizes(model, own_caches(model))
    kinds = kinds_of(sizes)
    could = {p: s for p, s in sizes.items() if is_packable(own[p], kinds[p[0]])}
    return lambda: own_caches(model), could


def leaves(caches, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], object]]:
    """Every single cache with its path: (layer,) or (layer, place in a CacheList)."""
    for i, cache in enumerate(caches):
        if isinstance(cache, stock.CacheList):
            yield from leaves(cache.caches, (*path, i))
        else:
            yield (*path, i), cache


def watch(caches, seen: Callable) -> None:
    """Call ``seen(path, keys, values)`` before each update of a cache."""
    for path, cache in leaves(caches):
        if (update := getattr(cache, "update_and_fetch", None)) is None:
            continue

        def watched(keys, values, path=path, update=update):
            seen(path, keys, values)
            return update(keys, values)

        cache.update_and_fetch = watched  # type: ignore[attr-defined]


def head_sizes(model: nn.Module, caches: list) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """(Hkv, Dk, Dv) of every cache that one token reaches; builds the graph, evaluates nothing."""
    sizes: dict[tuple[int, ...], tuple[int, int, int]] = {}

    def seen(path, keys, values):
        sizes[path] = (keys.shape[1], keys.shape[-1], values.shape[-1])

    watch(caches, seen)
    model(mx.array([[0]]), cache=caches)
    return sizes


_own = threading.local()  # .model: whose own caches this thread is making


class CacheFactory:
    """``model.make_cache`` of an enabled model, and of what has the same layers.

    Args:
        make: Called with ``max_kv_size`` (int or None); returns the list of caches.
        model (nn.Module, optional): Has this as its ``make_cache``.
        holders (list): All that have one with the same ``make``.
    """

    def __init__(
        self, make: Callable[[int | None], list], model: Any = None, holders: list | None = None
    ):
        self.make, self.model = make, model
        self.holders = [] if holders is None else holders
        self.holders.append(model)

    def __call__(self, max_kv_size: int | None = None) -> list:
        if getattr(_own, "making", False):  # for a wrapper, which asks its language model
            return own_caches(self.model, max_kv_size)
        return self.make(max_kv_size)


def own_caches(model: nn.Module, max_kv_size: int | None = None) -> list:
    """What mlx-lm makes for a model that is not enabled."""
    make = getattr(type(model), "make_cache", None)
    if make is not None:
        with _making_own():
            return make(model)
    if max_kv_size is not None:
        return [stock.RotatingKVCache(max_kv_size, KEEP) for _ in model.layers]
    return [stock.KVCache() for _ in model.layers]


KEEP = 4  # first tokens kept when max_kv_size bounds a cache, as in mlx-lm, whatever the bound


@contextmanager
def _making_own() -> Iterator[None]:
    before = getattr(_own, "making", False)
    _own.making = True
    try:
        yield
    finally:
        _own.making = before


def factory_of(model: Any) -> CacheFactory | None:
    """What makes the caches of an enabled model; None if neither it nor what it wraps is."""
    for part in (model, *same_layers(model)):
        factory = getattr(part, "__dict__", {}).get("make_cache")
        if isinstance(factory, CacheFactory):
            return factory
    return None


def same_layers(model: Any) -> Iterator[nn.Module]:
    """The modules in ``model`` whose ``layers`` are the model's: the language model in a wrapper,
    and the stack of layers in that."""
    layers = _layers(model)
    if layers is None or not isinstance(model, nn.Module):
        return
    for part in model.children().values():
        if isinstance(part, nn.Module) and _layers(part) == layers:
            yield part
            yield from same_layers(part)


def _layers(model: Any) -> list[int] | None:
    try:
        return [id(layer) for layer in model.layers]
    except (AttributeError, TypeError):
        return None


SAMPLES = 16  # values of a tensor that go into the hash
VERSION = 2  # of what is done here; another one does not read our files
Sizes = Mapping[tuple[int, ...], tuple[int, int, int]]  # path of a cache -> (Hkv, Dk, Dv)


def identity(model: nn.Module, sizes: Sizes | None = None) -> str:
    """Hash of a model's weights by names, shapes and a few values of each, and of the caches it
    makes; 24 hex digits.

    The same for a model in fp16, bf16 or fp32 as long as the values are the same, and for either
    half of a wrapper whose other half is enabled.

    Args:
        model (nn.Module): A model from ``mlx_lm.load``.
        sizes (dict, optional): Of its caches, if they are known.
    """
    if (factory := factory_of(model)) is not None:
        model = factory.holders[0] or model  # what enable() was called with
    sizes = packable(model)[1] if sizes is None else sizes
    digest = hashlib.sha256(f"{VERSION}{sizes}".encode())
    weights: list[tuple[str, mx.array]] = sorted(tree_flatten(model.parameters()))  # type: ignore
    picks = []
    for _, w in weights:
        flat = w.flatten()
        where = np.linspace(0, w.size - 1, min(SAMPLES, w.size)).astype(np.uint32)
        picks.append(flat[mx.array(where)].astype(mx.float32))
    mx.eval(picks)
    for (name, w), values in zip(weights, picks, strict=True):
        digest.update(f"{name}{w.shape}".encode() + np.array(values).tobytes())
    for name, module in sorted(model.named_modules()):
        if "lora_a" in module:  # multiplied with the weights, and no parameter
            digest.update(f"{name} {getattr(module, 'scale', None)}".encode())
    return digest.hexdigest()[:24]


class Identity:
    """The identity of a model as it is now, hashed again if arrays were exchanged meanwhile, as
    all of mlx does: 1 ms for 700 parameters. Not seen: an array that is written into."""

    def __init__(self, model: nn.Module, sizes: Sizes):
        self.model, self.sizes = model, sizes
        self._seen: list = []
        self._name = ""

    def __call__(self) -> str:
        held: list = []
        for _, module in self.model.named_modules():
            held.extend(v for v in module.values() if isinstance(v, mx.array))
            if "lora_a" in module:
                held.append(getattr(module, "scale", None))
        if len(held) != len(self._seen) or any(
            (old() if isinstance(old, ref) else old) is not new
            for old, new in zip(self._seen, held, strict=True)
        ):
            self._name = identity(self.model, self.sizes)
            self._seen = [ref(a) if isinstance(a, mx.array) else a for a in held]
        return self._name

    def __getstate__(self) -> dict:
        return {**vars(self), "_seen": []}
