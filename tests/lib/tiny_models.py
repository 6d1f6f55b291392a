"""Builds tiny random float32 models of the mlx-lm families."""

import copy
import dataclasses
import importlib
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

# Values of config fields that several families share. Each family uses the fields that its
# ModelArgs defines.
COMMON: dict[str, Any] = {
    name: value
    for value, names in (
        # sizes
        (2, "num_hidden_layers n_layer n_layers num_layers num_transformer_layers"),
        (64, "hidden_size n_embd hidden_dim d_model model_dim"),
        (96, "intermediate_size n_inner ffn_hidden_size dense_intermediate_size"),
        (96, "intermediate_size_mlp"),
        (4, "num_attention_heads n_head n_heads num_heads"),
        (2, "num_key_value_heads n_kv_heads num_kv_heads"),
        (16, "head_dim kv_channels hidden_size_per_head"),
        (128, "vocab_size num_vocab"),
        (512, "vocab_size_per_layer_input"),
        (512, "max_position_embeddings model_max_length n_positions n_ctx block_size"),
        # norms, biases, output
        (1e-5, "rms_norm_eps norm_eps norm_epsilon layer_norm_eps layer_norm_epsilon"),
        (1e-5, "layernorm_epsilon post_norm_eps"),
        (False, "attention_bias mlp_bias use_bias use_qkv_bias tie_word_embeddings"),
        (True, "use_qk_norm qk_norm"),
        (30.0, "final_logit_softcapping logits_soft_cap"),
        # positions, masks
        (1e4, "rope_theta rotary_emb_base rope_local_base_freq"),
        (0.5, "partial_rotary_factor rotary_pct"),
        (8, "rotary_dim sliding_window sliding_window_size attention_window_size window_size"),
        (8, "attention_chunk_size loop_window_size"),
        (2, "sliding_window_pattern full_attention_interval layer_group_size"),
        (None, "rope_scaling"),
        # latent and sparse attention
        (32, "q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim index_head_dim"),
        (16, "qk_rope_head_dim"),
        (2, "index_n_heads"),
        (8, "index_topk"),
        # experts
        (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
        (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts"),
        (1, "n_shared_experts num_shared_experts num_shared_expert"),
        (32, "moe_intermediate_size shared_intermediate_size expert_ffn_hidden_size"),
        (32, "shared_expert_intermediate_size moe_shared_expert_intermediate_size"),
        (32, "share_expert_dim"),
        (1, "first_k_dense_replace num_dense_layers moe_layer_start_index decoder_sparse_step"),
        (1, "n_group topk_group moe_layer_freq"),
        ([0], "mlp_only_layers"),
        (True, "norm_topk_prob use_expert_bias mla_scale_q_lora mla_scale_kv_lora"),
        (1.0, "routed_scaling_factor"),
        ("noaux_tc", "topk_method"),
        ("sigmoid", "scoring_func"),
        # linear attention, state space, convolution
        (4, "linear_num_value_heads mamba_num_heads mamba_n_heads"),
        (2, "linear_num_key_heads mamba_expand group_norm_size"),
        (32, "linear_key_head_dim linear_value_head_dim mamba_head_dim mamba_d_head"),
        (32, "ssm_state_size state_size mamba_d_state mamba_dt_rank time_step_rank"),
        (4, "linear_conv_kernel_dim conv_kernel mamba_d_conv conv1d_width conv_L_cache"),
        (1, "n_groups mamba_n_groups"),
        (True, "use_conv_bias mamba_conv_bias"),
        (False, "conv_bias mamba_proj_bias"),
        # multipliers
        (2.0, "embedding_multiplier scale_emb"),
        (0.5, "attention_multiplier residual_multiplier output_multiplier"),
        (1.5, "logits_scaling scale_depth"),
        (32, "dim_model_base"),
    )
    for name in names.split()
}

ROPES = {FULL: {"rope_theta": 1e4}, SLIDING: {"rope_theta": 1e3}}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
KDA = {
    "kda_layers": [1, 2, 3],
    "full_attn_layers": [4],
    "num_heads": 4,
    "head_dim": 32,
    "short_conv_kernel_size": 4,
}

# For each family, the values that differ from COMMON. If a family has a text_config, these values
# are fields of the text_config.
FAMILIES: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afm7": {"num_layers": 4, "num_kv_reuse_layers": 2, "hidden_dim_scale_factor": 2.0},
    "afmoe": {"layer_types": [SLIDING, FULL]},
    "apertus": {"post_norm": False},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": {},
    "bailing_moe": {},
    "bailing_moe_linear": {},
    "bailing_moe_v3": {},
    "cohere": {},
    "cohere2": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek": {},
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": YARN},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "deepseek_v41": {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "o_groups": 2,
        "o_lora_rank": 32,
        "compress_ratios": [0, 4, 4],
        "kv_source_layer_ids": [1],
        "index_source_layer_ids": [1],
        "index_topk": 4,
        "hc_mult": 2,
    },
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone": {},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": [SLIDING, FULL], "is_moe_layer": [False, True]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gear": {"layer_types": ["conv_mixer", SLIDING, FULL], "num_hidden_layers": 3},
    "gemma": {},
    "gemma2": {},
    "gemma3": {"text_config": {"model_type": "gemma3_text"}},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "gemma3n": {
        "text_config": {
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 3,
            "layer_types": [SLIDING, SLIDING, FULL] * 2,
            "activation_sparsity_pattern": [0.5] * 3 + [0.0] * 3,
            "hidden_size_per_layer_input": 32,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 32,
        }
    },
    "gemma4": {"text_config": {"model_type": "gemma4_text"}},
    "gemma4_text": {
        "num_hidden_layers": 6,
        "sliding_window_pattern": 3,
        "num_kv_shared_layers": 3,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 32,
        "use_double_wide_mlp": False,
        "tie_word_embeddings": True,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 1e4}},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": {"layer_types": [SLIDING, FULL]},
    "gptj": {},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "helium": {},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 10.0, "factor": 1.0},
    },
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {},
    "iquestloopcoder": {},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k25": {"text_config": {"model_type": "deepseek_v3"}},
    "kimi_k3": {
        "text_config": {
            "num_hidden_layers": 4,
            "linear_attn_config": KDA,
            "attn_res_block_size": 2,
            "routed_expert_hidden_size": 32,
            "mla_use_output_gate": True,
        }
    },
    "kimi_linear": {"num_hidden_layers": 4, "linear_attn_config": KDA},
    "kimi_vl": {"text_config": {"model_type": "deepseek_v3"}},
    "laguna": {"layer_types": [SLIDING, FULL]},
    "lfm2": {
        "layer_types": ["conv", FULL],
        "block_dim": 64,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2-vl": {"text_config": {"model_type": "lfm2"}},
    "lfm2_moe": {"layer_types": ["conv", FULL]},
    "lille-130m": {},
    "llama": {},
    "llama4": {
        "text_config": {
            "num_hidden_layers": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        }
    },
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
    },
    "longcat_flash_ngram": {
        "zero_expert_num": 2,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 3,
        "emb_split_num": 1,
    },
    "mamba": {},
    "mamba2": {"head_dim": 32, "time_step_limit": [0.0, 100.0]},
    "mellum": {"layer_types": [SLIDING, FULL], "rope_parameters": ROPES},
    "mimo": {},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "swa_rope_theta": 1e3,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 32,
    },
    "minicpm": {},
    "minicpm3": {
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        }
    },
    "minimax": {},
    "minimax_m3_vl": {
        "text_config": {
            "moe_layer_freq": [0, 1],
            "sparse_attention_freq": [0, 1],
            "index_block_size": 4,
            "index_topk_blocks": 2,
        }
    },
    "ministral3": {"layer_types": [SLIDING, FULL], "rope_parameters": YARN},
    "mistral3": {"text_config": {"model_type": "ministral3"}},
    "mistral4": {"rope_parameters": YARN},
    "mixtral": {},
    "muse_glimmer": {"layer_types": [SLIDING, FULL]},
    "nanbeige": {"num_loops": 2},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "num_hidden_layers": 3,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
        ],
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "E"]},
    "olmo2": {},
    "olmo3": {"layer_types": [SLIDING, FULL]},
    "olmo_hybrid": {"layer_types": [LINEAR, FULL], "linear_allow_neg_eigval": True},
    "olmoe": {},
    "openelm": {
        "ffn_dim_divisor": 32,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 1.5],
    },
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "phixtral": {},
    "pixtral": {"text_config": {"model_type": "llama"}},
    "plamo": {"n_shared_head": 2},
    "plamo2": {},
    "plamo3": {},
    "qwen": {"intermediate_size": 128},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen2_vl": {"text_config": {"model_type": "qwen2"}},
    "qwen3": {},
    "qwen3_5": {"text_config": {"num_experts": 0}},
    "qwen3_5_moe": {"text_config": {}},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen3_vl": {"text_config": {"model_type": "qwen3"}},
    "qwen3_vl_moe": {"text_config": {"model_type": "qwen3_moe"}},
    "recurrent_gemma": {
        "block_types": ["recurrent", "recurrent", "attention"],
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "num_key_value_heads": 1,
    },
    "rwkv7": {
        "a_low_rank_dim": 32,
        "v_low_rank_dim": 32,
        "gate_low_rank_dim": 32,
        "decay_low_rank_dim": 32,
    },
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": {},
    "spark2_5": {"layer_types": [SLIDING, FULL], "rope_parameters": ROPES},
    "stablelm": {},
    "starcoder2": {},
    "step3p5": {
        "layer_types": [SLIDING, FULL],
        "num_attention_groups": 2,
        "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 2},
        "moe_layers_enum": "1",
    },
    "talkie": {},
    "telechat3": {},
    "youtu_llm": {},
}

