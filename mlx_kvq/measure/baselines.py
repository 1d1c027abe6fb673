"""The kinds of caches that are compared: the model's own, that one rounded to 16 bits, mlx-lm's
affine ``kv_bits``, published schemes fake-quantized, and packed ones; and the bytes of a token in
each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import cache as stock

from ..caches.packed import PackedCache
from ..calibration import automatic
from ..calibration.set import CalibrationSet
from ..files import line
from ..format.spec import OFF, Spec
from ..host import is_growing, is_rotating
from ..model.plan import make_plan
from ..model.report import log
from ..stock import head_sizes, leaves, map_leaves, own_caches
from .rivals import BLOCKS, FakeCache, Rival

PLAIN = {"fp16": mx.float16, "bf16": mx.bfloat16, "fp32": mx.float32}
KV_BITS = {"kv4": 4, "kv8": 8}  # mlx-lm's --kv-bits, from the first token on
KV_GROUP = 64  # mlx-lm's default group size
OTHERS = (*KV_BITS, *BLOCKS)  # names that are not specs
PADDING = 8  # sequences of a batch are up to so many tokens shorter than the longest


@dataclass
class Contender:
    """A kind of cache."""

    name: str  # "fp16", "kv4", "kv8", that of a rival or a spec string
    make: Callable[[], list]  # empty caches of one sequence
    note: str = ""  # to be printed beside its figures
    merges: bool = True  # a batch is in merged caches
    model: Any = None  # of these caches

    def batch(self, B: int) -> list:
        """Empty caches of ``B`` sequences: those of mlx-lm's ``BatchGenerator``. Caches that mlx-lm
        does not merge, as a ``QuantizedKVCache``, hold the sequences themselves."""
        caches = self.make()
        if B == 1 or not self.merges or not all(hasattr(c, "merge") for c in caches):
            return caches
        others = [self.make() for _ in range(B - 1)]
        return [c.merge([c, *rest]) for c, *rest in zip(caches, *others, strict=True)]


@contextmanager
def padded(caches: list, B: int, L: int) -> Iterator[None]:
    """Around reading ``B`` prompts of up to ``L`` tokens: padding as in ``BatchGenerator``."""
    padding = [b % min(PADDING, L) if L else 0 for b in range(B)]
    if max(padding) == 0 or not all(hasattr(c, "prepare") for c in caches):
        yield
        return
    for c in caches:
        c.prepare(lengths=[L - p for p in padding], right_padding=padding)
    yield
    for c in caches:
        c.finalize()
    mx.eval([c.state for c in caches])


def affine(cache: stock.KVCache, name: str) -> stock.QuantizedKVCache:
    """mlx-lm's quantized cache in place of a growing one."""
    return cache.to_quantized(group_size=KV_GROUP, bits=KV_BITS[name])


def check_name(name: str | Spec) -> None:
    """Raise ValueError if ``name`` is neither a baseline's nor a spec; the message lists both."""
    if name in KV_BITS or Rival.parse(name):
        return
    try:
        Spec.parse(name)
    except ValueError as error:
        others = f"mlx-lm's own: {', '.join(KV_BITS)}. Fake-quantized: {', '.join(BLOCKS)}."
        raise ValueError(f"{error} {others}") from None


def candidate(
    model: nn.Module,
    name: str | Spec,
    *,
    calibration: CalibrationSet | None = None,
    tokenizer=None,
    verbose: bool = False,
) -> Contender:
    """The cache of this name for this model; the rest is as for :func:`mlx_kvq.enable`, but a spec
    with ``calibrate=off`` goes without ``calibration``. Layers that are not packed keep 16 bits,
    also in a model that computes in fp32. Raises ValueError if the name is unknown or the model
    cannot have this cache."""
    check_name(name)
    kept = dtype(model)
    if name in KV_BITS:
        contender = _affine(model, str(name))
    elif (rival := Rival.parse(name)) is not None:
        contender = _fake(model, rival)
    elif (spec := Spec.parse(name)) is None:
        note = "" if kept == mx.float32 else f"the model's own {_name(kept)}"
        contender = Contender(OFF, own(model).make, note)
    else:
        calibration = None if spec.calibrate == "off" else calibration
        contender = packed(model, spec, calibration, tokenizer, verbose)
        contender.name = str(name)
    if kept == mx.float32:
        contender.make = partial(_with_rest_rounded, contender.make)
    return contender


def own(model: nn.Module) -> Contender:
    """The own cache of a model, enabled or not, in the model's own dtype."""
    return Contender(f"own ({_name(dtype(model))})", lambda: own_caches(model), model=model)


def packed(
    model: nn.Module, spec: Spec, calibration=None, tokenizer=None, verbose: bool = False
) -> Contender:
    """The packed cache of a spec, as :func:`mlx_kvq.enable` makes it."""
    say = log if verbose else automatic.silent
    packing, report = make_plan(model, spec, calibration, tokenizer, say)
    say(str(report))
    note = str(report).partition("; ")[2] if report.left else ""
    return Contender(str(spec), packing, note, model=model)


def dtype(model: nn.Module) -> mx.Dtype:
    """The dtype of the keys and values that the model computes."""
    caches = own_caches(model)
    model(mx.array([[0]]), cache=caches)  # builds the graph, evaluates nothing
    kept = [a for _, c in leaves(caches) for a in _token_arrays(c)]
    return kept[0].dtype if kept else mx.float32


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _with_rest_rounded(make: Callable[[], list]) -> list:
    """Caches of which plain ones round to fp16."""
    caches = make()
    for _, cache in leaves(caches):
        if is_growing(cache) or is_rotating(cache):
            cache.update_and_fetch = partial(_round, cache.update_and_fetch)
    return caches


