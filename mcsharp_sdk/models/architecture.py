"""A model's configuration and its module tree, without weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.folders import CONFIG_FILE
from mcsharp_sdk.models.config_file import check_config, quantisation_method
from mcsharp_sdk.models.device import is_cpu
from mcsharp_sdk.models.normal_form import normalise
from mcsharp_sdk.models.shards import Checkpoint

MOST_TABLE_BYTES = 4 << 30
"""Most memory for what a model computes from its config, such as rotary tables."""


def read_config(path: Path) -> Any:
    """The model's transformers config; no code from the folder is run.

    Raises
    ------
    InputError
        If ``path`` is no model folder, its config.json is damaged, or its architecture is unknown
        to transformers.
    """
    check_config(path)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # each architecture's config raises what it likes
        raise InputError(f"{path / CONFIG_FILE} cannot be read: {error}") from error


def auto_class(config: Any) -> Any:
    """The class of transformers that holds the whole model: ``AutoModelFor…``.

    Of a config that holds the text model's as a part, ``AutoModelForCausalLM`` would build the
    text model alone, under other tensor names than the checkpoint's.

    Raises
    ------
    InputError
        If transformers has neither a causal language model nor an image-text model of this
        architecture.
    """
    composite = config.get_text_config() is not config
    preferred = (AutoModelForImageTextToText, AutoModelForCausalLM)
    for candidate in preferred if composite else reversed(preferred):
        if type(config) in candidate._model_mapping:
            return candidate
    raise InputError(
        f"transformers has neither a causal language model nor an image-text model of the "
        f"architecture {config.model_type!r}"
    )


def reads_images(config: Any) -> bool:
    """Whether a model of this config takes images besides text."""
    return type(config) in AutoModelForImageTextToText._model_mapping


def named_dtype(config: Any) -> torch.dtype | None:
    """The dtype that a config gives for the weights, if any.

    Of a vision-language model the text model's; some state one dtype for the whole model only.
    """
    dtype: torch.dtype | None = config.get_text_config().dtype or config.dtype
    return dtype


def stored_dtype(config: Any, path: Path) -> torch.dtype:
    """The dtype of a model's weights: what its config says, or else what most of them have.

    Of a quantised model whose config says nothing it is float32: its tensors do not tell.

    Parameters
    ----------
    path : the model's folder, of which headers are read if the config says nothing.

    Raises
    ------
    InputError
        If they are to be read and cannot.
    """
    if (named := named_dtype(config)) is not None:
        return named
    if quantisation_method(config) is not None:
        return torch.float32
    nbytes: Counter[torch.dtype] = Counter()
    for info in Checkpoint.open(path).tensors.values():
        if info.dtype.is_floating_point and info.dtype.itemsize > 1:  # fp8 is a packing
            nbytes[info.dtype] += info.nbytes
    return max(nbytes, key=nbytes.__getitem__, default=torch.float32)


def compute_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """The dtype to compute in with weights of this dtype.

    It is the same, but float32 for float16 on a CPU, which has no float16 arithmetic to speak of.
    """
    return torch.float32 if stored == torch.float16 and is_cpu(device) else stored


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The whole model on the meta device, with real non-persistent buffers.

    Those (rotary tables) are in no checkpoint, so they are computed here.

    Raises
    ------
    InputError
        If transformers has no model of this architecture, or cannot build it so.
    """
    with torch.device("meta"):
        try:
            model = (
                auto_class(config)
                .from_config(config, dtype=dtype, experts_implementation="eager")
                .eval()
            )
        except Exception as error:  # each architecture raises what it likes
            raise InputError(
                f"{config.model_type} cannot be built as config.json says "
                f"({type(error).__name__}: {error}); compare it with that of the original"
            ) from error
    normalise(model)
    tables = sum(buffer.nbytes for _, buffer in model.named_non_persistent_buffers())
    if tables > MOST_TABLE_BYTES:
        raise InputError(
            f"{config.model_type} cannot be built: the tables that config.json asks for would take "
            f"{tables} bytes"
        )
    owners = set()
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        owners.add(owner)
    for owner in sorted(owners):
        _innermost_model(model, owner)._init_weights(model.get_submodule(owner))
    return model


def _innermost_model(model: Any, path: str) -> Any:
    """The smallest model of transformers around a module: it knows how to initialise it."""
    steps = path.split(".")
    around = (model.get_submodule(".".join(steps[:n])) for n in range(len(steps), -1, -1))
    return next(module for module in around if isinstance(module, PreTrainedModel))
