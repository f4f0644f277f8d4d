"""Which text model of transformers a checkpoint's ``language_config`` describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import DeepseekOcr2TextConfig, DeepseekV2Config, DeepseekV3Config

from mcsharp_sdk.errors import InputProblems, Problem

LEFT_OUT: Mapping[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "n_routed_experts": None,
    "n_shared_experts": None,
    "num_experts_per_tok": None,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "n_group": None,
    "topk_group": None,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "use_mla": True,
}
"""What a setting is that a checkpoint leaves out; transformers' own defaults differ."""

ROUTING: Mapping[tuple[str, str], str] = {
    ("softmax", "greedy"): "deepseek_v2",
    ("softmax", "group_limited_greedy"): "deepseek_v2",
    ("sigmoid", "noaux_tc"): "deepseek_v3",
}
"""``scoring_func`` and ``topk_method`` -> the model of transformers that routes so."""

LATENT_ATTENTION = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim")
"""Settings of latent attention, null or 0 in a model with plain attention."""


class PlainAttentionConfig(DeepseekOcr2TextConfig):
    """DeepSeek-V2 with plain multi-head attention (``use_mla: false``), as in DeepSeek-VL2-Tiny."""

    model_type = "deepseek_v2"


def text_config(given: Mapping[str, Any]) -> Any:
    """The config of transformers for a ``language_config``.

    Raises
    ------
    InputProblems
        With everything that transformers' models cannot compute.
    """
    settings = {**LEFT_OUT, **given}
    plain = settings["use_mla"] is False
    family = ROUTING.get((settings["scoring_func"], settings["topk_method"]), "")
    if problems := [*_problems(settings, plain, family)]:
        raise InputProblems("config.json, language_config", problems)
    settings = {name: value for name, value in settings.items() if name != "model_type"}
    if plain:
        return _plain_attention(settings)
    if family == "deepseek_v3":
        groups = {"n_group": settings["n_group"] or 1, "topk_group": settings["topk_group"] or 1}
        return DeepseekV3Config(**{**settings, **groups})
    return DeepseekV2Config(**settings)


def _plain_attention(settings: dict[str, Any]) -> PlainAttentionConfig:
    layers, dense = settings["num_hidden_layers"], settings["first_k_dense_replace"]
    kinds = ["dense" if layer < dense else "sparse" for layer in range(layers)]
    kept = {name: value for name, value in settings.items() if name not in LATENT_ATTENTION}
    return PlainAttentionConfig(**{**kept, "mlp_layer_types": kinds})


REFUSALS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool], str], ...] = (
    ("n_routed_experts", lambda s: not s["n_routed_experts"], "a dense model has no experts"),
    (
        "n_shared_experts",
        lambda s: not s["n_shared_experts"],
        "transformers' model always has shared experts",
    ),
    (
        "num_experts_per_tok",
        lambda s: not s["num_experts_per_tok"],
        "it must say how many experts a token uses",
    ),
    (
        "moe_layer_freq",
        lambda s: s["moe_layer_freq"] != 1,
        "every layer behind the dense first ones must have experts: 1 is supported",
    ),
    (
        "norm_topk_prob",
        lambda s: bool(s["norm_topk_prob"]) and s["scoring_func"] == "softmax",
        "transformers' softmax routing does not normalise the chosen weights: false is supported",
    ),
    (
        "tie_word_embeddings",
        lambda s: bool(s["tie_word_embeddings"]),
        "the head must have its own weight: false is supported",
    ),
)
"""Setting -> whether it cannot be computed, and what can."""


def _problems(settings: Mapping[str, Any], plain: bool, family: str) -> list[Problem]:
    found = [
        Problem(name, f"{settings[name]!r} is not supported; {reason}")
        for name, refused, reason in REFUSALS
        if refused(settings)
    ]
    if not family:
        known = ", ".join(f"{s} with {m}" for s, m in ROUTING)
        found.append(
            Problem(
                "scoring_func, topk_method",
                f"routing by {settings['scoring_func']} with {settings['topk_method']} is not "
                f"supported; these are: {known}",
            )
        )
    if plain and family == "deepseek_v3":
        found.append(
            Problem("use_mla", "plain attention together with sigmoid routing is not supported")
        )
    if not plain and not settings["kv_lora_rank"]:
        found.append(Problem("kv_lora_rank", "latent attention needs one; or set use_mla: false"))
    return found
