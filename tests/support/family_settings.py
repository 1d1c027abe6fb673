"""Settings of single families, in place of those in the table of ``families``."""

from tests.support.families import LAYERS, WINDOW, text_config

MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)
FULL = ["full_attention"] * LAYERS
YARN = {"rope_theta": 10000.0, "rope_type": "default"}
TWO_ROPES = {"full_attention": YARN, "sliding_attention": YARN}
LATENT_YARN = {
    "type": "yarn",
    "factor": 1.0,
    "original_max_position_embeddings": 512,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
}
KDA = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
}

SETTINGS: dict[str, dict] = {
    "baichuan_m1": {"sliding_window_layers": [0, 2], "tie_word_embeddings": False},
    "cohere2": {"head_dim": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"rope_scaling": LATENT_YARN},
    "exaone": {"head_dim": 16},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True] * (LAYERS // 2)},
    "glm_moe_dsa": {"rope_parameters": YARN},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2)},
    "hunyuan": {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1.0}},
    "kimi_linear": {"linear_attn_config": KDA},
    "llama4_text": {"no_rope_layers": [1, 0] * (LAYERS // 2)},
    "mamba2": {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "time_step_limit": (0.0, 100.0)},
    "mellum": {"rope_parameters": TWO_ROPES},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0] * (LAYERS // 2),
        "moe_layer_freq": [0, 1] * (LAYERS // 2),
        "add_swa_attention_sink_bias": True,
    },
    "minicpm3": {"rope_scaling": LATENT_YARN, "qk_rope_head_dim": 16},
    "ministral3": {
        "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1,
                            "original_max_position_embeddings": 512},
    },
    "mistral4": {
        "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1,
                            "original_max_position_embeddings": 512},
    },
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"n_heads_in_group": 2},
                "ffn": {"ffn_mult": 1.0},
            }
        ] * LAYERS,
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "*"], "layers_block_type": None},
    "openelm": {
        "num_transformer_layers": LAYERS,
        "model_dim": 64,
        "num_query_heads": [4] * LAYERS,
        "num_kv_heads": [2] * LAYERS,
        "ffn_multipliers": [1.0] * LAYERS,
        "ffn_dim_divisor": 16,
    },
    "longcat_flash": {
        "mla_scale_q_lora": True, "mla_scale_kv_lora": True, "attention_method": "MLA",
        "zero_expert_type": "identity",
    },
    "longcat_flash_ngram": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    # A language model inside.
    "gemma3": {"vocab_size": 160, "text_config": text_config("gemma3_text")},
    "gemma3n": {
        "text_config": text_config(
            "gemma3n", "TextConfig",
            num_kv_shared_layers=2, vocab_size_per_layer_input=160, final_logit_softcapping=30.0,
            rope_local_base_freq=10000.0, layer_types=[*MIXED], intermediate_size=[96] * LAYERS,
            activation_sparsity_pattern=[0.0] * LAYERS, hidden_size_per_layer_input=16,
            altup_num_inputs=2, altup_coef_clip=120.0, altup_correct_scale=True,
            altup_active_idx=0, laurel_rank=8,
        ),
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 160, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16, "layer_types": MIXED,
    },
    "gemma4": {
        "vocab_size": 160,
        "text_config": text_config(
            "gemma4_text", vocab_size_per_layer_input=160, num_kv_shared_layers=2,
            hidden_size_per_layer_input=16, layer_types=MIXED,
        ),
    },
    "kimi_k25": {"text_config": text_config("deepseek_v3")},
    "kimi_vl": {"text_config": text_config("kimi_vl", "TextArgs")},
    "lfm2-vl": {"text_config": text_config("lfm2")},
    "llama4": {"text_config": text_config(
        "llama4", "TextArgs", attention_chunk_size=WINDOW, interleave_moe_layer_step=2,
        use_qk_norm=True, num_experts_per_tok=1,
    )},
    "mistral3": {"text_config": {**text_config("llama"), "model_type": "llama"}},
    "muse_spark": {"text_config": text_config(
        "muse_spark", "TextArgs", rope_parameters=YARN, layer_rope_theta=[10000.0, 0] * 2,
        layer_types=MIXED, final_logit_softcapping=30.0, output_multiplier=1.0,
        moe_hidden_size=48, post_norm_eps=1e-5, num_shared_experts=0, mlp_layer_types=None,
    )},
    "phixtral": {"num_vocab": 160, "model_dim": 64},
    "plamo": {"n_shared_head": 2},
    "qwen": {"kv_channels": 16, "no_bias": True},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "logits_soft_cap": 30.0},
    "step3p5": {"moe_top_k": 2, "moe_num_experts": 4},
    "pixtral": {"text_config": text_config("llama")},
    "qwen2_vl": {"text_config": text_config("qwen2")},
    "qwen3_vl": {"text_config": text_config("qwen3")},
    "qwen3_vl_moe": {"text_config": text_config("qwen3_moe")},
    "qwen3_5": {"text_config": text_config("qwen3_5", "TextModelArgs")},
    "qwen3_5_moe": {"text_config": text_config("qwen3_5", "TextModelArgs")},
    "spark2_5": {"rope_parameters": TWO_ROPES},
}  # fmt: skip

# Families that cannot be tried on a Linux CPU at this size, and why.
NOT_TRIED = {
    "bitnet": "its layers need a Metal kernel",
    "kimi_k3": "no small configuration made",
    "minimax_m3_vl": "no small configuration made",
    "muse_spark": "its layers need a Metal kernel",
    "olmo": "needs the package ai2-olmo",
    "prism_hadamard_qwen35": "the layers of qwen3_5, but reads a packed checkpoint only",
    "phi3small": "its block-sparse attention needs a real size",
}
# Families whose batch of three is not what they give alone, with mlx-lm's own cache neither.
NO_BATCH = {
    "afm7": "its layers that reuse keys take padding for positions",
    "gemma2": "its mask lacks an axis of the scores",
    "gpt_bigcode": "it takes one position for all sequences",
    "llama4": "ChunkedKVCache has no batch",
}
# Above 0.015 in int8 and 0.2 in int4, and why.
INEXACT = {
    # qk_scale_factor 3.87 on queries and keys of norm √D: on random weights the softmax is nearly
    # one-hot, so that an error of the logits counts in full. With a factor of 1: 0.007 and 0.14.
    "muse_glimmer": {"int8": 0.03, "int4": 0.4},
    # Half of the layers read the others' keys, and all of a prompt from rows.
    "afm7": {"int8": 0.06},
    # A router's choice that an error turns over moves the logits by more than the error.
    "ernie4_5_moe": {"int8": 0.03},
}
# Families without anything to pack, and what `enable` says of them.
REFUSED = {
    "bailing_hybrid": "latent attention",
    "bailing_moe_v3": "latent attention",
    "deepseek_v3": "latent attention",
    "deepseek_v32": "latent attention",
    "deepseek_v41": "LayerCache is not a plain key/value cache",
    "glm4_moe_lite": "latent attention",
    "glm_moe_dsa": "latent attention",
    "kimi_k25": "latent attention",
    "kimi_linear": "latent attention",
    "kimi_vl": "latent attention",
    "longcat_flash": "latent attention",
    "longcat_flash_ngram": "latent attention",
    "mamba": "ArraysCache is not a plain key/value cache",
    "mamba2": "ArraysCache is not a plain key/value cache",
    "mistral4": "latent attention",
    "rwkv7": "ArraysCache is not a plain key/value cache",
}
