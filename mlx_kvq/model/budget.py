"""Spending a byte budget on the layers whose quantization costs most.

The KL of each packed cache alone is measured once per number of bits on a short text. Then the
step from ``int4`` to ``k8v4`` to ``int8`` with the largest drop of KL per byte is taken, again and
again, until the next one does not fit the budget.
"""

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn

from ..calibration.automatic import random_tokens
from ..calibration.fit import sample_text
from ..calibration.moments import fast_on_cpu
from ..divergence import kl
from ..format.layout import RowLayout
from ..stock import CachePath

TOKENS = 512  # read to measure, fed in chunks so that packed history is read
CHUNK = 64
NOISE = 1e-6  # nats a token; a smaller difference is rounding of fp32 sums
STEPS = ("int4", "k8v4", "int8")


def allocate(
    model: nn.Module,
    make_caches: Callable[[dict[CachePath, str]], list],
    bits: Mapping[CachePath, str],
    layouts: Mapping[CachePath, Mapping[str, RowLayout]],
    budget: float,
    tokenizer=None,
) -> dict[CachePath, str]:
    """Raise the bits of some caches until ``budget`` bits per value, scales included, are spent.

    Args:
        make_caches: Makes the model's caches, packed with the bits given and otherwise its own.
        bits: Cache -> ``"int4"``, ``"k8v4"`` or ``"int8"``, the least it gets.
        layouts: Cache -> bits -> its packed row.

    Raises:
        ValueError: If the budget does not even cover ``bits``.
    """
    bits = dict(bits)
    values = sum(rows[bits[p]].k_dim + rows[bits[p]].v_dim for p, rows in layouts.items())
    size = {p: {b: 32 * rows[b].words for b in STEPS} for p, rows in layouts.items()}
    spent = sum(size[p][b] for p, b in bits.items())
    if spent > budget * values:
        raise ValueError(
            f"A budget of {budget:g} bits per value is less than the {spent / values:.2f} of the "
            "spec: raise it, or take a larger group_size."
        )
    with fast_on_cpu(model):
        cost = _measure(model, make_caches, bits, tokenizer)
    while True:
        steps = []
        for p, b in bits.items():
            for better in STEPS[STEPS.index(b) + 1 :]:
                extra = size[p][better] - size[p][b]
                gain = cost[p, b] - cost[p, better]
                if gain > NOISE and spent + extra <= budget * values:
                    steps.append((gain / extra, p, better, extra))
        if not steps:
            return bits
        _, p, better, extra = max(steps)
        bits[p] = better
        spent += extra


def _measure(model, make_caches, bits, tokenizer) -> dict[tuple[CachePath, str], float]:
    """Mean KL with one cache packed, for every cache and every number of bits it may get."""
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
        for step in STEPS[STEPS.index(b) :]
    }
