"""What a kernel is chosen by."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """A product that some kernel has to do.

    Attributes
    ----------
    rows, columns : R and K of the matrix.
    bits, group_size : of its codes.
    tokens : rows of the activations.
    dtype : of the activations.
    device : kind of device that both are on, such as ``cpu``.
    """

    rows: int
    columns: int
    bits: int
    group_size: int
    tokens: int
    dtype: torch.dtype
    device: str