# Families of mlx-lm that cannot be built or run on the CPU, and the reasons.
UNBUILDABLE: dict[str, str] = {
    "bitnet": "BitLinear has only a Metal kernel",
    "muse_spark": "the op that normalizes and rotates queries and keys has only a Metal kernel",
    "olmo": "importing the module exits if the package ai2-olmo is not installed",
    "phi3small": "sets the logits of some tokens above 100255 to -inf for every vocabulary size",
    "prism_hadamard_qwen35": "needs a packed 2-bit checkpoint and its manifest",
}


def _module(family: str) -> ModuleType:
    return importlib.import_module(f"mlx_lm.models.{family}")


def config(family: str, **overrides: Any) -> dict[str, Any]:
    """Returns a config.json for the family. Fields that ModelArgs does not define go into
    text_config."""
    fields = {field.name for field in dataclasses.fields(_module(family).ModelArgs)}
    own = FAMILIES[family] | overrides
    if "text_config" in fields:
        text = own["text_config"] | {name: own.pop(name) for name in overrides.keys() - fields}
        inner = text.pop("model_type", None)
        own["text_config"] = (
            config(inner, **text) if inner else {"model_type": f"{family}_text"} | COMMON | text
        )
    common = {name: value for name, value in COMMON.items() if name in fields}
    return copy.deepcopy({"model_type": family} | common | own)


def build(family: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """Returns the family's model, with noise added to parameters that are initialized as
    constants."""

    def noisy(x: mx.array) -> mx.array:
        constant = mx.issubdtype(x.dtype, mx.floating) and (x.max() == x.min()).item()
        return x + 0.1 * mx.random.normal(x.shape) if constant else x

    module = _module(family)
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config(family, **overrides)))
    model.set_dtype(mx.float32)
    model.update(tree_map(noisy, model.parameters()))
    mx.eval(model.parameters())
    return model
