"""Rotations fitted to calibration vectors: learned, or a fast one with chosen signs or seed.

All of them lower the same thing, the scales that groups of rotated channels need. Source of the
parametrization: Cayley, R = (I − A)(I + A)⁻¹ is orthogonal for every skew A. ``README.md``
has what each brings.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_kvq.format import levels, rotation
from mlx_kvq.format.layout import choose_group
from mlx_kvq.format.spec import Spec

BATCH, RATE = 1024, 0.01
ROUNDS = 3  # over all channels, when signs are chosen


@dataclass
class Samples:
    """What calibration text gave for the keys, or the values, of one layer.

    Args:
        x (mx.array): Vectors, fp32 [H, n, D].
        weight (mx.array): What an error e costs, eᵀ C e, with C fp32 [H, D, D]: for keys
            E[q qᵀ] over the queries that share the head, for values the Gram matrix of the
            columns of o_proj that read it.
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
    s: Samples,
    R: mx.array | None,
    lam: mx.array | None = None,
    *,
    bits: int = 4,
    group: int,
    rule: str = "search",
) -> tuple[float, float]:
    """Relative squared error of x, and the same weighted by what it costs, with R and λ.

    Args:
        R (mx.array, optional): fp32 [D, D].
        lam (mx.array, optional): fp32 [D].
    """
    y = s.balanced
    y = y if R is None else y @ R.T
    y = y if lam is None else y * lam
    codes, scales = levels.quantize(y, bits, group, rule)
    middle = (1 << (bits - 1)) - (0.0 if rule == "paper" else 0.5)
    steps = mx.repeat(scales.astype(mx.float32), group, axis=-1)
    e = (codes.astype(mx.float32) - middle) * steps - y
    e = e if lam is None else e / lam
    e = (e if R is None else e @ R) * s.sigma[:, None]
    plain = mx.square(e).sum() / mx.square(s.x).sum()
    weighted = ((e @ s.weight) * e).sum() / ((s.x @ s.weight) * s.x).sum()
    return float(plain.item()), float(weighted.item())  # type: ignore[arg-type]


def _loss(R, log_lam, x, weight, sigma, group):
    """Weighted squared error at abs-max scales. The rounding residual of a code, in units of its
    scale, counts as a constant: the gradient says how to make the scales small where it matters.
    """
    lam = mx.exp(log_lam)
    y = (x @ R.T) * lam
    groups = y.reshape(*y.shape[:-1], -1, group)
    scale = mx.abs(groups).max(axis=-1, keepdims=True) / 7.5
    n = groups / mx.maximum(scale, 1e-12)
    residual = mx.stop_gradient(mx.clip(mx.floor(n), -8, 7) + 0.5 - n)
    e = (residual * scale).reshape(y.shape) / lam
    e = (e @ R) * sigma[:, None]
    return ((e @ weight) * e).sum(axis=-1).mean()


