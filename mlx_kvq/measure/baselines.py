"""What packed caches are compared with: the model's own cache, rounded to 16 bits, or mlx-lm's
affine ``kv_bits``; and what a token takes in any of them."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import cache as stock

from ..calibration.set import CalibrationSet
from ..format.spec import OFF, Spec
from ..model.enable import enable, make_prompt_cache
from ..stock import leaves

KV_BITS = {"kv4": 4, "kv8": 8}  # mlx-lm's --kv-bits, from the first token on
KV_GROUP = 64  # and its default group size


@dataclass(frozen=True)
class Candidate:
    """A kind of cache for one model.

    Args:
        name (str): ``"fp16"``, ``"kv4"``, ``"kv8"`` or a spec string.
        make: Makes the caches of one conversation.
        note (str): What should be said beside its figures; may be empty.
    """

    name: str
    make: Callable[[], list]
    note: str = ""


def check_name(name: str | Spec) -> None:
    """
    Raises:
        ValueError: If ``name`` is neither a baseline's nor a spec; the message lists both.
    """
    if name in KV_BITS:
        return
    try:
        Spec.parse(name)
    except ValueError as error:
        raise ValueError(f"{error} mlx-lm's own: {', '.join(KV_BITS)}.") from None


def candidate(
    model: nn.Module,
    name: str | Spec,
    *,
    calibration: CalibrationSet | None = None,
    tokenizer=None,
    verbose: bool = False,
) -> Candidate:
    """The cache of this name for this model; the rest is as for :func:`mlx_kvq.enable`, but a
    spec with ``calibrate=off`` goes without ``calibration``.

    Raises:
        ValueError: If the name is unknown or the model cannot have this cache.
    """
    check_name(name)
    if name in KV_BITS:
        return _affine(model, str(name))
    if str(name).strip() == OFF:
        return _sixteen_bits(model)
    spec = Spec.parse(name)
    given = None if spec is None or spec.calibrate == "off" else calibration
    before = vars(model).get("make_cache")
    try:
        report = enable(model, name, calibration=given, tokenizer=tokenizer, verbose=verbose)
        make = model.make_cache
    finally:
        if before is not None:
            model.make_cache = before
        else:
            vars(model).pop("make_cache", None)
    note = "" if report is None or not report.left else str(report).partition("; ")[2]
    return Candidate(str(name), _with_rest_rounded(model, make), note)


def own(model: nn.Module) -> Candidate:
    """The model's own cache in the model's own dtype, whatever is enabled."""
    return Candidate(f"own ({_name(dtype(model))})", lambda: make_prompt_cache(model, OFF))


def dtype(model: nn.Module) -> mx.Dtype:
    """The dtype of the keys and values that the model computes."""
    caches = make_prompt_cache(model, OFF)
    model(mx.array([[0]]), cache=caches)  # builds the graph, evaluates nothing
    kept = [a for _, c in leaves(caches) for a in _token_arrays(c)]
    return kept[0].dtype if kept else mx.float32


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _sixteen_bits(model: nn.Module) -> Candidate:
    kept = dtype(model)
    note = "" if kept == mx.float32 else f"the model's own {_name(kept)}"
    return Candidate(OFF, _with_rest_rounded(model, own(model).make), note)


def _with_rest_rounded(model: nn.Module, make: Callable[[], list]) -> Callable[[], list]:
    """Let plain caches keep 16 bits, as they do for those who do not compute in float32."""
    if dtype(model) != mx.float32:
        return make

    def rounded(update: Callable) -> Callable:
        def update_and_fetch(keys, values):
            kept = update(keys.astype(mx.float16), values.astype(mx.float16))
            return tuple(a.astype(keys.dtype) for a in kept)

        return update_and_fetch

    def made() -> list:
        caches = make()
        for _, cache in leaves(caches):
            if type(cache) in (stock.KVCache, stock.RotatingKVCache):
                update = cache.update_and_fetch  # type: ignore[attr-defined]
                cache.update_and_fetch = rounded(update)  # type: ignore[attr-defined]
        return caches

    return made


def _affine(model: nn.Module, name: str) -> Candidate:
    bits = KV_BITS[name]
    caches = make_prompt_cache(model, OFF)
    growing = [type(c) is stock.KVCache for c in caches]
    others = sorted({type(c).__name__ for c, g in zip(caches, growing, strict=True) if not g})
    if not any(growing):
        raise ValueError(f"{name} is not possible: mlx-lm cannot quantize {', '.join(others)}.")

    def make() -> list:
        return [
            c.to_quantized(group_size=KV_GROUP, bits=bits) if type(c) is stock.KVCache else c
            for c in make_prompt_cache(model, OFF)
        ]

    try:
        model(mx.array([[0]]), cache=make())
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} is not possible for this model: {reason}") from error
    left = f"{growing.count(False)} of {len(growing)} layers stay as they are"
    note = "" if all(growing) else f"{left}: mlx-lm cannot quantize {', '.join(others)}"
    return Candidate(name, _with_rest_rounded(model, make), note)


def _token_arrays(cache) -> list[mx.array]:
    """The arrays [B, H, tokens, …] of a cache that hold something for every token."""
    flat = dict(tree_flatten(cache.state)).values()
    return [a for a in flat if isinstance(a, mx.array) and a.ndim == 4]


def bytes_per_token(caches: list, tail: bool = True) -> float:
    """Bytes that one token takes in all caches together, where it is kept.

    An exact tail is shared out over the tokens held, or left out. Of mlx-lm's quantized cache the
    scales and biases count 2 bytes each, and so do the numbers of a tail of a model run in fp32:
    that is what they take in one of bf16, whose dtype they follow.
    """
    total = 0.0
    for _, cache in leaves(caches):
        exact = getattr(cache, "tail", None)
        for a in _token_arrays(cache):
            follows = isinstance(cache, stock.QuantizedKVCache)
            follows |= a is exact and cache.dtype == mx.float32  # type: ignore[attr-defined]
            size = 2 if follows and a.dtype == mx.float32 else a.itemsize
            tokens = a.shape[2]
            if a is exact:
                tokens = cache.size()  # type: ignore[attr-defined]
            if tail or a is not exact:
                total += size * a.size / (a.shape[0] * tokens)
    return total
