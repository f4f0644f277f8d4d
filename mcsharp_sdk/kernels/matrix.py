"""Packed weight matrices with what is needed to read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.quantization.grid import PackedWeight, group_count
from mcsharp_sdk.quantization.packing import packed_bytes


@dataclass(frozen=True)
class PackedMatrix:
    """A weight matrix W, [R, K], as stored; products check that the fields fit together.

    Attributes
    ----------
    weight : its codes, scales and zero-point codes.
    bits : width of a code.
    group_size : columns that share a scale and a zero point.
    columns : K.
    """

    weight: PackedWeight
    bits: int
    group_size: int
    columns: int

    @property
    def rows(self) -> int:
        """R."""
        return int(self.weight.scales.shape[-2])

    def stack(self) -> PackedStack:
        """A stack of this matrix alone."""
        parts = (self.weight.qweight, self.weight.scales, self.weight.zeros)
        weight = PackedWeight(*(part.unsqueeze(0) for part in parts))
        return PackedStack(weight, self.bits, self.group_size, self.columns)


@dataclass(frozen=True)
class PackedStack:
    """Weight matrices of one shape and width, [n, R, K], as stored; fields as in a matrix."""

    weight: PackedWeight
    bits: int
    group_size: int
    columns: int

    @property
    def rows(self) -> int:
        """R."""
        return int(self.weight.scales.shape[-2])

    def check(self) -> None:
        """Refuse tensors that are not what the other fields say: kernels would read beyond them.

        It takes one or two microseconds.

        Raises
        ------
        InputError
            If a shape, dtype or device does not fit, or there is no such width or group size.
        """
        codes, scales, zeros = self.weight.qweight, self.weight.scales, self.weight.zeros
        if scales.ndim != 3:
            raise InputError(
                f"scales have shape {list(scales.shape)}, not [matrices, rows, groups]"
            )
        count, rows, _ = scales.shape
        per_row, groups, per_group = _stored(rows, self.columns, self.bits, self.group_size)
        if (
            codes.shape == (count, rows, per_row)
            and scales.shape == (count, rows, groups)
            and zeros.shape == (count, groups, per_group)
            and codes.dtype == zeros.dtype == torch.uint8
            and scales.is_floating_point()
            and codes.device == scales.device == zeros.device
        ):
            return
        given = ", ".join(_described(part) for part in (codes, scales, zeros))
        raise InputError(
            f"packed matrices of {rows} x {self.columns} weights of {self.bits} bits in groups of "
            f"{self.group_size} have, on one device, codes of uint8 {[count, rows, per_row]}, "
            f"scales of float16 {[count, rows, groups]} and zeros of uint8 "
            f"{[count, groups, per_group]}, not {given}"
        )

    def matrix(self, slot: int) -> PackedMatrix:
        """One of the matrices."""
        parts = (self.weight.qweight, self.weight.scales, self.weight.zeros)
        weight = PackedWeight(*(part[slot] for part in parts))
        return PackedMatrix(weight, self.bits, self.group_size, self.columns)

    def memory(self) -> StackMemory:
        """Where the matrices lie.

        Scales are read as float16, also where a model was cast to another dtype as a whole.
        """
        parts = (self.weight.qweight, self.weight.scales.half(), self.weight.zeros)
        return StackMemory(*(part.contiguous() for part in parts))


def _stored(rows: int, columns: int, bits: int, group_size: int) -> tuple[int, int, int]:
    """Bytes of a row's codes, groups of a row, and bytes of a group's zero-point codes."""
    try:
        groups = group_count(columns, group_size)
        return packed_bytes(columns, bits), groups, packed_bytes(rows, bits)
    except ValueError as error:
        raise InputError(f"a packed matrix cannot be read: {error}") from None


def _described(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)} on {tensor.device}"


class StackMemory(NamedTuple):
    """Codes, fp16 scales and zero-point codes of stacked matrices; they live as long as this."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor

    def addresses(self, slot: int) -> tuple[int, int, int]:
        """Where the three parts of one matrix are."""
        codes, scales, zeros = (
            part.data_ptr() + slot * part.stride(0) * part.element_size() for part in self
        )
        return codes, scales, zeros
