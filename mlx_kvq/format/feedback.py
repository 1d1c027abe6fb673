"""Rounding that makes up for its own errors, weighted by the queries.

An error e of the stored key y costs ``E[(q̃ · e)²] = eᵀ M e`` with ``M = E[q̃ q̃ᵀ]``. With the
Cholesky factor ``M = Uᵀ U`` (U upper) the cost is the sum over blocks J of channels of

    | U_JJ (e_J + U_JJ⁻¹ U_JP e_P) |²,        P: the channels after J.

So blocks are rounded from the last to the first, each towards ``y_J + G_JP e_P`` with
``e = y − ŷ`` and ``G_JP = U_JJ⁻¹ U_JP``. The meaning of codes and scales stays the same.

The rule is that of GPTQ and LDLQ (Chee et al., arXiv 2307.13304), for a vector at a time.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from .transform import Calibration, Transform

BLOCK = 8  # channels rounded at once; 16 keeps two thirds of the gain
DAMPING = 0.1  # of the mean of M's diagonal: M is of two thousand tokens, and other text differs
WHITENING = 0.5


def matrix(keys: Transform) -> mx.array:
    """G of one layer's keys, fp32 [Hkv, D, D]; zero but right of the diagonal blocks."""
    c, D = keys.calibration, keys.dim
    # q̃ = A q with A = diag(1/λ) R diag(σ), the transform of the query.
    eye = mx.broadcast_to(mx.eye(D), (1, c.metric.shape[0], D, D))  # type: ignore[union-attr]
    A = np.array(keys.query(eye), dtype=np.float64)[0]  # [Hkv, D, D], row i: A's column i
    M = damped(A.swapaxes(-1, -2) @ np.array(c.metric, dtype=np.float64) @ A)
    G = np.zeros_like(M)
    for m, g in zip(M, G, strict=True):
        U = np.linalg.cholesky(m).T
        for j in range(0, D, BLOCK):
            J, P = slice(j, j + BLOCK), slice(j + BLOCK, D)
            g[J, P] = np.linalg.solve(U[J, J], U[J, P])
    return mx.array(G.astype(np.float32))


def damped(M: np.ndarray) -> np.ndarray:
    """M [Hkv, D, D] with ``DAMPING`` times the mean of its diagonal added to that."""
    D = M.shape[-1]
    return M + DAMPING * np.trace(M, axis1=1, axis2=2)[:, None, None] / D * np.eye(D)


def whitened(keys: Calibration) -> Calibration:
    """With feedback errors follow the keys' spread less: σ is the geometric mean of the balanced
    scale and the keys' standard deviation, √E[x²] = σ² √E[q²]."""
    if keys.metric is None or keys.sigma is None:
        return keys
    q2 = np.einsum("hdd->hd", np.array(keys.metric, dtype=np.float64))
    sigma = np.log(np.array(keys.sigma, dtype=np.float64))
    spread = 2 * sigma + np.log(np.maximum(q2, 1e-6 * q2.mean(axis=-1, keepdims=True))) / 2
    log = (1 - WHITENING) * sigma + WHITENING * spread
    log = log - log.mean(axis=-1, keepdims=True)
    return replace(keys, sigma=mx.array(np.exp(log).astype(np.float32)))
