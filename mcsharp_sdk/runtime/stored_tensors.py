"""Whether the files of a compressed model hold what its config says, told from headers alone.

Nothing in the folder is trusted: a wrong width, shape or dtype is an error that names file and
tensor before a weight is read, never a view of other bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsharp_sdk.errors import MOST_MISFITS, InputError, Problem, raise_problems
from mcsharp_sdk.models.architecture import auto_class
from mcsharp_sdk.models.safetensors_file import TensorInfo, read_header
from mcsharp_sdk.runtime.layout import TENSORS

PACKED_DTYPES = (torch.uint8, torch.float16)
"""Dtypes that are never converted when a model is loaded: those of codes and of scales."""


def check_files(model: Any, files: Sequence[str | Path]) -> None:
    """Check the files of a packed model that transformers is about to load, from their headers.

    Raises
    ------
    InputProblems
        If headers are damaged, a file lies elsewhere than the others, or tensors do not fit.
    """
    paths = [Path(file) for file in files]
    folder, home = Path(str(model.config.name_or_path)), paths[0].parent
    inside = not folder.is_dir() or _is_inside(home, folder)
    home = home if inside else folder
    tensors: dict[str, TensorInfo] = {}
    problems = []
    for path in paths:
        if path.parent != home:
            problems.append(Problem(str(path), f"lies outside of the model's folder {home}"))
            continue
        header, faults = read_header(path)
        tensors.update(header.tensors)
        problems += faults
    raise_problems(str(home), problems)
    loaded = _as_loaded(model, tensors)
    _check_class(model, loaded, home)
    _check_tensors(model, loaded, str(home))


def _as_loaded(model: Any, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors by the names that transformers gives them as it loads them.

    A base model, as of ``AutoModel``, has the names of the model around it without its prefix.
    """
    wanted, prefix = model.state_dict(), f"{model.base_model_prefix}."
    inner = {name: name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    outer = {name: f"{prefix}{name}" for name in tensors}
    renamed = {old: new for old, new in {**outer, **inner}.items() if new in wanted}
    return {renamed.get(name, name): info for name, info in tensors.items()}


def _check_class(model: Any, tensors: Mapping[str, TensorInfo], home: Path) -> None:
    """Refuse to load as a model of another class what lacks tensors of that."""
    stored = model.config.architectures or [type(model).__name__]
    missing = list(_missing(model, tensors))
    if missing and type(model).__name__ not in stored:
        auto = auto_class(model.config)
        whole = auto._model_mapping[type(model.config)].__name__ == stored[0]
        loader = auto.__name__ if whole else stored[0]
        raise InputError(
            f"{home} holds a {stored[0]}, which has no {missing[0]} for a {type(model).__name__}: "
            f"load it by {loader}"
        )


def _missing(model: Any, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Names of the model's tensors that no file has and that cannot be done without."""
    optional = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    for name in model.state_dict():
        needed = name not in tensors and name not in model.all_tied_weights_keys
        if needed and not any(re.search(pattern, name) for pattern in optional):
            yield name


def _is_inside(path: Path, folder: Path) -> bool:
    """By their names: a link in a folder may lead elsewhere, as in the download cache."""
    return path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts


def check_tensors(model: Any, tensors: Mapping[str, TensorInfo], subject: str) -> None:
    """Check that headers fit a packed model on the meta device; InputProblems if they do not."""
    _check_tensors(model, _as_loaded(model, tensors), subject)


def _check_tensors(model: Any, loaded: Mapping[str, TensorInfo], subject: str) -> None:
    raise_problems(subject, list(_misfits(model, loaded)), MOST_MISFITS)


def _misfits(model: Any, tensors: Mapping[str, TensorInfo]) -> Iterator[Problem]:
    for name in _missing(model, tensors):
        yield Problem("", f"{name}: no file has it, but config.json asks for it")
    wanted: Mapping[str, Tensor] = model.state_dict()
    for name in (name for name in wanted if name in tensors):
        tensor, info = wanted[name], tensors[name]
        if info.shape != tuple(tensor.shape):
            yield Problem(
                f"{info.file.name}: {name}",
                f"is {list(info.shape)}, but {list(tensor.shape)} by config.json",
            )
        elif (
            info.dtype != tensor.dtype and tensor.dtype in PACKED_DTYPES and name.endswith(TENSORS)
        ):
            yield Problem(f"{info.file.name}: {name}", f"is {info.dtype}, not {tensor.dtype}")
