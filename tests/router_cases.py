"""Routers of tiny random transformers models, one for each way of routing that a family has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mcsharp_sdk.models.routing import Router, read_router

HIDDEN, EXPERTS, TOP_K = 64, 16, 4
LAYER = 1

_BASE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "routed_scaling_factor": 2.5,
}
_QWEN2 = {"num_experts": EXPERTS, "shared_expert_intermediate_size": 16}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": EXPERTS}),
    "olmoe": ("olmoe", {"num_experts": EXPERTS}),
    "olmoe-norm": ("olmoe", {"num_experts": EXPERTS, "norm_topk_prob": True}),
    "qwen2_moe": ("qwen2_moe", _QWEN2),
    "qwen2_moe-norm": ("qwen2_moe", {**_QWEN2, "norm_topk_prob": True}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": EXPERTS}),
    "qwen3_moe-norm": ("qwen3_moe", {"num_experts": EXPERTS, "norm_topk_prob": True}),
    "deepseek_v2": ("deepseek_v2", {**_DEEPSEEK, "norm_topk_prob": True}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {**_DEEPSEEK, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3": ("deepseek_v3", {**_DEEPSEEK, "n_group": 4, "topk_group": 2}),
    "deepseek_v3-one-group": ("deepseek_v3", {**_DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "deepseek_v3-no-norm": (
        "deepseek_v3",
        {**_DEEPSEEK, "n_group": 2, "topk_group": 1, "norm_topk_prob": False},
    ),
}


def router_module(case: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """The router module of a tiny random model, with weights that spread the scores; its config."""
    model_type, settings = CASES[case]
    config = AutoConfig.for_model(model_type, **{**_BASE, **settings})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    module = model.model.layers[LAYER].mlp.gate.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        width = tensor.shape[-1] if tensor.ndim == 2 else 10
        tensor.data.normal_(0, 2 / width**0.5, generator=generator)
    return module, config


def router_case(case: str, seed: int = 0) -> Router:
    """The same router as mcsharp_sdk reads it."""
    return read_router(*router_module(case, seed), LAYER)


def hidden_states(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Random (tokens, HIDDEN)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