def _round(update: Callable, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
    kept = update(keys.astype(mx.float16), values.astype(mx.float16))
    return tuple(a.astype(keys.dtype) for a in kept)


def _affine(model: nn.Module, name: str) -> Contender:
    own = own_caches(model)
    others = [type(c).__name__ for c in own if type(c) is not stock.KVCache]
    cannot = f"mlx-lm cannot quantize {', '.join(sorted(set(others)))}"
    if len(others) == len(own):
        raise ValueError(f"{name} is not possible: {cannot}.")

    def make() -> list:
        caches = own_caches(model)
        return [affine(c, name) if type(c) is stock.KVCache else c for c in caches]

    note = f"{len(others)} of {len(own)} layers stay as they are: {cannot}" if others else ""
    try:
        _try(model, make)
    except RuntimeError as error:  # MLX on CUDA has no kernel for most lengths
        said = f"read as arrays, since mlx-lm's quantized attention fails here: {line(error)}"
        note = "; ".join(filter(None, [note, said]))
        make = partial(_as_arrays, make)
    except Exception as error:
        raise ValueError(f"{name} is not possible for this model: {line(error)}") from error
    else:
        return Contender(name, make, note, model=model)
    try:
        _try(model, make)
    except Exception as error:
        raise ValueError(f"{name} is not possible for this model: {line(error)}") from error
    return Contender(name, make, note, model=model)


def _as_arrays(make: Callable[[], list]) -> list:
    return [AsArrays(c) if isinstance(c, stock.QuantizedKVCache) else c for c in make()]


def _try(model: nn.Module, make: Callable[[], list]) -> None:
    """Run a prompt of an odd length and a token, of one sequence and of two, for real: what MLX
    lacks only shows then."""
    for B in (1, 2):
        caches = make()
        for L in (3, 1):
            mx.eval(model(mx.zeros((B, L), mx.int32), cache=caches))


class AsArrays(stock.KVCache):
    """Stores as mlx-lm's quantized cache does, and is read as arrays."""

    def __init__(self, stored: stock.QuantizedKVCache):
        super().__init__()
        self.stored = stored

    def update_and_fetch(self, keys, values):
        kept = self.stored.update_and_fetch(keys, values)
        self.offset = self.stored.offset
        size, bits = self.stored.group_size, self.stored.bits
        return tuple(
            mx.dequantize(codes, scales, biases, group_size=size, bits=bits)
            for codes, scales, biases in kept
        )

    @property
    def state(self):
        return self.stored.state

    @state.setter
    def state(self, v):
        self.stored.state, self.offset = v, v[2]

    def is_trimmable(self) -> bool:
        return False

    @classmethod
    def merge(cls, caches):
        raise NotImplementedError("mlx-lm's quantized caches are not merged.")


def _fake(model: nn.Module, rival: Rival) -> Contender:
    sizes = head_sizes(model, own_caches(model))
    caches = dict(leaves(own_caches(model)))
    left = {}
    for path, cache in caches.items():
        if not (is_growing(cache) or (is_rotating(cache) and not cache.keep)):
            left[path] = f"{type(cache).__name__} is not a plain key/value cache"
        elif path not in sizes:
            left[path] = "not reached by a forward pass"
        elif reason := rival.why_not(*sizes[path][1:]):
            left[path] = reason
    reasons = "; ".join(dict.fromkeys(left.values()))
    if len(left) == len(caches):
        raise ValueError(f"{rival} is not possible: {reasons}.")

    def fake(path, cache):
        if path in left:
            return cache
        return FakeCache(rival, cache.max_size if is_rotating(cache) else None)

    note = rival.note
    if left:
        note += f"; {len(left)} of {len(caches)} caches stay as they are: {reasons}"
    make = partial(_fake_caches, model, fake)
    return Contender(str(rival), make, note, merges=False, model=model)


def _fake_caches(model: nn.Module, fake: Callable) -> list:
    return map_leaves(fake, own_caches(model))


def _token_arrays(cache) -> list[mx.array]:
    """The arrays [B, H, tokens, …] of a cache."""
    flat = dict(tree_flatten(cache.state)).values()
    return [a for a in flat if isinstance(a, mx.array) and a.ndim == 4]


def bytes_per_token(caches: list, tail: bool = True) -> float:
    """Bytes of one token in all caches together, where it is kept. What is kept exactly besides is
    shared out over all tokens, or left out; of a rival it always counts. It follows the model's
    dtype, as scales and biases of mlx-lm's quantized cache do: these count 2 bytes also in a model
    that computes in fp32."""
    total = 0.0
    for _, cache in leaves(caches):
        if isinstance(cache, FakeCache):
            total += cache.bytes_per_token()
            continue
        besides = (cache.tail, cache.oldest.array) if isinstance(cache, PackedCache) else ()
        for a in _token_arrays(cache):
            exact = any(a is b for b in besides)
            if exact and not tail:
                continue
            follows = isinstance(cache, stock.QuantizedKVCache | AsArrays)
            follows |= exact and cache.dtype == mx.float32
            size = 2 if follows and a.dtype == mx.float32 else a.itemsize
            tokens = cache.size() if exact else a.shape[2]
            total += size * a.size / (a.shape[0] * tokens)
    return total
