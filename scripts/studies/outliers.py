"""Key outliers that do not change what a model computes, only what its cache has to hold.

Real Qwen2/2.5 checkpoints have huge key outliers. Two edits make the same failure in any small
model, so that whatever is lost afterwards is the cache's loss.
"""

import mlx.core as mx
import mlx.nn as nn

SCALE, PAIRS = 30.0, 2
BIAS = 200.0


def make_outlier(model: nn.Module, kind: str) -> nn.Module:
    """Give a model from ``mlx_lm.load`` (unquantized weights) key outliers, in place.

    Args:
        model: llama, qwen2 or gemma3_text as mlx-lm has them.
        kind (str): ``"scale"``: two RoPE pairs (i, i + D/2) of every key are 30 times larger
            and the same channels of the queries 30 times smaller; the logits are the same to
            rounding. ``"bias"``: 200 is added to the keys of the first and the last layer in
            the two pairs of lowest frequency, whose angle hardly moves over the context.
            ``"none"`` changes nothing.
    """
    if kind not in ("none", "scale", "bias"):
        raise ValueError(f"An outlier is 'scale', 'bias' or 'none', got {kind!r}.")
    layers = model.layers
    for i, layer in enumerate(layers):
        if kind == "scale":
            _scale(layer.self_attn)
        elif kind == "bias" and i in (0, len(layers) - 1):
            _bias(layer.self_attn)
    mx.eval(model.parameters())
    return model


def _head_dim(attention: nn.Module) -> int:
    return attention.k_proj.weight.shape[0] // attention.n_kv_heads


def _channels(D: int, pairs: list[int]) -> mx.array:
    """1 in both channels of the RoPE pairs, else 0, [D]."""
    marked = mx.zeros(D)
    for i in pairs:
        marked[i] = marked[i + D // 2] = 1.0
    return marked


def _scale(attention: nn.Module) -> None:
    D = _head_dim(attention)
    # Where a pair turns by a radian in some ten tokens, and where it does in hundreds.
    factor = 1 + (SCALE - 1) * _channels(D, [D // 8, D // 4][:PAIRS])
    if hasattr(attention, "k_norm"):  # Gemma: the norm's gain is 1 + weight
        for norm, f in ((attention.k_norm, factor), (attention.q_norm, 1 / factor)):
            norm.weight = ((1 + norm.weight) * f - 1).astype(norm.weight.dtype)
        return
    for proj, f in ((attention.k_proj, factor), (attention.q_proj, 1 / factor)):
        rows = mx.tile(f, proj.weight.shape[0] // D)
        proj.weight = (proj.weight * rows[:, None]).astype(proj.weight.dtype)
        if "bias" in proj:
            proj.bias = (proj.bias * rows).astype(proj.bias.dtype)


class _Shifted(nn.Module):
    """A norm whose output is moved by a constant."""

    def __init__(self, norm: nn.Module, shift: mx.array):
        super().__init__()
        self.norm = norm
        self.shift = shift

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(x) + self.shift.astype(x.dtype)


def _bias(attention: nn.Module) -> None:
    D = _head_dim(attention)
    shift = BIAS * _channels(D, [D // 2 - 1 - i for i in range(PAIRS)])
    if hasattr(attention, "k_norm"):  # the norm would undo a bias of k_proj
        attention.k_norm = _Shifted(attention.k_norm, shift)
        return
    proj = attention.k_proj
    shift = mx.tile(shift, proj.weight.shape[0] // D)
    had = proj.bias if "bias" in proj else mx.zeros_like(shift)
    proj.bias = (had + shift).astype(proj.weight.dtype)
