"""Prompt-cache files: whole, of this model and of this format, or refused.

mlx-lm writes and reads them (``save_prompt_cache``, ``load_prompt_cache``). A file with packed
caches also carries, in its metadata, a hash of everything else in the file.
"""

import hashlib
import json
import os
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as stock

from . import ops
from .automatic import identity
from .cache import PackedKVCache, PackedRotatingKVCache, _PackedCache
from .files import replacing
from .model import _leaves, make_prompt_cache
from .spec import Spec

KEY = "mlx_kvq"  # in the file's metadata
_UNSET = "sha256:" + 64 * "0"
_FIELD = f'"0.{KEY}":"'.encode()  # mlx-lm numbers what it keeps there; 0 is the metadata


def saving(save: Callable) -> Callable:
    """mlx-lm's ``save_prompt_cache``, with a hash in files that hold packed caches. One that was
    there stays whole until the new one is complete."""

    def save_prompt_cache(file_name, cache, metadata=None):
        packed = any(isinstance(c, _PackedCache) for _, c in _leaves(cache))
        if not packed:
            return save(file_name, cache, metadata)
        path = str(file_name)
        path = path if path.endswith(".safetensors") else path + ".safetensors"
        with replacing(path) as part:
            save(str(part), cache, {**(metadata or {}), KEY: _UNSET})
            digest, at = _digest(str(part))
            with open(part, "r+b") as file:
                file.seek(at)
                file.write(digest.encode())

    return save_prompt_cache


def loading(load: Callable) -> Callable:
    """mlx-lm's ``load_prompt_cache``, which refuses a damaged file of packed caches."""

    def load_prompt_cache(file_name, return_metadata=False):
        if not os.path.exists(file_name):
            raise FileNotFoundError(f"There is no prompt cache '{file_name}'.")
        try:
            said = _metadata(file_name).get(f"0.{KEY}")
            if said is not None and _digest(file_name)[0] != said:
                raise ValueError("its bytes are not those that were written")
            cache, metadata = load(file_name, return_metadata=True)
        except Exception as error:
            raise ValueError(f"The prompt cache '{file_name}' cannot be used: {error}") from error
        metadata = {k: v for k, v in (metadata or {}).items() if k != KEY}
        return (cache, metadata) if return_metadata else cache

    return load_prompt_cache


def _metadata(path) -> dict[str, str]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > os.path.getsize(path):
            raise ValueError("it is not a complete safetensors file")
        try:
            return json.loads(file.read(size)).get("__metadata__", {})
        except (ValueError, AttributeError):
            raise ValueError("it is not a safetensors file") from None


def _digest(path) -> tuple[str, int]:
    """Hash of the file but for the hash in it, and where that is."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        start = file.read(8)
        start += file.read(int.from_bytes(start, "little"))
        at = start.find(_FIELD) + len(_FIELD)
        digest.update(start[:at] + start[at + len(_UNSET) :])
        while piece := file.read(1 << 20):
            digest.update(piece)
    return "sha256:" + digest.hexdigest(), at


def check(caches: list, model: nn.Module) -> None:
    """Refuse caches that were made for another model, or not as ``enable`` asked for.

    Args:
        caches (list): From ``load_prompt_cache``.
        model (nn.Module): The model that is to go on with them, enabled or not.

    Raises:
        ValueError: Says what does not fit.
    """
    expected = stock.make_prompt_cache(model)
    kinds = {type(c) for _, c in _leaves([*caches, *expected])}
    if not any(issubclass(kind, _PackedCache) for kind in kinds):
        return  # none of our business
    if len(caches) != len(expected):
        raise ValueError(
            f"The prompt cache has {len(caches)} layers and this model {len(expected)}: it was "
            "made with another model."
        )
    found, wanted = dict(_leaves(caches)), dict(_leaves(expected))
    packed = {p: c for p, c in found.items() if isinstance(c, _PackedCache)}
    if {c.model for c in packed.values()} - {"", identity(model) if packed else ""}:
        raise ValueError("The prompt cache was made with another model, or with other weights.")
    asked = {p: c for p, c in wanted.items() if isinstance(c, _PackedCache)}
    if not asked:
        return  # a model that is not enabled goes on with what the file holds
    for path, cache in wanted.items():
        ours, theirs = asked.get(path), packed.get(path)
        if (ours is None) != (theirs is None):
            raise ValueError(
                f"The prompt cache holds a {type(found.get(path)).__name__} where "
                f"{type(cache).__name__} was asked for (layer {path[0]}). Make it again with the "
                "same --kv-cache, or convert an unpacked one with 'mlx_kvq pack-cache'."
            )
        if ours and theirs and ours.format.signature != theirs.format.signature:
            raise ValueError(
                f"The prompt cache was packed as '{theirs.format.signature}', and "
                f"'{ours.format.signature}' was asked for (layer {path[0]})."
            )


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
    if isinstance(cache, _PackedCache | stock.QuantizedKVCache):
        raise ValueError(
            f"Layer {layer} of the prompt cache is a {type(cache).__name__}: it is quantized "
            "already, and packing it again would add its errors up."
        )
    if not isinstance(template, _PackedCache):
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
        packed.rows = ops.quantize_pack(cache.keys, cache.values, fmt)
    if cache.offset and fmt.recent:
        if isinstance(cache, stock.RotatingKVCache):
            held = [cache._temporal_order(a) for a in (cache.keys, cache.values)]
        else:
            held = [a[..., : cache.offset, :] for a in (cache.keys, cache.values)]
        k, v = (a[..., -fmt.recent :, :] for a in held)
        packed.tail = ops.quantize_pack_tail(k, v, fmt, None, fmt.recent)[1]
    return packed


def pack_file(source: str, target: str, model: nn.Module, spec: str | Spec, **calibration) -> None:
    """Convert a prompt-cache file; what mlx-lm noted in it stays."""
    from . import seams

    seams.install()
    caches, metadata = stock.load_prompt_cache(source, return_metadata=True)
    packed = pack(caches, model, spec, **calibration)
    mx.eval([c.state for c in packed])
    stock.save_prompt_cache(target, packed, metadata)
