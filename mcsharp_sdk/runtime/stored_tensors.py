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

from mcsharp_sdk.errors import MOST_MISFITS, Problem, raise_problems
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
    check_tensors(model, tensors, str(home))


def _is_inside(path: Path, folder: Path) -> bool:
    """By their names: a link in a folder may lead elsewhere, as in the download cache."""
    return path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts


def check_tensors(model: Any, tensors: Mapping[str, TensorInfo], subject: str) -> None:
    """Check that headers fit a packed model on the meta device; InputProblems if they do not."""
    raise_problems(subject, list(_misfits(model, tensors)), MOST_MISFITS)


def _misfits(model: Any, tensors: Mapping[str, TensorInfo]) -> Iterator[Problem]:
    optional = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    tied = set(model.all_tied_weights_keys)
    wanted: Mapping[str, Tensor] = model.state_dict()
    for name, tensor in wanted.items():
        info = tensors.get(name)
        if info is None:
            if name not in tied and not any(re.search(pattern, name) for pattern in optional):
                yield Problem("", f"{name}: no file has it, but config.json asks for it")
        elif info.shape != tuple(tensor.shape):
            yield Problem(
                f"{info.file.name}: {name}",
                f"is {list(info.shape)}, but {list(tensor.shape)} by config.json",
            )
        elif (
            info.dtype != tensor.dtype and tensor.dtype in PACKED_DTYPES and name.endswith(TENSORS)
        ):
            yield Problem(f"{info.file.name}: {name}", f"is {info.dtype}, not {tensor.dtype}")
