"""Learned rotations, for ``rotation_study.py``: R = Cayley(A) · base, and λ, by gradient descent;
and chosen signs for a fast rotation.

R = (I − A)(I + A)⁻¹ with A skew is orthogonal whatever A is (Cayley). The rounding residual of a
code, in units of its scale, is taken as a constant; the gradient then goes through the scales:
what is learned is how to make the groups' largest magnitudes small where it matters.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_kvq import reference

BATCH, RATE = 1024, 0.01


@dataclass
class Samples:
    """What one layer's calibration text gave, for keys or for values.

    Args:
        x (mx.array): Vectors, fp32 [H, n, D].
        weight (mx.array): What an error e costs, eᵀ C e: C fp32 [H, D, D]. For keys
            E[q qᵀ] over the queries, for values the Gram matrix of o_proj.
        mu, sigma (mx.array): fp32 [H, D].
    """

    x: mx.array
    weight: mx.array
    mu: mx.array
    sigma: mx.array

    @property
    def balanced(self) -> mx.array:
        """(x − μ) ⊘ σ."""
        return (self.x - self.mu[:, None]) / self.sigma[:, None]


def errors(
    s: Samples, R: mx.array | None, lam: mx.array | None, group: int, rule: str = "search"
) -> tuple[float, float]:
    """Relative squared error of x and the relative weighted one, after int4 with R and λ."""
    z = s.balanced
    y = z if R is None else z @ R.T
    y = y if lam is None else y * lam
    codes, scales = reference.quantize(y, 4, group, rule)
    middle = 8.0 if rule == "paper" else 7.5
    got = (codes.astype(mx.float32) - middle) * mx.repeat(scales.astype(mx.float32), group, axis=-1)
    e = got - y
    e = e if lam is None else e / lam
    e = (e if R is None else e @ R) * s.sigma[:, None]
    plain = mx.square(e).sum() / mx.square(s.x).sum()
    weighted = ((e @ s.weight) * e).sum() / ((s.x @ s.weight) * s.x).sum()
    return plain.item(), weighted.item()


def _loss(R, log_lam, x, weight, sigma, group):
    lam = mx.exp(log_lam)
    y = (x @ R.T) * lam
    groups = y.reshape(*y.shape[:-1], -1, group)
    scale = mx.abs(groups).max(axis=-1, keepdims=True) / 7.5
    n = groups / mx.maximum(scale, 1e-12)
    residual = mx.stop_gradient(mx.clip(mx.floor(n), -8, 7) + 0.5 - n)
    e = (residual * scale).reshape(y.shape) / lam
    e = (e @ R) * sigma[:, None]
    return ((e @ weight) * e).sum(axis=-1).mean()


def learn(
    s: Samples,
    base: mx.array,
    *,
    group: int,
    objective: str,
    with_lambda: bool,
    steps: int = 300,
    seed: int = 0,
) -> tuple[mx.array, mx.array | None]:
    """R [D, D] and λ [D] (or None) that lower the error on ``s``, starting from ``base``.

    Args:
        objective (str): ``"mse"``, the squared error of x, or ``"weighted"``, that of logits or
            outputs.
    """
    H, n, D = s.x.shape
    generator = np.random.default_rng(seed)
    eye, B = np.eye(D), np.array(base, dtype=np.float64)
    weight = mx.broadcast_to(mx.eye(D), (H, D, D)) if objective == "mse" else s.weight
    # The size of the loss does not matter to Adam.
    A, log_lam = np.zeros((D, D)), np.zeros(D)
    moments = [np.zeros_like(p) for p in (A, A, log_lam, log_lam)]
    gradient = mx.value_and_grad(_loss, argnums=(0, 1))
    z = s.balanced
    for step in range(1, steps + 1):
        inverse = np.linalg.inv(eye + A)
        C = (eye - A) @ inverse
        rows = mx.array(generator.integers(0, n, BATCH))
        _, (g_R, g_lam) = gradient(
            mx.array((C @ B).astype(np.float32)),
            mx.array(log_lam.astype(np.float32)),
            z[:, rows],
            weight,
            s.sigma,
            group,
        )
        # dC = −(I + C) dA (I + A)⁻¹, and A stays skew.
        g_C = np.array(g_R, dtype=np.float64) @ B.T
        g_A = -(eye + C).T @ g_C @ inverse.T
        g_A = g_A - g_A.T
        rate = RATE * 0.5 * (1 + np.cos(np.pi * step / steps))
        A -= rate * _adam(g_A, moments, 0, step)
        if with_lambda:
            log_lam -= rate * _adam(np.array(g_lam, dtype=np.float64), moments, 2, step)
    C = (eye - A) @ np.linalg.inv(eye + A)
    R = mx.array((C @ B).astype(np.float32))
    return R, mx.array(np.exp(log_lam).astype(np.float32)) if with_lambda else None


def choose_signs(s: Samples, R: mx.array, *, group: int) -> mx.array:
    """Which channels to negate before R so that the scales are small, ±1 [H, D].

    Coordinate descent: a channel is negated where that lowers the mean square of the groups'
    largest magnitudes; three rounds over the channels at most. A negative σ does the negation,
    so it costs nothing when a vector is stored or read.
    """
    generator = np.random.default_rng(0)
    columns = np.array(R).T  # what a channel adds to y

    def loss(y):
        return np.square(np.abs(y.reshape(len(y), -1, group)).max(axis=-1)).sum()

    found = []
    for z in np.array(s.balanced):
        z = z[generator.choice(len(z), min(len(z), BATCH), replace=False)]
        signs, y = np.ones(z.shape[1], np.float32), z @ columns
        best = loss(y)
        for _ in range(3):
            before = best
            for j in generator.permutation(len(signs)):
                turned = y - 2 * signs[j] * np.outer(z[:, j], columns[j])
                if (now := loss(turned)) < best:
                    best, y, signs[j] = now, turned, -signs[j]
            if best == before:
                break
        found.append(signs)
    return mx.array(np.stack(found))


def _adam(g: np.ndarray, moments: list[np.ndarray], i: int, step: int) -> np.ndarray:
    moments[i] = 0.9 * moments[i] + 0.1 * g
    moments[i + 1] = 0.99 * moments[i + 1] + 0.01 * g**2
    m, v = moments[i] / (1 - 0.9**step), moments[i + 1] / (1 - 0.99**step)
    return m / (np.sqrt(v) + 1e-12)
