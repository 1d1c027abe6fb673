"""Packing a prompt that was read with the model's own caches, or its file."""

import mlx.nn as nn
from mlx_lm.models import cache as stock

from .. import ops
from ..caches.packed import PackedCache
from ..caches.prompt_file import check_unpacked
from ..caches.rotating import PackedRotatingKVCache
from ..caches.single import PackedKVCache
from ..format.spec import Spec
from .enable import make_prompt_cache


def pack(caches: list, model: nn.Module, spec: str | Spec, **calibration) -> list:
    """The packed caches of a prompt that was read with the model's own.

    Args:
        caches (list): ``KVCache`` and ``RotatingKVCache``, alone or in a ``CacheList``; other
            kinds stay as they are.
        model (nn.Module): The model they are of.
        spec (str or Spec): For example ``"int4-srft"``.
        calibration: As for :func:`mlx_kvq.enable`.

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
    return [_pack(c, t, i) for i, (c, t) in enumerate(zip(caches, templates, strict=True))]


def _pack(cache, template, layer: int):
    if isinstance(cache, stock.CacheList) and isinstance(template, stock.CacheList):
        parts = zip(cache.caches, template.caches, strict=True)
        return stock.CacheList(*(_pack(c, t, layer) for c, t in parts))
    if not isinstance(template, PackedCache):
        return cache
    fmt = template.format
    packed: PackedKVCache | PackedRotatingKVCache
    if isinstance(cache, stock.RotatingKVCache):
        packed = PackedRotatingKVCache(fmt, cache.max_size, cache.keep)
        packed._idx = cache._idx
    elif isinstance(cache, stock.KVCache):
        packed = PackedKVCache(fmt)
    else:
        raise ValueError(
            f"Layer {layer} of the prompt cache is a {type(cache).__name__}, which is not what "
            "this model makes there."
        )
    packed.model = template.model
    packed.offset = cache.offset
    if cache.keys is not None:
        packed._dtype = str(cache.keys.dtype).rpartition(".")[2]
        packed.rows = ops.quantize_pack(cache.keys, cache.values, fmt)[0]
    if cache.offset and fmt.recent:
        if isinstance(cache, stock.RotatingKVCache):
            held = [cache._temporal_order(a) for a in (cache.keys, cache.values)]
        else:
            held = [a[..., : cache.offset, :] for a in (cache.keys, cache.values)]
        size = packed.tail_after_prompt()
        k, v = (a[..., -size:, :] for a in held)
        packed.newest.array = ops.quantize_pack(k, v, fmt, None, size)[1]
        packed.newest.got(size, [k.shape[2]])
    return packed
