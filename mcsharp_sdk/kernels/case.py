"""What a kernel is chosen by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

MEASURED, BUILT_IN = "measured", "built in"


class Choice(NamedTuple):
    """What does a case, and by what it was chosen: ``MEASURED``, ``BUILT_IN``, or a variable."""

    kernel: str
    reason: str


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

    def key(self) -> str:
        """The product without its number of tokens; on a CPU, with the threads that it has."""
        threads = f", {torch.get_num_threads()} threads" if self.device == "cpu" else ""
        return (
            f"{self.rows} x {_in_header(self.columns)}, {self.bits} bits, "
            f"groups of {self.group_size}, {_name(self.dtype)}{threads}"
        )


@dataclass(frozen=True)
class LayerCase:
    """The routed experts of a layer, which some kernels run at once.

    Attributes
    ----------
    hidden, intermediate : rows and columns of ``down``.
    rows : of ``gate_up``.
    experts, slots : how many there are, and how many a token goes to.
    widths : that occur, ascending.
    group_size : of the codes.
    dtype : of the activations.
    device : kind of device.
    """

    hidden: int
    intermediate: int
    rows: int
    experts: int
    slots: int
    widths: tuple[int, ...]
    group_size: int
    dtype: torch.dtype
    device: str

    def key(self) -> str:
        """The layer in words."""
        return (
            f"{self.experts} experts, {self.slots} per token, {self.rows} x {self.hidden} and "
            f"{self.hidden} x {_in_header(self.intermediate)}, "
            f"{'/'.join(map(str, self.widths))} bits, groups of {self.group_size}, "
            f"{_name(self.dtype)}"
        )


def _in_header(columns: int) -> int:
    """Columns as headers of packed codes tell them."""
    return -(-columns // 8) * 8


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
