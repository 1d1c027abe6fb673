"""A tiny random model of every family in mlx_lm.models, from one table of small sizes."""

import contextlib
import dataclasses
import importlib
import io
import math
import pkgutil
import typing
import unittest.mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

import mlx_kvq
from mlx_kvq.caches import seams

LAYERS = 4
WINDOW = 16  # of sliding layers

# What a field of that name gets in every family; other fields keep their default, or get the
# plainest value of their type.
SIZES: dict[str, typing.Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "hidden_dim": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "n_kv_heads": 2,
    "num_attention_groups": 2,
    "multi_query_attention": False,
    "head_dim": 32,
    "swa_head_dim": 32,
    "swa_v_head_dim": 32,
    "v_head_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
    "n_embd": 64,
    "n_inner": 128,
    "n_ctx": 512,
    "n_positions": 512,
    "block_size": 512,
    "d_model": 64,
    "model_max_length": 512,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "swa_rope_theta": 10000.0,
    "rope_scaling": None,
    "rotary_emb_base": 10000,
    "rotary_dim": 16,
    "rotary_pct": 0.5,
    "partial_rotary_factor": 0.5,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "window_size": WINDOW,
    "sliding_window_pattern": 2,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_shared_expert": 1,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 48,
    "expert_ffn_hidden_size": 48,
    "ffn_hidden_size": 96,
    "shared_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "ff_intermediate_size": 96,
    "block_dim": 64,
    "block_ff_dim": 96,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "n_group": 1,
    "n_groups": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    # latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 8,
    # recurrent layers
    "state_size": 16,
    "ssm_state_size": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "conv_kernel": 4,
    "conv_L_cache": 3,
    "conv1d_width": 4,
    "conv_window": 2,
    "time_step_rank": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "group_norm_size": 1,
    "layer_group_size": 2,
    "full_attention_interval": 2,
    "attn_layer_period": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attention_multiplier": 32**-0.5,
    "query_pre_attn_scalar": 32,
    "tie_word_embeddings": True,
    "conv_bias": True,
    "use_conv_bias": True,
}
PLAIN = {bool: False, int: 1, float: 1.0, str: "", list: [], dict: {}}
_MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)


def families() -> list[str]:
    """The modules of mlx_lm.models that are models, by name."""
    return [name for name in _modules() if _module(name) is not None]


def _modules() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__))


def _module(name: str):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module = importlib.import_module(f"mlx_lm.models.{name}")
    except (Exception, SystemExit):  # olmo ends the interpreter without its package
        return None
    return module if hasattr(module, "Model") and hasattr(module, "ModelArgs") else None


def build(name: str) -> nn.Module:
    """A model of the family with random fp32 weights, the same in every run."""
    from tests.support.family_settings import SETTINGS

    module = _module(name)
    mx.random.seed(0)
    given = SETTINGS.get(name, {})
    model = module.Model(module.ModelArgs.from_dict(_arguments(module.ModelArgs, name, given)))
    model.set_dtype(mx.float32)
    return _random(model)


def _random(model: nn.Module) -> nn.Module:
    """Matrices that neither vanish nor explode; zeros, as of biases and sinks, get values too."""
    changed = []
    for name, w in dict(tree_flatten(model.parameters())).items():
        if w.ndim >= 2 and mx.issubdtype(w.dtype, mx.floating):
            scale = 1.0 if "embed" in name or "wte" in name else math.sqrt(1 / w.shape[-1])
            changed.append((name, scale * mx.random.normal(w.shape)))
        elif "sink" in name:
            changed.append((name, mx.random.normal(w.shape)))
    model.update(tree_unflatten(changed))
    model.eval()
    mx.eval(model.parameters())
    return model


def _arguments(cls, name: str, given: dict) -> dict:
    kinds = typing.get_type_hints(cls)
    found = {"model_type": name}
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if f.name in given:
            found[f.name] = given[f.name]
        elif f.name in SIZES:
            found[f.name] = SIZES[f.name]
        elif f.name == "layer_types":
            found[f.name] = _MIXED
        elif required and f.name not in found:
            kind = typing.get_origin(kinds[f.name]) or kinds[f.name]
            found[f.name] = PLAIN.get(kind)
    return found | {k: v for k, v in given.items() if k not in found}


def text_config(module_name: str, cls: str = "ModelArgs", **given) -> dict:
    """The arguments of a language model inside another, as a config has them."""
    args = getattr(
        _module(module_name) or importlib.import_module(f"mlx_lm.models.{module_name}"), cls
    )
    return _arguments(args, module_name, given)


