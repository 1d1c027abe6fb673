"""How far one prediction is from another."""

import mlx.core as mx


def kl(exact: mx.array, got: mx.array, p: mx.array | None = None) -> mx.array:
    """KL(exact || got) in nats, [...].

    Args:
        exact, got (mx.array): Log-probabilities, fp32 [..., vocabulary].
        p (mx.array, optional): The probabilities of ``exact``, if they are known.
    """
    return ((mx.exp(exact) if p is None else p) * (exact - got)).sum(axis=-1)
