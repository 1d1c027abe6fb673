"""Prompt-cache files: whole, of this model and of this format, or refused.

mlx-lm writes and reads them (``save_prompt_cache``, ``load_prompt_cache``). A file with packed
caches also carries, in its metadata, a hash of everything else in the file. The hash finds damage;
whoever makes a file can make its hash, so what a file says is also checked before it is used.
"""

import errno
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as stock

from ..calibration.set import METRIC, NAMES, validate
from ..files import line, parse_json, quoted, replacing, safetensors_header
from ..stock import KEEP, identity, leaves
from .packed import PackedCache

KEY = "mlx_kvq"  # in the file's metadata
DEPTH = 64  # parts of a name in the file, at most
_UNSET = "sha256:" + 64 * "0"
_FIELD = f'"0.{KEY}":"'.encode()  # mlx-lm numbers what it keeps there; 0 is the metadata


def saving(save: Callable) -> Callable:
    """mlx-lm's ``save_prompt_cache``, with a hash in files that hold packed caches. One that was
    there stays whole until the new one is complete."""

    def save_prompt_cache(file_name, cache, metadata=None):
        packed = any(isinstance(c, PackedCache) for _, c in leaves(cache))
        if not packed:
            return save(file_name, cache, metadata)
        path = str(file_name)
        path = path if path.endswith(".safetensors") else path + ".safetensors"
        with replacing(path) as part:
            try:
                save(str(part), cache, {**(metadata or {}), KEY: _UNSET})
            except RuntimeError as error:  # how MLX says that a disk is full
                raise OSError(errno.EIO, line(error), path) from error
            digest, at = _digest(str(part))
            with open(part, "r+b") as file:
                file.seek(at)
                file.write(digest.encode())

    return save_prompt_cache


def loading(load: Callable) -> Callable:
    """mlx-lm's ``load_prompt_cache``, which refuses a damaged file of packed caches."""

    def load_prompt_cache(file_name, return_metadata=False):
        try:
            header, names = safetensors_header(file_name)
            _check_names(header)
            _check_names(names)
            said = header.get(f"0.{KEY}")
            if said is not None and _digest(file_name)[0] != said:
                raise ValueError("its bytes are not those that were written")
            cache, metadata = load(file_name, return_metadata=True)
            packed = [c for _, c in leaves(cache) if isinstance(c, PackedCache)]
            if packed:
                if said is None:
                    raise ValueError("it holds packed caches and has lost its hash")
                tokenizer_options(metadata)
            for c in packed:
                _check_numbers(c)
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no prompt cache '{file_name}'.") from None
        except Exception as error:
            raise ValueError(
                f"The prompt cache '{file_name}' cannot be used: {line(error)}"
            ) from error
        if isinstance(metadata, dict):
            metadata = {k: v for k, v in metadata.items() if k != KEY}
        return (cache, metadata) if return_metadata else cache

    return load_prompt_cache


