"""The routed experts of one layer as kernels for whole layers see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsharp_sdk.quantization.grid import PackedWeight

PerSlot = Callable[[Tensor, Tensor], Tensor]
"""Rows [n, width] and the expert of each, int64 [n] -> rows."""


@dataclass(frozen=True)
class MatrixStack:
    """One matrix [R, K] of all experts of a layer, stacked by width.

    Attributes
    ----------
    weights : width -> the stacked tensors of the experts of that width.
    group_size : columns that share a scale and a zero point.
    columns : K.
    """

    weights: Mapping[int, PackedWeight]
    group_size: int
    columns: int

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that occur, ascending."""
        return tuple(sorted(self.weights))

    @property
    def rows(self) -> int:
        """R."""
        return int(next(iter(self.weights.values())).scales.shape[-2])


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of a layer.

    Attributes
    ----------
    gate_up, down : their matrices.
    table : int32 [experts + 1, 2], of :func:`expert_table`, on the device of the weights.
    between : what comes between the matrices, bias included; None for SiLU of the first half of
        ``gate_up``'s rows times the second half, which needs no code of the family.
    behind : what comes behind ``down``; None for nothing.
    """

    gate_up: MatrixStack
    down: MatrixStack
    table: Tensor
    between: PerSlot | None = None
    behind: PerSlot | None = None

    @property
    def experts(self) -> int:
        """How many there are; as an expert's number it marks a dropped slot."""
        return len(self.table) - 1


def expert_table(bits: Sequence[int]) -> Tensor:
    """Width of each expert and its place among those of its width, int32 [experts + 1, 2].

    The last row, of width 0, is that of a dropped slot.
    """
    seen: dict[int, int] = {}
    rows = []
    for width in bits:
        rows.append((width, seen.get(width, 0)))
        seen[width] = rows[-1][1] + 1
    return torch.tensor([*rows, (0, 0)], dtype=torch.int32)


def in_parts(run: Callable[..., Tensor], at_once: int, *tensors: Tensor) -> Tensor:
    """``run`` on so many rows of all tensors at a time, put together."""
    if len(tensors[0]) <= at_once:
        return run(*tensors)
    out, done = torch.empty(0), 0
    for part in zip(*(tensor.split(at_once) for tensor in tensors), strict=True):
        rows = run(*part)
        if not done:
            out = rows.new_empty(len(tensors[0]), *rows.shape[1:])
        out[done : done + len(rows)] = rows
        done += len(rows)
        del rows  # before the next part takes its scratch
    return out
