"""Bits of every packed cache: from a spec's options, a given policy or a budget.

For a budget the KL of each packed cache alone is measured once per number of bits on a short text.
For each two of ``STEPS``, all caches begin with the fewer bits, and the one with the largest drop
of KL per byte gets the more, again and again, until the next one does not fit. The two whose drops
add up to most are taken. A model has no more than these two, since each is a set of kernels; what
the spec or its ``high`` says of a cache is not lowered.
"""

from collections.abc import Callable, Mapping
from itertools import combinations_with_replacement

import mlx.core as mx
import mlx.nn as nn

from ..calibration import shards
from ..calibration.automatic import random_tokens
from ..calibration.fit import sample_text
from ..calibration.moments import fast_on_cpu
from ..divergence import kl
from ..format.layout import RowLayout
from ..format.spec import Spec
from ..stock import CachePath
from .report import Report, layer_ranges

TOKENS = 512  # read to measure, fed in chunks so that packed history is read
CHUNK = 64
NOISE = 1e-6  # nats a token; a smaller difference is rounding of fp32 sums
STEPS = ("int3", "k4v3", "int4", "k5v4", "int5", "k8v4", "int8")  # by bytes


def bits_by_spec(spec: Spec, paths: list[CachePath]) -> dict[CachePath, str]:
    """The bits of every cache that the spec does not skip. Raises ValueError if the spec names a
    layer that is not in ``paths``, or skips all."""
    layers = sorted({path[0] for path in paths})
    names: dict[int | str, int] = {"first": layers[0], "last": layers[-1]}
    chosen = {}
    for option in ("skip", "high"):
        chosen[option] = {names.get(layer, layer) for layer in getattr(spec, option)}
        if unknown := chosen[option] - set(layers):
            raise ValueError(
                f"{spec}: {option} names layer {min(map(int, unknown))}; the layers that can be "
                f"packed are {layer_ranges(layers)}."
            )
    bits = {
        path: "int8" if path[0] in chosen["high"] else spec.bits
        for path in paths
        if path[0] not in chosen["skip"]
    }
    if not bits:
        raise ValueError(f"{spec} skips every layer: use 'fp16'.")
    return bits


def bits_by_policy(
    policy: Mapping[CachePath, str], paths: list[CachePath], report: Report, model: nn.Module
) -> dict[CachePath, str]:
    """The bits of every cache in ``paths`` that the policy names; ``policy`` is of the whole model.
    Raises ValueError if the policy is not valid, or names a cache that cannot be packed."""
    for path, bits in policy.items():
        if not isinstance(path, tuple) or not all(type(n) is int and n >= 0 for n in path):
            raise ValueError(f"policy names caches by paths such as (0,), got {path!r}.")
        if bits not in STEPS:
            raise ValueError(f"policy of {path} is one of {', '.join(STEPS)}, got {bits!r}.")
    local = shards.local_paths(policy, model)
    if not shards.is_sharded(model) and (unknown := sorted(set(local) - set(paths))):
        layer = unknown[0][0]
        reason = report.left.get(layer)
        raise ValueError(
            f"Layer {layer} is to be packed, but "
            + (f"cannot be: {reason}." if reason else "this model has no such cache.")
        )
    return {path: local[path] for path in paths if path in local}


def allocate(
    model: nn.Module,
    make_caches: Callable[[dict[CachePath, str]], list],
    bits: Mapping[CachePath, str],
    layouts: Mapping[CachePath, Mapping[str, RowLayout]],
    budget: float,
    tokenizer=None,
) -> dict[CachePath, str]:
    """Raise ``bits``, cache by cache, until ``budget`` bits per value, scales included, are spent.
    ``make_caches`` packs the caches whose bits it is given, ``layouts`` are their rows for those of
    :func:`steps_from` them that can be packed. Raises ValueError if the budget does not even cover
    ``bits``."""
    values = sum(rows[bits[p]].k_dim + rows[bits[p]].v_dim for p, rows in layouts.items())
    size = {(p, b): 32 * row.words for p, rows in layouts.items() for b, row in rows.items()}
    spent = sum(size[p, b] for p, b in bits.items())
    if spent > budget * values:
        raise ValueError(
            f"A budget of {budget:g} bits per value is less than the {spent / values:.2f} of the "
            "spec: raise it, or take a larger group_size."
        )
    # Head sizes or groups that narrow codes cannot pack leave their steps to no cache.
    steps = tuple(
        step
        for step in steps_from(min(bits.values(), key=STEPS.index))
        if all((p, step) in size for p, b in bits.items() if step in steps_from(b))
    )
    with fast_on_cpu(model):
        cost = _measure(model, make_caches, bits, steps, tokenizer)
    found = []
    for fewer, more in combinations_with_replacement(steps, 2):
        start = {p: max(b, fewer, key=STEPS.index) for p, b in bits.items()}
        if sum(size[p, b] for p, b in start.items()) <= budget * values:
            found.append(_raised(start, more, size, cost, budget * values))
    found.sort(key=lambda chosen: sum(size[p, b] for p, b in chosen.items()))

    def total(chosen: dict[CachePath, str]) -> float:
        return sum(cost[p, b] for p, b in chosen.items())

    best = found[0]
    for chosen in found[1:]:  # more bytes are to bring something
        if total(chosen) < total(best) - NOISE:
            best = chosen
    return best


def _raised(
    bits: Mapping[CachePath, str],
    more: str,
    size: Mapping[tuple[CachePath, str], int],
    cost: Mapping[tuple[CachePath, str], float],
    room: float,
) -> dict[CachePath, str]:
    """``bits`` with ``more`` for the caches that gain most by it, as many as there is ``room`` for,
    in bits a token."""
    chosen = dict(bits)
    room -= sum(size[p, b] for p, b in bits.items())
    steps = []
    for p, b in bits.items():
        if more in steps_from(b)[1:] and (gain := cost[p, b] - cost[p, more]) > NOISE:
            steps.append((gain / (size[p, more] - size[p, b]), p))
    for _, p in sorted(steps, reverse=True):
        if (extra := size[p, more] - size[p, chosen[p]]) <= room:
            chosen[p] = more
            room -= extra
    return chosen


def steps_from(bits: str) -> tuple[str, ...]:
    """Those of ``STEPS`` that a cache of these bits may get for a budget."""
    return STEPS[STEPS.index(bits) :]


def _measure(model, make_caches, bits, steps, tokenizer) -> dict[tuple[CachePath, str], float]:
    """Mean KL with one cache packed, for every cache and every one of ``steps`` it may get."""
    if tokenizer is None:
        tokens = random_tokens(model)[:TOKENS]
    else:
        tokens = mx.array(tokenizer.encode(sample_text())[:TOKENS])

    def log_probabilities(packed: dict[CachePath, str]) -> mx.array:
        caches = make_caches(packed)
        parts = []
        for i in range(0, tokens.size, CHUNK):
            logits = model(tokens[None, i : i + CHUNK], cache=caches)[0]
            parts.append(nn.log_softmax(logits.astype(mx.float32), axis=-1))
            mx.eval(parts[-1])
        return mx.concatenate(parts)

    exact = log_probabilities({})
    return {
        (p, step): kl(exact, log_probabilities({p: step})).mean().item()  # type: ignore[misc]
        for p, b in bits.items()
        for step in steps_from(b)
        if step in steps
    }