TOKENS = 40


def logits(model: nn.Module, caches: list) -> mx.array:
    """A prompt of 20 tokens, past the windows, a chunk of 12, then token by token [40, V]."""
    ids = mx.random.randint(0, SIZES["vocab_size"], (1, TOKENS), key=mx.random.key(0))
    chunks = [ids[:, :20], ids[:, 20:32], *(ids[:, i : i + 1] for i in range(32, TOKENS))]
    return mx.concatenate([model(chunk, cache=caches) for chunk in chunks], axis=1)[0]


def error(found: mx.array, expected: mx.array) -> float:
    """Median over the tokens after the first chunk of the relative error of the logits. (A token
    that a quantization error sends to another expert has a large one.)"""
    found, expected = found[20:], expected[20:]
    spread = mx.linalg.norm(expected - expected.mean(axis=-1, keepdims=True), axis=-1)
    each = mx.sort(mx.linalg.norm(found - expected, axis=-1) / spread)
    return float(each[each.size // 2])


def batch_difference(model: nn.Module) -> float:
    """How far the logits of three sequences of different lengths move by sharing a batch."""
    ids = mx.random.randint(0, SIZES["vocab_size"], (3, 30), key=mx.random.key(1))
    singles = []
    for row, n in enumerate((30, 11, 19)):
        caches = make_prompt_cache(model)
        model(ids[row : row + 1, :n], cache=caches)
        singles.append(caches)
    batch = [caches[0].merge(list(caches)) for caches in zip(*singles, strict=True)]
    worst = 0.0
    for step in range(3):
        token = ids[:, step : step + 1]
        together = model(token, cache=batch)
        alone = [model(token[i : i + 1], cache=c) for i, c in enumerate(singles)]
        worst = max(worst, float(mx.abs(together - mx.concatenate(alone)).max()))
    return worst


@dataclasses.dataclass
class Coverage:
    """What a spec does to a family.

    Args:
        refusal (str): Why nothing of it can be packed; then the rest is empty.
        packed, layers (int): Layers packed, of so many.
        caches (list): Names of its classes of caches.
        errors (dict): bits -> error of the logits.
        batch (str): Empty, or why it cannot run in a batch.
        sinks (bool): Whether attention sinks reach the packed attention.
        left (dict): Layer -> why it is left as it is.
        unpacked (list): Layers that attend by themselves and get arrays.
    """

    refusal: str = ""
    packed: int = 0
    layers: int = 0
    caches: list = dataclasses.field(default_factory=list)
    errors: dict = dataclasses.field(default_factory=dict)
    batch: str = ""
    sinks: bool = False
    left: dict = dataclasses.field(default_factory=dict)
    unpacked: list = dataclasses.field(default_factory=list)


def examine(name: str) -> Coverage:
    """Run the family on its own caches, on int8 and on int4, and in a batch."""
    model = build(name)
    own = make_prompt_cache(model)
    expected = logits(model, own)
    found = Coverage()
    attention = seams.packed_attention

    def spy(queries, keys, values, scale, mask=None, sinks=None):
        found.sinks |= sinks is not None
        return attention(queries, keys, values, scale, mask, sinks)

    for bits in ("int8", "int4"):
        try:
            report = mlx_kvq.enable(
                model, f"{bits}-srft:calibrate=off,recent=0,first=0", verbose=False
            )
        except ValueError as refusal:
            assert [type(c) for c in make_prompt_cache(model)] == [type(c) for c in own]
            return Coverage(str(refusal).partition("of this model: ")[2].rstrip("."))
        caches = make_prompt_cache(model)
        with unittest.mock.patch.object(seams, "packed_attention", spy):
            found.errors[bits] = error(logits(model, caches), expected)
    for layer, cache in enumerate(caches):
        kind = type(cache).__name__
        if layer in report.left:
            assert kind == type(own[layer]).__name__ in report.left[layer]
        elif kind != "CacheList":
            assert kind == "Packed" + type(own[layer]).__name__
    found.packed, found.layers = len(report.packed), len({*report.packed, *report.left})
    found.caches = sorted({type(c).__name__.removeprefix("Packed") for c in caches})
    found.left, found.unpacked = report.left, report.unpacked
    with contextlib.suppress(Exception):
        if batch_difference(model) < 1e-4:
            return found
    mlx_kvq.disable(model)
    try:
        found.batch = "mlx-lm's own is off too" if batch_difference(model) > 1e-2 else "?"
    except Exception as failure:
        found.batch = f"mlx-lm's own raises {type(failure).__name__}"
    return found
