"""Bits of every packed cache: from a spec's options, a given policy or a budget.

For a budget the caches' keys and values of a short text are rounded as each of ``STEPS`` would
round them. What that costs in KL says one backward pass (``calibration.gradients``): half the mean
square of what attention's outputs move by, times the gradient. It is the same pass for all, and
resolves what a trial of each could not in half precision. Then the bits with the least cost in all
are taken, of two kinds, or of three if that is ``WORTH`` it, since each kind is a set of kernels.
What the spec or its ``high`` says of a cache is not lowered.
"""

from collections.abc import Callable, Collection, Mapping
from itertools import combinations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from .. import ops
from ..calibration import shards
from ..calibration.automatic import random_tokens, tokenizer_of
from ..calibration.fit import sample_text
from ..calibration.gradients import Gradients, gradients
from ..calibration.moments import FIRST
from ..format.format import Format
from ..format.layout import RowLayout
from ..format.spec import Spec
from ..stock import CachePath, Shapes
from .report import Report, layer_ranges

TOKENS = 2048  # read for a budget, at most
WINDOW = 512  # of them at a time: a backward pass holds all that a forward pass computes
WORTH = 0.9  # to as much of the cost a third kind of rows is to lower it
NOTHING = 0.003  # of what the spec costs: for less, no byte is spent
STEPS = ("int3", "k4v3", "int4", "k5v4", "int5", "k8v4", "int8")  # by bytes

Layouts = Mapping[str, RowLayout]  # of one cache, by the name of its bits
Costs = Mapping[tuple[CachePath, str], float]  # KL in nats a token, with one cache packed so


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


def room_of(
    budget: float, bits: Mapping[CachePath, str], layouts: Mapping[CachePath, Layouts]
) -> int:
    """Words a token in all caches for ``budget`` bits per value, scales included. ``layouts`` are
    the caches' rows for those of :func:`steps_from` their ``bits`` that can be packed. Raises
    ValueError if the budget does not even cover ``bits``."""
    values = sum(rows[bits[p]].k_dim + rows[bits[p]].v_dim for p, rows in layouts.items())
    spent = sum(rows[bits[p]].words for p, rows in layouts.items())
    room = int(budget * values / 32)
    if spent > room:
        raise ValueError(
            f"A budget of {budget:g} bits per value is less than the {32 * spent / values:.2f} of "
            "the spec: raise it, begin with fewer bits as in 'int3:budget=3.5', or take a larger "
            "group_size."
        )
    return room


def allocate(
    bits: Mapping[CachePath, str], layouts: Mapping[CachePath, Layouts], cost: Costs, room: int
) -> dict[CachePath, str]:
    """Raise ``bits``, cache by cache, within ``room`` words a token, to where the ``cost`` is least
    in all; see :func:`room_of`."""
    words = {(p, b): row.words for p, rows in layouts.items() for b, row in rows.items()}
    nothing = NOTHING * sum(cost[item] for item in bits.items())

    def of(kinds: int) -> tuple[float, dict[CachePath, str]]:
        """The least cost with so many kinds of rows, and the bits."""
        found = []
        for some in combinations(STEPS, kinds):
            choices = {
                p: sorted({max(b, k, key=STEPS.index) for k in some} & layouts[p].keys())
                for p, b in bits.items()
            }
            if chosen := _cheapest(choices, words, cost, room, nothing):
                size, loss = (sum(each[item] for item in chosen.items()) for each in (words, cost))
                found.append((loss, size, chosen))
        least = min(loss for loss, *_ in found) + nothing
        loss, _, chosen = min((x for x in found if x[0] <= least), key=lambda x: x[1])
        return loss, chosen

    (two, best), (three, more) = of(2), of(3)
    return more if three < WORTH * two else best


