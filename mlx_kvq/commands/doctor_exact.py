"""The operations in float64, on a CPU, for doctor to compare with. Of the backends only the plain
dequantize is used: a code times its scale has fewer bits than fp32 holds."""

import mlx.core as mx
import numpy as np

from .. import ops
from ..format.format import Format
from ..format.transform import Transform

_plain = ops.BACKENDS["plain"]


def float64(x: mx.array | None) -> np.ndarray | None:
    return None if x is None else np.array(x.astype(mx.float32)).astype(np.float64)


def of(x: mx.array) -> np.ndarray:
    found = float64(x)
    assert found is not None
    return found


class Side:
    """A transform in float64; its matrix has been rounded to fp32."""

    def __init__(self, side: Transform):
        R = side.matrix
        self.R = np.eye(side.dim) if R is None else of(R)
        c = side.calibration
        self.mu, self.sigma, self.lam = (float64(a) for a in (c.mu, c.sigma, c.lam))

    def forward(self, x: np.ndarray) -> np.ndarray:
        x = (x - _heads(self.mu, x, 0.0)) / _heads(self.sigma, x)
        return (x @ self.R.T) * _heads(self.lam, x)

    def query(self, q: np.ndarray) -> np.ndarray:
        return ((q * _heads(self.sigma, q)) @ self.R.T) / _heads(self.lam, q)

    def output(self, y: np.ndarray) -> np.ndarray:
        x = (y / _heads(self.lam, y)) @ self.R
        return x * _heads(self.sigma, x) + _heads(self.mu, x, 0.0)


def _heads(c: np.ndarray | None, x: np.ndarray, neutral: float = 1.0) -> np.ndarray | float:
    """A row of c [Hkv, D] for each head of x [B, H, L, D]."""
    return neutral if c is None else np.repeat(c, x.shape[1] // len(c), axis=0)[:, None]


def rotated(packed: ops.Packed) -> tuple[np.ndarray, np.ndarray]:
    """All keys and values in the rotated domain, in the order of rows; the newest from the tail."""
    with mx.stream(mx.cpu):
        keys, values = (of(x) for x in _plain.dequantize(packed))
    return keys, values


def restored(packed: ops.Packed) -> tuple[np.ndarray, np.ndarray]:
    keys, values = rotated(packed)
    return Side(packed.format.keys).output(keys), Side(packed.format.values).output(values)


def tail(k: mx.array, v: mx.array, fmt: Format, before: mx.array | None, size: int) -> np.ndarray:
    """The exact tail after these tokens, [B, H, size, Dk + Dv]; zeros before the first token."""
    new = np.concatenate([Side(fmt.keys).forward(of(k)), Side(fmt.values).forward(of(v))], axis=3)
    shape = *new.shape[:2], size, new.shape[3]
    old = np.zeros(shape) if before is None else of(before)
    return np.concatenate([old, new], axis=2)[:, :, -size:]


def attend(
    q: mx.array, packed: ops.Packed, scale: float, mask: ops.Mask, sinks: mx.array | None
) -> np.ndarray:
    """Attention of q [B, Hq, L, Dk] -> [B, Hq, L, Dv]."""
    fmt, (B, Hq, L, _) = packed.format, q.shape
    order = _order(packed)
    whole = rotated(ops.Packed(packed.rows, packed.length, fmt))
    rows = [np.repeat(x[:, :, order], Hq // x.shape[1], axis=1) for x in whole]
    exact = None
    if packed.tail is not None:
        exact = np.repeat(of(packed.tail), Hq // packed.tail.shape[1], axis=1)
    queries, outputs = Side(fmt.keys).query(of(q)), []
    seen, added = _seen(mask, (B, Hq, L, packed.length), order)
    for i in range(L):
        K, V = (x.copy() for x in rows)
        if packed.first is not None:
            _put_first(K, V, packed.first)
        if exact is not None:
            keep = (packed.ring or (0, 0))[0]
            recent = fmt.recent_at(packed.length - L + 1 + i)
            n = min(recent + L - 1 - i, packed.length - keep)
            K[:, :, -n:], V[:, :, -n:] = np.split(exact[:, :, -n:], [fmt.layout.k_dim], axis=3)
        logits = np.einsum("bhd,bhtd->bht", queries[:, :, i], K) * scale + added[:, :, i]
        logits = np.where(seen[:, :, i], logits, -np.inf)
        extra = np.full((B, Hq, 1), -np.inf) if sinks is None else np.tile(of(sinks), (B, 1))
        logits = np.concatenate([logits, extra.reshape(B, Hq, 1)], axis=2)
        p = np.exp(logits - logits.max(axis=2, keepdims=True))
        p /= p.sum(axis=2, keepdims=True)
        outputs.append(np.einsum("bht,bhtd->bhd", p[..., :-1], V))
    side = Side(fmt.values)
    out = side.output(np.stack(outputs, axis=2))
    if (
        sinks is not None and side.mu is not None
    ):  # a sink's probability adds no value, nor a centre
        raise ValueError("Sinks beside a centre of values are not among doctor's cases.")
    return out


def _put_first(K: np.ndarray, V: np.ndarray, first: ops.First) -> None:
    """The exact first tokens in place of their rows; K and V in the order of the tokens."""
    array = np.repeat(of(first.array), K.shape[1] // first.array.shape[1], axis=1)
    for b, place in enumerate(np.broadcast_to(np.array(first.at), len(K))):
        to = slice(place, place + first.count)
        K[b, :, to], V[b, :, to] = np.split(array[b, :, : first.count], [K.shape[3]], axis=2)


def _order(packed: ops.Packed) -> np.ndarray:
    """Rows by the age of their tokens."""
    keep, idx = packed.ring or (0, packed.length)
    at = np.arange(packed.length)
    return np.concatenate([at[:keep], at[idx:], at[keep:idx]])


def _seen(mask: ops.Mask, shape: tuple, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What queries may see, and what is added to their logits, both [B, Hq, L, length]."""
    L, length = shape[2:]
    query, key = np.arange(length - L, length)[:, None], np.arange(length)
    seen, added = np.ones(shape, bool), np.zeros(shape)
    if mask.causal:
        seen &= key <= query
    if mask.window is not None:
        seen &= key > query - mask.window
    if mask.starts is not None:
        seen &= key >= np.array(mask.starts)[:, None, None, None]
    if mask.array is not None and mask.array.dtype == mx.bool_:
        seen &= np.broadcast_to(np.array(mask.array), shape)[..., order]
    elif mask.array is not None:
        added += np.broadcast_to(of(mask.array), shape)[..., order]
    return seen, added