def tokenizer_options(metadata: Any) -> dict:
    """The ``tokenizer_config`` that mlx_lm.cache_prompt notes in a file. Not for loading a model:
    whether its code may run, for one, is not for a file to say.

    Raises:
        ValueError: If the metadata is not what mlx-lm will be able to read.
    """
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no object of names and texts")
    try:
        options = parse_json(metadata.get("tokenizer_config", "{}"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the tokenizer_config in its metadata {line(error)}") from None
    if not isinstance(options, dict):
        raise ValueError(f"the tokenizer_config in its metadata is {quoted(options)}, no object")
    return options


def _check_names(names: Iterable[str]) -> None:
    """Raise ValueError if what mlx-lm makes of these names is much larger than they are: of ``a.0``
    and ``a.7`` it makes a list of eight."""
    largest: dict[str, int | None] = {}  # of the members of a list; None for a dict
    parts = 0
    for name in names:
        path = name.split(".")
        parts += len(path)
        if len(path) > DEPTH:
            raise ValueError(f"{quoted(name)} in it has more than {DEPTH} parts")
        for n, part in enumerate(path):
            above = ".".join(path[:n])
            try:
                index = int(part)
            except ValueError:
                largest[above] = None
                continue
            if (known := largest.get(above, 0)) is not None:
                largest[above] = max(known, index)
    if sum(n for n in largest.values() if n is not None) > 2 * parts + 1000:
        raise ValueError("the numbers in its names are larger than there are names")


def _check_numbers(cache: Any) -> None:
    """Raise ValueError unless what a cache says of its rows can be true: kernels read as many."""
    fmt, rows, tokens = cache.format, cache.rows, cache.offset
    held = 0 if rows is None else rows.shape[2]
    names = ("_idx", "keep", "max_size", "_offset")
    whole = {n: vars(cache)[n] for n in names if n in vars(cache)}
    if rows is not None and rows.size == 0:
        raise ValueError(f"it holds rows {rows.shape}, which are none")
    if isinstance(tokens, mx.array):
        padding = cache.left_padding
        batch = tokens.shape if rows is None else (rows.shape[0],)
        for name, a in (("offset", tokens), ("left_padding", padding)):
            if not isinstance(a, mx.array) or a.dtype != mx.int32 or a.shape != batch:
                raise ValueError(f"{name} in it is {quoted(a)}, not int32 {batch}")
        if "max_size" not in whole and rows is not None:
            least, most = padding.min().item(), padding.max().item()
            if not 0 <= least <= most <= held:
                raise ValueError(f"left_padding in it is {least} to {most} of {held} rows")
    else:
        whole["offset"] = tokens
    for name, n in whole.items():
        if type(n) is not int or not 0 <= n < 1 << 31:
            raise ValueError(f"{name} in it is {quoted(n)}, not a number of tokens")
    used = whole.get("_idx", whole.get("offset", 0))
    if used > held:
        raise ValueError(f"it says that {used} of its {held} rows hold tokens")
    if whole.get("max_size", 1) < 1:
        raise ValueError("max_size in it is 0")
    if whole.get("keep", 0) > max(held, KEEP) and whole["offset"] > held:
        raise ValueError(f"it keeps the first {whole['keep']} tokens in {held} rows")
    for at, a in enumerate(fmt.arrays or ()):
        side, name = (("keys", "values")[at // 3], NAMES[at % 3]) if at < 6 else ("keys", METRIC)
        if a is None:
            continue
        if rows is not None and a.shape[0] != rows.shape[1]:
            raise ValueError(
                f"{name} of its {side} is of {a.shape[0]} KV heads, its rows of {rows.shape[1]}"
            )
        validate({f"{side}.{name}": a})


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
    kinds = {type(c) for _, c in leaves([*caches, *expected])}
    if not any(issubclass(kind, PackedCache) for kind in kinds):
        return  # none of our business
    if len(caches) != len(expected):
        raise ValueError(
            f"The prompt cache has {len(caches)} layers and this model {len(expected)}: it was "
            "made with another model."
        )
    found, wanted = dict(leaves(caches)), dict(leaves(expected))
    packed = {p: c for p, c in found.items() if isinstance(c, PackedCache)}
    if {c.model for c in packed.values()} - {"", identity(model) if packed else ""}:
        raise ValueError("The prompt cache was made with another model, or with other weights.")
    asked = {p: c for p, c in wanted.items() if isinstance(c, PackedCache)}
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
        if not ours or not theirs:
            continue
        own = theirs.format
        # Files of before have as many exact tokens in every layer.
        if ours.format.of_rows not in (own.of_rows, own.in_window(ours.format.window).of_rows):
            raise ValueError(
                f"The prompt cache was packed with {own.differences(ours.format)} (layer "
                f"{path[0]})."
            )
        theirs.adopt(ours.format)


def check_unpacked(caches: list) -> None:
    """Raise ValueError if one of these caches is quantized already."""
    for path, cache in leaves(caches):
        if isinstance(cache, PackedCache | stock.QuantizedKVCache):
            raise ValueError(
                f"Layer {path[0]} of the prompt cache is a {type(cache).__name__}: it is quantized "
                "already, and packing it again would add its errors up."
            )
