"""Load a model folder for evaluation, compressed or not, and never with made-up weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

import mcsharp_sdk.runtime.hf_quantizer  # noqa: F401  (lets transformers load compressed models)
from mcsharp_sdk.arguments import dtype_name
from mcsharp_sdk.errors import InputError, McSharpError
from mcsharp_sdk.evaluation.stored import read_config_json, read_layout
from mcsharp_sdk.models.architecture import (
    auto_class,
    compute_dtype,
    read_config,
    stored_dtype,
)
from mcsharp_sdk.models.config_file import quantisation_method
from mcsharp_sdk.models.device import AnyDevice, check_device, device_name
from mcsharp_sdk.runtime.layout import METHOD
from mcsharp_sdk.runtime.pruned_routing import set_expert_pruning
from mcsharp_sdk.runtime.stored_model import check_compressed

AnyDtype = str | torch.dtype
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(directory: Path, device: str, dtype: torch.dtype, pruning: str | None = None) -> Any:
    """The model in eval mode, its experts run by the exact ("eager") implementation.

    Parameters
    ----------
    directory : folder with config and safetensors; no code from it is run.
    device : ``auto`` spreads the model over the GPUs and, if need be, the CPU; else one device.
    dtype : to compute in; packed weights stay packed.
    pruning : how to prune experts: ``off``, ``rule``, ``learned`` or ``both``; None for as the
        model was made.

    Raises
    ------
    InputError
        If the files do not fill the architecture that the config describes, or the model cannot
        prune in this way.
    """
    config = read_config(directory)
    if quantisation_method(config) == METHOD:
        check_compressed(directory)
    try:
        with _no_progress_bar():
            loaded: Any = auto_class(config).from_pretrained(
                directory,
                dtype=dtype,
                device_map="auto" if device == "auto" else {"": device},
                experts_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
    except McSharpError:
        raise
    except Exception as error:  # which exception depends on the architecture and its config
        raise InputError(f"{directory} cannot be loaded: {error}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        names = ", ".join(missing[:5])
        raise InputError(f"{directory} lacks {len(missing)} tensors of its architecture: {names}")
    if pruning is not None:
        set_expert_pruning(model, pruning)
    return model.eval()


def check_pruning(mode: str | None, directory: Path) -> None:
    """Check that a model can prune its experts in this mode, before its weights are loaded.

    Raises
    ------
    InputError
        If it cannot; the message names the modes that it can do.
    """
    if mode is None:
        return
    layout = read_layout(read_config_json(directory), directory)
    if layout is not None and layout.pruning is not None:
        layout.pruning.check_mode(mode)
    elif mode != "off":
        raise InputError(
            f"expert pruning {mode!r} is not possible: {directory} has none; only 'off' is"
        )


def choose_device(device: AnyDevice) -> str:
    """``auto`` where there is a GPU, else ``cpu``; the name of any other that can be used.

    Raises
    ------
    InputError
        If there is no such device.
    """
    name = device_name(device)
    if name == "auto":
        return "auto" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


def choose_dtype(dtype: AnyDtype, config: Any, directory: Path, device: str) -> torch.dtype:
    """The dtype to compute in; ``auto`` goes by the weights of the model in ``directory``.

    See :func:`mcsharp_sdk.models.architecture.compute_dtype`.

    Raises
    ------
    InputError
        If it is not ``auto`` or one of ``DTYPES``.
    """
    name = dtype_name(dtype)
    if name == "auto":
        return compute_dtype(stored_dtype(config, directory), device)
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not known: use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
