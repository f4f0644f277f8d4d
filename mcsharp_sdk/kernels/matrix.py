"""Packed weight matrices with what is needed to read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mcsharp_sdk.quantization.grid import PackedWeight


@dataclass(frozen=True)
class PackedMatrix:
    """A weight matrix W, [R, K], as stored.

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
