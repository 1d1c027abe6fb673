"""mlx-lm's own models and caches: the leaves of a list, packable ones, head sizes, identity."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .host import cache_module, is_growing, is_list, is_rotating

KEEP = 4  # first tokens that a cache with max_kv_size never drops, as in mlx-lm

CachePath = tuple[int, ...]  # (layer,) or (layer, place in a CacheList)
Shape = tuple[int, int, int]  # (Hkv, Dk, Dv)
Shapes = Mapping[CachePath, Shape]


class Kind(tuple[Shape, ...]):
    """The shapes of a layer's caches. Layers of one kind run the same code."""

    @property
    def latent(self) -> bool:
        """Whether keys and values are one latent vector and a position, in a single head."""
        heads, keys, values = self[0]
        return heads == 1 and keys != values

    @property
    def indexed(self) -> bool:
        """Whether a second cache, of a single head, selects the tokens to read."""
        return len(self) > 1 and self[1][0] == 1 and self[1] != self[0]


def kinds_of(shapes: Shapes) -> dict[int, Kind]:
    """Layer -> its kind."""
    kinds: dict[int, Kind] = {}
    for path in sorted(shapes):
        kinds[path[0]] = Kind((*kinds.get(path[0], ()), shapes[path]))
    return kinds


def is_packable(cache: object, kind: Kind) -> bool:
    return (is_growing(cache) or is_rotating(cache)) and not kind.indexed


def packable_shapes(own: Mapping[CachePath, Any], shapes: Shapes) -> Shapes:
    """The shapes of the own caches that a spec could pack."""
    kinds = kinds_of(shapes)
    return {p: shape for p, shape in shapes.items() if is_packable(own[p], kinds[p[0]])}


def packable(model: nn.Module) -> tuple[Callable[[], list], Shapes]:
    """A function that makes the model's own caches, and :func:`packable_shapes`."""
    own = dict(leaves(own_caches(model)))
    shapes = head_sizes(model, own_caches(model))
    return lambda: own_caches(model), packable_shapes(own, shapes)


def leaves(caches: Iterable, path: CachePath = ()) -> Iterator[tuple[CachePath, Any]]:
    """Every single cache with its path."""
    for i, cache in enumerate(caches):
        if is_list(cache):
            yield from leaves(cache.caches, (*path, i))
        else:
            yield (*path, i), cache


def map_leaves(function: Callable[[CachePath, Any], Any], caches: Iterable, path: CachePath = ()):
    """A list of the same form with ``function(path, cache)`` in place of every single cache."""
    made = []
    for i, cache in enumerate(caches):
        if is_list(cache):
            made.append(type(cache)(*map_leaves(function, cache.caches, (*path, i))))
        else:
            made.append(function((*path, i), cache))
    return made


def watch(caches: Iterable, seen: Callable) -> None:
    """Call ``seen(path, keys, values)`` before each update of a cache."""
    for path, cache in leaves(caches):
        if (update := getattr(cache, "update_and_fetch", None)) is None:
            continue

        def watched(keys, values, path=path, update=update):
            seen(path, keys, values)
            return update(keys, values)

        cache.update_and_fetch = watched


def head_sizes(model: nn.Module, caches: Iterable) -> dict[CachePath, Shape]:
    """The shape of every cache that one token reaches. Evaluates nothing."""
    shapes: dict[CachePath, Shape] = {}

    def seen(path, keys, values):
        shapes[path] = (keys.shape[1], keys.shape[-1], values.shape[-1])

    watch(caches, seen)
    model(mx.array([[0]]), cache=caches)
    return shapes


_own = threading.local()  # .making: this thread makes a model's own caches


class CacheFactory:
    """``model.make_cache`` of an enabled model and of modules with the same layers: all
    ``holders`` have a factory with the same ``make``, which takes ``max_kv_size``."""

    def __init__(
        self, make: Callable[[int | None], list], model: Any = None, holders: list | None = None
    ):
        self.make, self.model = make, model
        self.holders = [] if holders is None else holders
        self.holders.append(model)

    def __call__(self, max_kv_size: int | None = None) -> list:
        if getattr(_own, "making", False):  # a wrapper asks its language model
            return own_caches(self.model, max_kv_size)
        return self.make(max_kv_size)


def own_caches(model: nn.Module, max_kv_size: int | None = None) -> list:
    """The caches that the model's program makes where it is not enabled."""
    make = getattr(type(model), "make_cache", None)
    if make is not None:
        before, _own.making = getattr(_own, "making", False), True
        try:
            return make(model)
        finally:
            _own.making = before
    if max_kv_size is not None:
        return [cache_module(model).RotatingKVCache(max_kv_size, KEEP) for _ in model.layers]
    return [cache_module(model).KVCache() for _ in model.layers]


def longest_context(model: nn.Module) -> int | None:
    """Tokens that the model's config says it takes; ``None`` if it does not say."""
    for part in (model, *same_layers(model)):
        for name in ("args", "config"):
            most = getattr(getattr(part, name, None), "max_position_embeddings", None)
            if type(most) is int and most > 0:
                return most
    return None


def factory_of(model: Any) -> CacheFactory | None:
    """The factory of an enabled model; None if neither it nor its language model is enabled."""
    for part in (model, *same_layers(model)):
        factory = getattr(part, "__dict__", {}).get("make_cache")
        if isinstance(factory, CacheFactory):
            return factory
    return None


def same_layers(model: Any) -> Iterator[nn.Module]:
    """The modules in ``model`` with the same ``layers``: the language model in a wrapper, and the
    stack of layers in that."""
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
VERSION = 2  # of the hash; files with another one do not fit


def identity(model: nn.Module, shapes: Shapes | None = None) -> str:
    """Hash of names, shapes and a few values of a model's weights, and of ``shapes``, those of
    :func:`packable`; 24 hex digits. Equal values in fp16, bf16 and fp32 give the same hash, and so
    do the two halves of a wrapper."""
    if (factory := factory_of(model)) is not None:
        model = factory.holders[0] or model  # the model that enable() was called with
    shapes = packable(model)[1] if shapes is None else shapes
    digest = hashlib.sha256(f"{VERSION}{shapes}".encode())
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
        if "lora_a" in module:  # its scale acts like a weight, but is no parameter
            digest.update(f"{name} {getattr(module, 'scale', None)}".encode())
    return digest.hexdigest()[:24]


class Identity:
    """The identity of a model as it is now. Hashed again if a weight is another array than last
    time (1 ms for 700 parameters); writing into an array goes unnoticed."""

    def __init__(self, model: nn.Module, shapes: Shapes):
        self.model, self.shapes = model, shapes
        self._seen: list = []
        self._name = ""

    def __call__(self) -> str:
        now: list = []
        for _, module in self.model.named_modules():
            now.extend(v for v in module.values() if isinstance(v, mx.array))
            if "lora_a" in module:
                now.append(getattr(module, "scale", None))
        seen = [old() if isinstance(old, ref) else old for old in self._seen]
        if len(now) != len(seen) or any(old is not new for old, new in zip(seen, now, strict=True)):
            self._name = identity(self.model, self.shapes)
            self._seen = [ref(a) if isinstance(a, mx.array) else a for a in now]
        return self._name

    def __getstate__(self) -> dict:
        return {**vars(self), "_seen": []}