def learn_rotation(
    s: Samples,
    base: mx.array | None = None,
    *,
    group: int,
    weighted: bool = True,
    with_lambda: bool = False,
    steps: int = 200,
    seed: int = 0,
) -> tuple[mx.array, mx.array | None]:
    """R fp32 [D, D] and λ [D] (or None) with a low error on ``s``, by Adam from ``base``.

    Args:
        s (Samples): Some thousand vectors, after which nothing more is gained.
        base (mx.array, optional): Where to start, fp32 [D, D]; ``None`` is the identity.
        group (int): Channels that share a scale.
        weighted (bool): Lower the error of logits or outputs; else that of x.
        with_lambda (bool): Learn λ as well.
        steps (int): Of 1024 vectors per head.
        seed (int): Of the choice of vectors.
    """
    H, n, D = s.x.shape
    generator = np.random.default_rng(seed)
    eye = np.eye(D)
    B = eye if base is None else np.array(base, dtype=np.float64)
    weight = s.weight if weighted else mx.broadcast_to(mx.eye(D), (H, D, D))
    A, log_lam = np.zeros((D, D)), np.zeros(D)
    turn, stretch = _adam(A), _adam(log_lam)
    gradient = mx.value_and_grad(_loss, argnums=(0, 1))
    z = s.balanced
    for step in range(steps):
        inverse = np.linalg.inv(eye + A)
        C = (eye - A) @ inverse
        R = mx.array((C @ B).astype(np.float32))
        rows = mx.array(generator.integers(0, n, BATCH))
        lam = mx.array(log_lam.astype(np.float32))
        _, (g_R, g_lam) = gradient(R, lam, z[:, rows], weight, s.sigma, group)
        # dC = −(I + C) dA (I + A)⁻¹, and A stays skew.
        g_C = np.array(g_R, dtype=np.float64) @ B.T
        g_A = -(eye + C).T @ g_C @ inverse.T
        rate = RATE * 0.5 * (1 + np.cos(np.pi * (step + 1) / steps))
        A -= rate * turn(g_A - g_A.T)
        if with_lambda:
            log_lam -= rate * stretch(np.array(g_lam, dtype=np.float64))
    C = (eye - A) @ np.linalg.inv(eye + A)
    R = mx.array((C @ B).astype(np.float32))
    return R, mx.array(np.exp(log_lam).astype(np.float32)) if with_lambda else None


def _adam(like: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Kingma and Ba (2015): gradient -> step of about ±1."""
    mean, square, n = np.zeros_like(like), np.zeros_like(like), 0

    def step(g: np.ndarray) -> np.ndarray:
        nonlocal mean, square, n
        n += 1
        mean = 0.9 * mean + 0.1 * g
        square = 0.99 * square + 0.01 * g**2
        return mean / (1 - 0.9**n) / (np.sqrt(square / (1 - 0.99**n)) + 1e-12)

    return step


def choose_signs(s: Samples, R: mx.array, *, group: int) -> mx.array:
    """Which channels to negate before R so that the scales are small, ±1 fp32 [H, D].

    Coordinate descent: a channel is negated where that lowers the mean square of the groups'
    largest magnitudes. A negative σ does the negation, so it costs nothing at run time.
    """
    generator = np.random.default_rng(0)
    columns = np.array(R).T  # what a channel adds to y

    def loss(y: np.ndarray) -> float:
        return float(np.square(np.abs(y.reshape(len(y), -1, group)).max(axis=-1)).sum())

    found = []
    for z in np.array(s.balanced):
        z = z[generator.choice(len(z), min(len(z), BATCH), replace=False)]
        signs, y = np.ones(z.shape[1], np.float32), z @ columns
        best = loss(y)
        for _ in range(ROUNDS):
            before = best
            for j in generator.permutation(len(signs)):
                turned = y - 2 * signs[j] * np.outer(z[:, j], columns[j])
                if (now := loss(turned)) < best:
                    best, y, signs[j] = now, turned, -signs[j]
            if best == before:
                break
        found.append(signs)
    return mx.array(np.stack(found))


def choose_seed(
    layers: Sequence[tuple[Samples, Samples]], spec: Spec, seeds: Iterable[int] = range(8)
) -> int:
    """The seed of ``spec``'s rotation with the least weighted error, summed over layers.

    Args:
        layers (Sequence): (keys, values) of each packed layer.
        spec (Spec): Its own seed is not used.
        seeds (iterable of int): What to choose from; the first of equals.
    """

    def cost(seed: int) -> float:
        total = 0.0
        for sides in layers:
            for stream, (s, bits) in enumerate(zip(sides, (spec.k_bits, spec.v_bits), strict=True)):
                D = s.x.shape[2]
                R = rotation.matrix(spec.rotation, seed, stream, D)
                group = choose_group(D, spec.group_size)
                total += errors(s, R, bits=bits, group=group, rule=spec.scale)[1]
        return total

    return min(seeds, key=cost)