def _cheapest(
    choices: dict[CachePath, list[str]],
    words: Mapping[tuple[CachePath, str], int],
    cost: Costs,
    room: int,
    nothing: float,
) -> dict[CachePath, str] | None:
    """One of the ``choices`` for every cache, of least cost in all, or ``nothing`` more if that
    takes fewer words; ``None`` if a cache has no choice, or they do not fit into ``room`` words a
    token."""
    if not all(choices.values()):
        return None
    least = np.where(np.arange(room + 1) == 0, 0.0, np.inf)  # cost of the caches so far, by words
    picks = []
    for p, steps in choices.items():
        options = np.full((len(steps), room + 1), np.inf)
        for option, step in zip(options, steps, strict=True):
            n = words[p, step]
            option[n:] = least[: max(0, room + 1 - n)] + cost[p, step]
        picks.append(options.argmin(axis=0))
        least = options.min(axis=0)
    if np.isinf(least.min()):
        return None
    at = int(np.argmax(least <= least.min() + nothing))
    chosen = {}
    for p, pick in zip(reversed(choices), reversed(picks), strict=True):
        chosen[p] = choices[p][pick[at]]
        at -= words[p, chosen[p]]
    return {p: chosen[p] for p in choices}


def steps_from(bits: str) -> tuple[str, ...]:
    """Those of ``STEPS`` that a cache of these bits may get for a budget."""
    return STEPS[STEPS.index(bits) :]


def costs(
    model: nn.Module,
    make_caches: Callable[[], list],
    shapes: Shapes,
    formats: Mapping[CachePath, Mapping[str, Format]],
    apart: Collection[CachePath],
    tokenizer=None,
    progress: bool = False,
) -> Costs:
    """What the rows of each of the ``formats`` cost, on the built-in text; without a tokenizer,
    given or loaded with the model, on random tokens. ``apart`` are the caches that the shared
    attention does not read. Raises ValueError for a part of a distributed model, or one without
    gradient."""
    if shards.is_sharded(model):
        raise ValueError("A budget is for a whole model; give a part of one a policy.")
    if (tokenizer := tokenizer_of(model, tokenizer)) is None:
        ids = random_tokens(model)
    else:
        ids = mx.array(tokenizer.encode(sample_text())[:TOKENS])
    found = {(path, step): 0.0 for path, steps in formats.items() for step in steps}
    starts = range(0, ids.size, WINDOW)
    for i in tqdm(starts, "budget", unit="window", disable=not progress, leave=False):
        window = ids[i : i + WINDOW]
        exact = {
            path: min(max(fmt.recent for fmt in steps.values()), window.size // 2)
            for path, steps in formats.items()
        }
        by_cache = gradients(model, make_caches, shapes, window, exact, apart, seed=i)
        for path, steps in formats.items():
            losses = _losses(by_cache.pop(path), steps.values())
            for step, loss in zip(steps, losses, strict=True):
                found[path, step] += loss / ids.size
        mx.clear_cache()
    if not all(map(np.isfinite, found.values())):
        raise ValueError("The gradients of this model are not finite in its dtype: give a policy.")
    return found


def _losses(g: Gradients, formats) -> list[float]:
    """Nats that rounding these keys and values costs in all, for each format. What two formats have
    in common is rounded once."""
    sides: dict[tuple, float] = {}
    losses = []
    for fmt in formats:
        lay = fmt.layout
        names = ("keys", lay.k_bits, lay.k_group), ("values", lay.v_bits, lay.v_group)
        if not sides.keys() >= set(names):
            for side, (name, error) in enumerate(zip(names, _errors(g, fmt), strict=True)):
                if name not in sides:
                    sides[name] = float(g.cost(side, error))
        losses.append(sum(sides[name] for name in names))
    return losses


def _errors(g: Gradients, fmt: Format) -> list[mx.array]:
    """Of rounded keys and values, but for the first tokens, which caches keep exactly."""
    with ops.reference():  # kernels would be compiled for this alone
        rows, _ = ops.quantize_pack(g.keys, g.values, fmt)
        made = ops.restore(ops.Packed(rows, g.keys.shape[2], fmt))
    rounds = (mx.arange(g.keys.shape[2]) >= FIRST)[:, None]
    return [mx.where(rounds, got - x, 0.0) for got, x in zip(made, (g.keys, g.values), strict=True)]
