"""Which kernel multiplies by which packed matrix of a model folder, on this machine's CPU."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.loading import DTYPES, choose_dtype
from mcsharp_sdk.evaluation.stored import read_config_json, read_layout
from mcsharp_sdk.kernels import KERNELS, Case, choose_kernel
from mcsharp_sdk.models.safetensors_file import TensorInfo
from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.models.source import read_config
from mcsharp_sdk.runtime.layout import PackedLayout

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
"""Tokens of one product that choices are shown for."""

_CODES = re.compile(r"^(?P<path>.*?\.)\d+(?P<rest>\..*?)[._]qweight$")
_BUCKET = re.compile(r"\.width_(\d+)\.")


@dataclass(frozen=True)
class KernelChoice:
    """What multiplies by all matrices of one name and shape.

    Attributes
    ----------
    matrix : name, with ``*`` for the decoder layer.
    count : how many matrices that is.
    bits, rows, columns : width and shape; columns are rounded up to a multiple of 8.
    kernels : tokens of a product -> name of the kernel.
    """

    matrix: str
    count: int
    bits: int
    rows: int
    columns: int
    kernels: dict[int, str]


@dataclass(frozen=True)
class KernelChoices:
    """Choices for a model folder.

    Attributes
    ----------
    dtype : of the activations, the one that evaluation on a CPU takes.
    matrices : one entry per name and shape.
    refusals : kernel -> why it can do none of the matrices; kernels that can do some are absent.
    """

    dtype: str
    matrices: tuple[KernelChoice, ...]
    refusals: dict[str, str]


def kernel_choices(model_dir: str | Path) -> KernelChoices:
    """Choices for every packed matrix, from headers alone.

    Raises
    ------
    InputError
        If the folder is no model or has no packed matrices, or ``MCSHARP_KERNEL`` names a kernel
        that does not exist or cannot do one of them.
    """
    directory = Path(model_dir)
    layout = read_layout(read_config_json(directory), directory)
    if layout is None or not layout.packs:
        raise InputError(f"{directory} has no packed matrices: it is not compressed")
    dtype = choose_dtype("auto", read_config(directory), "cpu")
    tensors = Checkpoint.open(directory).tensors
    shapes: Counter[tuple[str, int, int, int]] = Counter()
    for name, info in tensors.items():
        if found := _CODES.match(name):
            matrix = f"{found['path']}*{found['rest']}"
            shapes[(matrix, *_shape(name, info, layout))] += _stacked(info)
    cases = {key: _cases(key, layout.group_size, dtype) for key in shapes}
    return KernelChoices(
        dtype=next(name for name, value in DTYPES.items() if value == dtype),
        matrices=tuple(
            KernelChoice(
                *(key[0], count, *key[1:]),
                kernels={case.tokens: choose_kernel(case) for case in cases[key]},
            )
            for key, count in sorted(shapes.items())
        ),
        refusals=_refusals([case for found in cases.values() for case in found]),
    )


def _shape(name: str, info: TensorInfo, layout: PackedLayout) -> tuple[int, int, int]:
    """Bits, rows and columns of packed codes."""
    bucket = _BUCKET.search(name)
    bits = int(bucket[1]) if bucket else _linear_bits(name, layout.linears)
    return bits, info.shape[-2], info.shape[-1] * 8 // bits


def _linear_bits(name: str, linears: Mapping[str, int]) -> int:
    path = name.removesuffix(".qweight")
    for linear, bits in linears.items():
        if path.endswith(f".{linear}"):
            return bits
    raise InputError(f"{name} is stored packed, but config.json does not name it")


def _stacked(info: TensorInfo) -> int:
    return info.shape[0] if len(info.shape) == 3 else 1


def _cases(key: tuple[str, int, int, int], group_size: int, dtype: torch.dtype) -> tuple[Case, ...]:
    _, bits, rows, columns = key
    fields: dict[str, Any] = {"rows": rows, "columns": columns, "bits": bits, "device": "cpu"}
    return tuple(Case(tokens=n, group_size=group_size, dtype=dtype, **fields) for n in TOKENS)


def _refusals(cases: list[Case]) -> dict[str, str]:
    """Kernel -> why it can do none of these cases."""
    reasons = {name: [kernel.refuses(case) for case in cases] for name, kernel in KERNELS.items()}
    return {name: found[0] for name, found in reasons.items() if found and all(found)}
