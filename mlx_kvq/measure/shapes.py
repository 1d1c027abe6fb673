"""Models with random weights in the shape of real ones: for speed, not for text."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import gemma3_text, llama, qwen2

SHAPES: dict[str, tuple[Any, dict]] = {
    "qwen2.5-0.5b": (qwen2, {
        "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24,
        "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "vocab_size": 151936,
    }),
    "qwen2.5-1.5b": (qwen2, {
        "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28,
        "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "vocab_size": 151936,
    }),
    # The defaults of gemma3_text are Gemma 3 1B.
    "gemma-3-1b": (gemma3_text, {"model_type": "gemma3_text"}),
    "llama-3.1-8b": (llama, {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "vocab_size": 128256, "rope_theta": 500000.0,
    }),
}  # fmt: skip


def random_model(shape: str, dtype: mx.Dtype = mx.float16, bits: int | None = None) -> nn.Module:
    """A model of ``shape`` with random weights, quantized to ``bits`` if given. Raises ValueError
    if the shape is unknown; the message lists what there is."""
    if shape not in SHAPES:
        raise ValueError(f"Unknown shape {shape!r}. Known: {', '.join(SHAPES)}.")
    module, args = SHAPES[shape]
    model = module.Model(module.ModelArgs(**args))
    # Small enough that activations stay finite in half precision over any depth.
    model.update(
        tree_map(lambda p: (0.02 * mx.random.normal(p.shape)).astype(dtype), model.parameters())
    )
    if bits is not None:
        nn.quantize(model, group_size=64, bits=bits)
    model.eval()
    mx.eval(model.parameters())
    return model
