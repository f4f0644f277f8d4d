"""One packed weight matrix with what is needed to read it."""

from __future__ import annotations

from dataclasses import dataclass

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
