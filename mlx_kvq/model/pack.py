"""Packing a prompt that was read with the model's own caches, or its file."""

from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache

from .. import ops
from ..caches.packed import PackedCache
from ..caches.prompt_file import check_unpacked
from ..caches.rotating import PackedRotatingKVCache
from ..caches.single import PackedKVCache
from ..format.spec import Spec
from ..stock import leaves, map_leaves
from .enable import make_prompt_cache


def pack(caches: list, model: nn.Module, spec: str | Spec, **calibration) -> list:
    """The packed caches of a prompt that was read with the model's own. A ``KVCache`` or
    ``RotatingKVCache`` is packed, others stay as they are; ``calibration`` as for
    :func:`mlx_kvq.enable`.

    Raises:
        ValueError: If the caches are not of this model, or already quantized.
    """
    check_unpacked(caches)
    templates = make_prompt_cache(model, spec, **calibration)
    if len(caches) != len(templates):
        raise ValueError(
            f"The prompt cache has {len(caches)} layers and the model {len(templates)}: it was "
            "made with another model."
        )
    filled = dict(leaves(caches))

    def packed(path, template):
        cache = filled.get(path)
        own = KVCache | RotatingKVCache if isinstance(template, PackedCache) else object
        if path not in filled or not isinstance(cache, own):
            found = type(caches[path[0]] if cache is None else cache).__name__
            raise ValueError(
                f"Layer {path[0]} of the prompt cache is a {found}, which is not what this model "
                "makes there."
            )
        return _packed(cache, template) if isinstance(template, PackedCache) else cache

    return map_leaves(packed, templates)


def _packed(cache: Any, template: PackedCache) -> PackedCache:
    fmt = template.format
    packed: PackedKVCache | PackedRotatingKVCache = PackedKVCache(fmt)
    if isinstance(cache, RotatingKVCache):
        packed = PackedRotatingKVCache(fmt, cache.max_size, cache.keep)
        packed._idx = cache._idx
    packed.model = template.model
    packed.offset = cache.offset
    if cache.keys is not None:
        packed._dtype = str(cache.keys.dtype).rpartition(".")[2]
        packed.rows = ops.quantize_pack(cache.keys, cache.values, fmt)[0]
    if not cache.offset:
        return packed
    if isinstance(cache, RotatingKVCache):
        held = [cache._temporal_order(a) for a in (cache.keys, cache.values)]
    else:
        held = [a[..., : cache.offset, :] for a in (cache.keys, cache.values)]
    gone, keep = cache.offset - held[0].shape[2], getattr(cache, "keep", 0)
    if fmt.first:
        k, v = (a[:, :, :keep] if gone and keep else a for a in held)
        packed.oldest.read(k, v, [0 if keep else gone], None)
    if fmt.recent:
        size = packed.tail_after_prompt()
        k, v = (a[..., -size:, :] for a in held)
        packed.newest.array = ops.quantize_pack(k, v, fmt, None, size)[1]
        packed.newest.got(size, [k.shape[2]])
    return packed
