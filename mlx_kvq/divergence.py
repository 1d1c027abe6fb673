"""How far one prediction is from another."""

import mlx.core as mx


def kl(exact: mx.array, got: mx.array) -> mx.array:
    """KL(exact || got) in nats, [...], of log-probabilities fp32 [..., vocabulary]."""
    return (mx.exp(exact) * (exact - got)).sum(axis=-1)
