"""Which kernel multiplies by which packed matrix of a model folder, on a device of this machine."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mcsharp_sdk.arguments import given_path
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.cost import model_cost
from mcsharp_sdk.evaluation.loading import DTYPES, choose_device, choose_dtype
from mcsharp_sdk.evaluation.stored import read_config_json, read_layout
from mcsharp_sdk.kernels import KERNELS, Case
from mcsharp_sdk.kernels.case import LayerCase
from mcsharp_sdk.kernels.crossovers import hardware
from mcsharp_sdk.kernels.gpu_experts import explain_tiling
from mcsharp_sdk.kernels.gpu_support import HALF_PRECISION, missing_support
from mcsharp_sdk.kernels.linear import VARIABLE, WHOLE_LAYERS, explain_choice
from mcsharp_sdk.models.safetensors_file import TensorInfo
from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.models.source import read_config
from mcsharp_sdk.runtime.layout import PackedLayout

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
"""Tokens of one product that choices are shown for."""

LAYER_TOKENS = (*TOKENS, 4096)
"""The same for whole layers, which long prompts run in another way."""

_CODES = re.compile(r"^(?P<path>.*?\.)\d+(?P<rest>\..*?)[._]qweight$")
_BUCKET = re.compile(r"^(?P<experts>.*)\.width_(?P<bits>\d+)\.(?P<matrix>\w+?)(_qweight)?$")


@dataclass(frozen=True)
class KernelChoice:
    """What multiplies by all matrices of one name and shape.

    Attributes
    ----------
    matrix : name, with ``*`` for the decoder layer.
    count : how many matrices that is.
    bits, rows, columns : width and shape; columns are rounded up to a multiple of 8.
    chosen : by what: ``measured``, ``built in``, or the variable that forces one.
    kernels : tokens of a product -> name of the kernel.
    """

    matrix: str
    count: int
    bits: int
    rows: int
    columns: int
    chosen: str
    kernels: dict[int, str]


@dataclass(frozen=True)
class LayerChoice:
    """How the routed experts of some layers run on a GPU, whose kernels take a layer at once.

    Attributes
    ----------
    layers : how many layers that is.
    widths : that occur in each of them.
    chosen : by what: ``measured`` or ``built in``.
    tilings : tokens -> how the work is divided.
    """

    layers: int
    widths: tuple[int, ...]
    chosen: str
    tilings: dict[int, str]


@dataclass(frozen=True)
class KernelChoices:
    """Choices for a model folder.

    Attributes
    ----------
    device, hardware : kind of device, and what it is called.
    dtype : of the activations.
    matrices : one entry per name and shape.
    layers : of experts that run a layer at once; their matrices are not among the others then.
    refusals : kernel -> why it can do none of the matrices; kernels that can do some are absent.
    """

    device: str
    hardware: str
    dtype: str
    matrices: tuple[KernelChoice, ...]
    layers: tuple[LayerChoice, ...]
    refusals: dict[str, str]


@dataclass(frozen=True)
class Products:
    """What a compressed model multiplies by.

    Attributes
    ----------
    device, dtype : where, and in which.
    matrices : name, with ``*`` for the decoder layer, and product with one token -> how many.
    layers : experts that run a layer at once on a GPU -> how many layers.
    """

    device: str
    dtype: torch.dtype
    matrices: Mapping[tuple[str, Case], int]
    layers: Mapping[LayerCase, int]


def products_of(model_dir: str | Path, device: str = "auto", dtype: str = "auto") -> Products:
    """The products of a model folder, from headers alone.

    Raises
    ------
    InputError
        If the folder is no model or has no packed matrices, or there is no such device or dtype.
    """
    directory = given_path(model_dir, "model_dir")
    layout = read_layout(read_config_json(directory), directory)
    if layout is None or not layout.packs:
        raise InputError(
            f"{directory} has no packed matrices: it is not compressed; give one that is"
        )
    device = choose_device(device)
    kind = torch.device("cuda" if device == "auto" else device).type
    chosen = choose_dtype(dtype, read_config(directory), directory, kind)
    matrices: Counter[tuple[str, Case]] = Counter()
    shapes: dict[str, Case] = {}
    for name, info in Checkpoint.open(directory).tensors.items():
        if found := _CODES.match(name):
            bits, rows, columns = _shape(name, info, layout)
            case = Case(rows, columns, bits, layout.group_size, 1, chosen, kind)
            matrices[f"{found['path']}*{found['rest']}", case] += _stacked(info)
            shapes[name] = case
    if not _runs_whole_layers(kind, chosen):
        return Products(kind, chosen, matrices, {})
    alone = {(name, case): n for (name, case), n in matrices.items() if not _BUCKET.match(name)}
    layers = _layers(shapes, layout, model_cost(directory).top_k)
    return Products(kind, chosen, alone, layers)


def kernel_choices(
    model_dir: str | Path, device: str = "auto", dtype: str = "auto"
) -> KernelChoices:
    """Choices for every packed matrix, from headers alone.

    Parameters
    ----------
    device : ``auto`` for the GPU where there is one, else the CPU.
    dtype : of the activations; ``auto`` for the one that evaluation on this device takes.

    Raises
    ------
    InputError
        If the folder is no model or has no packed matrices, there is no such device or
        dtype, or ``MCSHARP_KERNEL`` names a kernel that does not exist or cannot do one of them.
    """
    products = products_of(model_dir, device, dtype)
    matrices = sorted(products.matrices.items(), key=_by_name)
    return KernelChoices(
        device=products.device,
        hardware=hardware(products.device),
        dtype=next(name for name, value in DTYPES.items() if value == products.dtype),
        matrices=tuple(_choice(name, case, count) for (name, case), count in matrices),
        layers=tuple(_layer_choice(case, count) for case, count in products.layers.items()),
        refusals=_refusals([case for _, case in products.matrices]),
    )


def _by_name(item: tuple[tuple[str, Case], int]) -> tuple[str, int, int, int]:
    (name, case), _ = item
    return name, case.bits, case.rows, case.columns


def _choice(name: str, case: Case, count: int) -> KernelChoice:
    choices = {tokens: explain_choice(replace(case, tokens=tokens)) for tokens in TOKENS}
    return KernelChoice(
        *(name, count, case.bits, case.rows, case.columns),
        chosen=choices[TOKENS[0]].reason,
        kernels={tokens: choice.kernel for tokens, choice in choices.items()},
    )


def _layer_choice(case: LayerCase, layers: int) -> LayerChoice:
    choices = {tokens: explain_tiling(case, tokens) for tokens in LAYER_TOKENS}
    return LayerChoice(
        layers=layers,
        widths=case.widths,
        chosen=choices[TOKENS[0]].reason,
        tilings={tokens: choice.kernel for tokens, choice in choices.items()},
    )


def _runs_whole_layers(device: str, dtype: torch.dtype) -> bool:
    """Whether all experts of a layer run at once in kernels of their own, as on a GPU."""
    forced = os.environ.get(VARIABLE, WHOLE_LAYERS[0])
    return dtype in HALF_PRECISION and forced in WHOLE_LAYERS and not missing_support(device)


def _layers(shapes: Mapping[str, Case], layout: PackedLayout, slots: int) -> dict[LayerCase, int]:
    """The layers of experts that packed codes belong to -> how many are alike.

    Parameters
    ----------
    shapes : name of packed codes -> product with one token.
    """
    layers: dict[str, dict[str, dict[int, Case]]] = {}
    for name, case in shapes.items():
        if found := _BUCKET.match(name):
            matrices = layers.setdefault(found["experts"], {})
            matrices.setdefault(found["matrix"], {})[case.bits] = case
    cases: Counter[LayerCase] = Counter()
    for path, matrices in layers.items():
        first, second = (next(iter(matrices[m].values())) for m in ("gate_up", "down"))
        cases[
            LayerCase(
                hidden=second.rows,
                intermediate=second.columns,
                rows=first.rows,
                experts=len(layout.experts[_number(path)]),
                slots=slots,
                widths=tuple(sorted(matrices["down"])),
                group_size=layout.group_size,
                dtype=first.dtype,
                device=first.device,
            )
        ] += 1
    return cases


def _number(path: str) -> int:
    """The decoder layer that a module path lies in."""
    return next(int(part) for part in path.split(".") if part.isdecimal())


def _shape(name: str, info: TensorInfo, layout: PackedLayout) -> tuple[int, int, int]:
    """Bits, rows and columns of packed codes."""
    bucket = _BUCKET.match(name)
    bits = int(bucket["bits"]) if bucket else _linear_bits(name, layout.linears)
    return bits, info.shape[-2], info.shape[-1] * 8 // bits


def _linear_bits(name: str, linears: Mapping[str, int]) -> int:
    path = name.removesuffix(".qweight")
    for linear, bits in linears.items():
        if path.endswith(f".{linear}"):
            return bits
    raise InputError(f"{name} is stored packed, but config.json does not name it")


def _stacked(info: TensorInfo) -> int:
    return info.shape[0] if len(info.shape) == 3 else 1


def _refusals(cases: Sequence[Case]) -> dict[str, str]:
    """Kernel -> why it can do none of these cases."""
    reasons = {name: [kernel.refuses(case) for case in cases] for name, kernel in KERNELS.items()}
    return {name: found[0] for name, found in reasons.items() if found and all(found)}
