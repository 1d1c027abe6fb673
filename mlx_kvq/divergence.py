"""How far one prediction is from another."""

import mlx.core as mx


def kl(exact: mx.array, got: mx.array, p: mx.array | None = None) -> mx.array:
    """KL(exact || got) in nats, [...], of log-probabilities fp32 [..., vocabulary]; ``p`` is
    exp(exact), if it is known."""
    return ((mx.exp(exact) if p is None else p) * (exact - got)).sum(axis=-1)
