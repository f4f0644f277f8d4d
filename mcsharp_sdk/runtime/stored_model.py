"""Whether a compressed model's folder holds what its config says."""

from __future__ import annotations

from pathlib import Path

import torch

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.architecture import empty_model, read_config, stored_dtype
from mcsharp_sdk.models.config_file import check_layer_count
from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.runtime.layout import PackedLayout
from mcsharp_sdk.runtime.packed_model import pack_modules
from mcsharp_sdk.runtime.stored_tensors import check_tensors


def check_compressed(directory: Path) -> None:
    """Check that the files of a compressed model hold what its config says.

    The module tree is built without weights, as for loading.

    Raises
    ------
    InputError
        If the folder is no compressed model, config.json or a header is damaged, or they disagree;
        every problem names its file and tensor.
    """
    config = read_config(directory)
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict):
        raise InputError(f"{directory} is no compressed model: see its config.json")
    layout = PackedLayout.from_dict(settings)
    checkpoint = Checkpoint.open(directory)
    check_layer_count(config, directory, len(checkpoint.tensors))
    model = empty_model(config, stored_dtype(config, directory))
    with torch.device("meta"):
        pack_modules(model, layout)
    check_tensors(model, checkpoint.tensors, str(directory))
