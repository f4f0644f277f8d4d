"""Tiny random MoE models of all families, made on disk by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

PLAIN_FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")
"""Those whose layers are ``model.layers`` with ``self_attn`` and ``mlp.gate``: for tests that look
into models, and for those of what does not depend on the family."""


def tiny_config(family: str, **overrides: Any) -> Any:
    """Config of a tiny model."""
    row = FAMILIES[family]
    return AutoConfig.for_model(row.model_type or family, **{**row.settings, **overrides})


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random model of a family, of the stock class."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=dtype)


def save_tiny_model(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Save a random model of a family, in several shards, and return its folder."""
    tiny_model(family, dtype=dtype, **overrides).save_pretrained(folder, max_shard_size="60KB")
    return folder
