"""Tiny checkpoints in the layout of DeepSeek-VL2's, written without the SDK's classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_vision_models import VOCABULARY, character_tokenizer
from torch import Tensor

HIDDEN, WIDTH, HEADS, LAYERS, EXPERTS = 64, 32, 4, 3, 8
TILE, PATCH, INNER = 28, 4, 54
CANDIDATES = [[28, 28], [56, 28], [28, 56], [56, 56]]
TOKENS = {
    "image_token": "<image>",
    "bos_token": "<|begin|>",
    "eos_token": "<|end|>",
    "user_token": "<|User|>",
    "assistant_token": "<|Assistant|>",
}

_LANGUAGE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "bos_token_id": 129,
    "eos_token_id": 130,
    "first_k_dense_replace": 1,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "lm_head": True,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 40,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "num_attention_heads": HEADS,
    "num_experts_per_tok": 3,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": None,
    "rm_head": False,
    "topk_method": "greedy",
    "torch_dtype": "float32",
    "vocab_size": VOCABULARY,
}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "small": {**_LANGUAGE, **_LATENT},
    "tiny": {
        **_LANGUAGE,
        "kv_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "v_head_dim": 0,
        "use_mla": False,
        "n_group": 1,
        "topk_group": 1,
    },
    "base": {
        **_LANGUAGE,
        **_LATENT,
        "n_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
        "scoring_func": "sigmoid",
        "topk_group": 1,
        "topk_method": "noaux_tc",
    },
}
"""Which of the three published sizes -> a ``language_config`` as theirs, smaller."""


def config_json(variant: str, **language: Any) -> dict[str, Any]:
    """``config.json``."""
    return {
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "candidate_resolutions": CANDIDATES,
        "global_view_pos": "head",
        "language_config": {**VARIANTS[variant], **language},
        "model_type": "deepseek_vl_v2",
        "projector_config": {
            "input_dim": WIDTH,
            "model_type": "mlp_projector",
            "n_embed": HIDDEN,
        },
        "tile_tag": "2D",
        "torch_dtype": "float32",
        "transformers_version": "4.38.2",
        "vision_config": {
            "heads": 2,
            "image_size": TILE,
            "layers": 2,
            "mlp_ratio": 1.7,
            "model_name": "siglip_so400m_patch14_384",
            "model_type": "vision",
            "patch_size": PATCH,
            "width": WIDTH,
        },
    }


def tensors(variant: str) -> dict[str, Tensor]:
    """All tensors by their names on disk, random."""
    generator = torch.Generator().manual_seed(5)
    shapes = {**_vision_shapes(), **_projector_shapes(), **_language_shapes(variant)}
    made = {}
    for name, shape in shapes.items():
        random = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith("weight")
        made[name] = 1 + 0.1 * random if is_norm else random * (0.3 if len(shape) < 2 else 0.15)
    return made


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def _mlp(name: str) -> dict[str, tuple[int, ...]]:
    return _linear(f"{name}.fc1", WIDTH, INNER) | _linear(f"{name}.fc2", INNER, WIDTH)


def _vision_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "vision.pos_embed": (1, (TILE // PATCH) ** 2, WIDTH),
        "vision.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "vision.patch_embed.proj.bias": (WIDTH,),
        "vision.attn_pool.latent": (1, 1, WIDTH),
    }
    for block in ("vision.blocks.0", "vision.blocks.1"):
        shapes |= _norm(f"{block}.norm1") | _norm(f"{block}.norm2") | _mlp(f"{block}.mlp")
        shapes |= _linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        shapes |= _linear(f"{block}.attn.proj", WIDTH, WIDTH)
    pool = "vision.attn_pool"
    shapes |= _linear(f"{pool}.q", WIDTH, WIDTH) | _linear(f"{pool}.kv", WIDTH, 2 * WIDTH)
    shapes |= _linear(f"{pool}.proj", WIDTH, WIDTH) | _norm(f"{pool}.norm") | _mlp(f"{pool}.mlp")
    return shapes | _norm("vision.norm")


def _projector_shapes() -> dict[str, tuple[int, ...]]:
    layers = _linear("projector.layers.0", 4 * WIDTH, HIDDEN)
    layers |= _linear("projector.layers.2", HIDDEN, HIDDEN)
    return {**layers, "image_newline": (HIDDEN,), "view_seperator": (HIDDEN,)}


def _swiglu(name: str, inner: int) -> dict[str, tuple[int, ...]]:
    first = {f"{name}.{part}_proj.weight": (inner, HIDDEN) for part in ("gate", "up")}
    return {**first, f"{name}.down_proj.weight": (HIDDEN, inner)}


def _attention(variant: str) -> dict[str, tuple[int, ...]]:
    if variant == "tiny":
        return {f"{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
    return {
        "q_proj.weight": (HEADS * 24, HIDDEN),
        "kv_a_proj_with_mqa.weight": (16 + 8, HIDDEN),
        "kv_a_layernorm.weight": (16,),
        "kv_b_proj.weight": (HEADS * 32, 16),
        "o_proj.weight": (HIDDEN, HEADS * 16),
    }


def _language_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "language.model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "language.model.norm.weight": (HIDDEN,),
        "language.lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for index in range(LAYERS):
        layer = f"language.model.layers.{index}"
        shapes |= {f"{layer}.self_attn.{n}": shape for n, shape in _attention(variant).items()}
        shapes[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
        if index == 0:
            shapes |= _swiglu(f"{layer}.mlp", 96)
            continue
        for expert in range(EXPERTS):
            shapes |= _swiglu(f"{layer}.mlp.experts.{expert}", 40)
        shapes |= _swiglu(f"{layer}.mlp.shared_experts", 80)
        shapes[f"{layer}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        if variant == "base":
            shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (EXPERTS,)
    return shapes


def save_tiny_deepseek_vl2(folder: Path, variant: str = "small") -> Path:
    """Write a checkpoint with its tokenizer and processor settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(variant)))
    save_file(tensors(variant), folder / "model.safetensors", {"format": "pt"})
    tokenizer = character_tokenizer(TOKENS)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = TOKENS["eos_token"]
    tokenizer.save_pretrained(folder)
    processor = {
        "add_special_token": False,
        "candidate_resolutions": CANDIDATES,
        "downsample_ratio": 2,
        "ignore_id": -100,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_token": "<image>",
        "mask_prompt": False,
        "normalize": True,
        "pad_token": TOKENS["eos_token"],
        "patch_size": PATCH,
        "processor_class": "DeepseekVLV2Processor",
        "sft_format": "deepseek",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder
