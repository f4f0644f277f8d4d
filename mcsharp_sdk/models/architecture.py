"""A model's configuration and its module tree, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mcsharp_sdk.errors import InputError


def read_config(path: Path) -> Any:
    """The model's transformers config; no code from the folder is run.

    Raises
    ------
    InputError
        If ``path`` is no model folder, or its architecture is unknown to transformers.
    """
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is not a model folder: it has no config.json")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{path / 'config.json'} cannot be read: {error}") from error


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model on the meta device, with real non-persistent buffers.

    Those (rotary tables) are in no checkpoint, so they are computed here.

    Raises
    ------
    InputError
        If transformers has no causal language model of this architecture.
    """
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa", experts_implementation="eager"
            ).eval()
        except ValueError as error:
            raise InputError(f"{config.model_type} cannot be built: {error}") from error
    owners = set()
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        owners.add(owner)
    for owner in sorted(owners):
        model._init_weights(model.get_submodule(owner))
    return model
