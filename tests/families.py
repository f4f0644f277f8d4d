"""Every family of Mixture-of-Experts models, with a tiny config, and what holds for it.

One row per family. The tests in ``tests/models/test_families.py`` are made from these rows, and so
is the table in ``docs/families.md``: each of its cells is a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Capability = Literal["statistics", "compress", "load", "generate", "prune", "onnx_routers"]
CAPABILITIES: tuple[Capability, ...] = get_args(Capability)


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes
    ----------
    settings : of its tiny config.
    oddities : what its layout has that others do not, for the docs.
    model_type : as in config.json, if it is not the family's name.
    refuses : what does not hold -> words of the refusal, which gives the reason.
    unranked : why attention does not tell how important tokens are, for the docs.
    """

    settings: Mapping[str, Any]
    oddities: str = ""
    model_type: str = ""
    refuses: Mapping[Capability, str] = field(default_factory=dict)
    unranked: str = ""


_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED: dict[str, Any] = {
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
_MLA: dict[str, Any] = {
    **{name: value for name, value in _COMMON.items() if name != "head_dim"},
    **_GROUPED,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "routed_scaling_factor": 1.0,
}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_NO_SOFTMAX = "layers with experts that have no softmax attention"

FAMILIES: dict[str, Family] = {
    "mixtral": Family({**_COMMON, **_LOCAL}),
    "minimax": Family(
        {
            **_COMMON,
            **_LOCAL,
            "block_size": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        "lightning attention",
        unranked=_NO_SOFTMAX,
    ),
    "minimax_m2": Family({**_COMMON, **_LOCAL}, "sigmoid router, its correction bias in the block"),
    "qwen2_moe": Family(
        {
            **_COMMON,
            **_MOE,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 48,
        },
        "gated shared expert",
    ),
    "qwen3_moe": Family({**_COMMON, **_MOE, "moe_intermediate_size": 40, "decoder_sparse_step": 1}),
    "qwen3_next": Family(
        {
            **_COMMON,
            **_MOE,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        "gated delta nets with a convolution, gated shared expert",
        unranked=_NO_SOFTMAX,
    ),
    "olmoe": Family({**_COMMON, **_MOE}),
    "deepseek_v2": Family(
        {**_MLA, "q_lora_rank": None, "topk_method": "greedy"},
        "latent attention, dense first layers, shared experts",
    ),
    "deepseek_v3": Family(
        {**_MLA, "q_lora_rank": 24},
        "latent attention, dense first layers, shared experts, groups, correction bias",
    ),
    "glm4_moe": Family(
        {**_COMMON, **_GROUPED, "use_qk_norm": True, "attention_bias": True},
        "attention biases, dense first layers, shared experts, groups, correction bias",
    ),
    "gpt_oss": Family(
        {
            **_COMMON,
            **_LOCAL,
            "sliding_window": 8,
            "swiglu_limit": 0.02,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "transposed and interleaved experts with biases, clamped activation, attention sinks",
        unranked="attention sinks, with which transformers does not run SDPA",
    ),
    "phimoe": Family(
        {
            **_COMMON,
            **_LOCAL,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.4,  # of 0.01, most routing weights of a random router are 1
        },
        "sparsemixer, biases",
    ),
    "granitemoe": Family(
        {
            **_COMMON,
            **_LOCAL,
            "embedding_multiplier": 6.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
        },
        "experts stored as `input_linear` and `output_linear`, multipliers",
    ),
    "ernie4_5_moe": Family(
        {
            **_COMMON,
            "moe_intermediate_size": 40,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "use_bias": True,
        },
        "softmax router with correction bias, dense first layers, shared experts, biases",
    ),
    "hunyuan_v1_moe": Family(
        {**_COMMON, "num_experts": 4, "moe_topk": [2, 1, 2]},
        "experts per token given for each layer, shared expert, router in float32",
    ),
    "jamba": Family(
        {
            **_COMMON,
            **_MOE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        "Mamba layers, dense layers in between",
        unranked=_NO_SOFTMAX,
    ),
    "dots1": Family(
        {**_COMMON, **_GROUPED},
        "dense first layers, shared experts, groups, correction bias",
    ),
    "nemotron_h": Family(
        {
            **{n: v for n, v in _COMMON.items() if n != "num_hidden_layers"},
            **_GROUPED,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
            "moe_shared_expert_intermediate_size": 48,
            "moe_latent_size": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 16,
        },
        "a layer is Mamba-2, attention, MLP or experts; experts without gate in a latent space",
        unranked=_NO_SOFTMAX,
    ),
    "dbrx": Family(
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 128,
            "vocab_size": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.4, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
        },
        "all experts of a layer in one matrix, decoder layers called `blocks`",
    ),
    "llama4": Family(
        {
            **_COMMON,
            **_LOCAL,
            "intermediate_size_mlp": 80,
            "moe_layers": [1, 2],
            "attention_chunk_size": 16,
            "no_rope_layers": [1, 0, 1],
        },
        "text model; routing weights multiply an expert's input; dense layers, shared expert",
        model_type="llama4_text",
        refuses={
            "prune": "routing weights multiply the input of an expert in this model: growing those "
            "of the other experts would not make up for a dropped one"
        },
    ),
}
"""Family -> its row, in the order of the table in the docs."""
