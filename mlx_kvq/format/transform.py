"""A layer's transform between vectors and what is stored of them: μ, σ, λ and the rotation."""

from dataclasses import dataclass, fields
from functools import cached_property

import mlx.core as mx

from . import rotation


@dataclass(frozen=True, eq=False)
class Calibration:
    """Per KV head and channel, fp32 [Hkv, D]; ``None`` stands for the neutral value.

    y = λ ⊙ R((x − μ) ⊘ σ), separately for keys and values.
    """

    mu: mx.array | None = None
    sigma: mx.array | None = None
    lam: mx.array | None = None
    # E[q qᵀ], [Hkv, D, D]: not part of the transform, used to choose codes (format.feedback).
    metric: mx.array | None = None

    def arrays(self) -> dict[str, mx.array]:
        """The arrays that are not None, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: a for name, a in named.items() if a is not None}


@dataclass(frozen=True, eq=False)
class Transform:
    """The way from an exact vector x to the vector y whose codes are kept, and back."""

    rotation: str
    seed: int
    stream: int
    dim: int
    calibration: Calibration = Calibration()

    @cached_property
    def matrix(self) -> mx.array | None:
        return rotation.matrix(self.rotation, self.seed, self.stream, self.dim)

    def forward(self, x: mx.array) -> mx.array:
        """x [B, H, L, D] in any float dtype -> y = λ ⊙ R((x − μ) ⊘ σ), fp32."""
        c = self.calibration
        x = _per_kv_head(mx.subtract, x.astype(mx.float32), c.mu)
        return _per_kv_head(mx.multiply, self._rotate(_per_kv_head(mx.divide, x, c.sigma)), c.lam)

    def query(self, q: mx.array) -> mx.array:
        """q [B, Hq, L, D] -> q̃ = R(q ⊙ σ) ⊘ λ, fp32, so that q̃ · ŷ is the logit."""
        c = self.calibration
        q = _per_kv_head(mx.multiply, q.astype(mx.float32), c.sigma)
        return _per_kv_head(mx.divide, self._rotate(q), c.lam)

    def output(self, o: mx.array) -> mx.array:
        """o [B, Hq, L, D] = Σ p ŷ -> (Rᵀ(o ⊘ λ)) ⊙ σ + μ, fp32."""
        c = self.calibration
        o = _per_kv_head(mx.divide, o.astype(mx.float32), c.lam)
        if self._fast:
            o = rotation.srft_inverse(o, self.seed, self.stream)
        elif self.matrix is not None:
            o = o @ self.matrix
        return _per_kv_head(mx.add, _per_kv_head(mx.multiply, o, c.sigma), c.mu)

    @property
    def _fast(self) -> bool:
        return self.rotation == "srft" and mx.default_device().type == mx.DeviceType.cpu

    def _rotate(self, x: mx.array) -> mx.array:
        if self._fast:
            return rotation.srft(x, self.seed, self.stream)
        return x if self.matrix is None else x @ self.matrix.T


def _per_kv_head(op, x: mx.array, c: mx.array | None) -> mx.array:
    """``op`` of x [B, H, L, D] and c [Hkv, D]; heads of a group share a row of c, ``None`` is
    neutral."""
    if c is None:
        return x
    B, H, L, D = x.shape
    if c.shape[0] == H:
        return op(x, c[:, None])
    return op(x.reshape(B, c.shape[0], -1, L, D), c[:, None, None]).reshape(B, H, L, D)
