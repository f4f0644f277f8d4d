"""What a compressed model's ``config.json`` says about its packed tensors, and their names.

The one place where the stored format is written down:

- ``experts``: decoder layer index -> bit width of each routed expert. The experts of one width
  are stacked in a bucket ``<experts>.width_<b>``, in ascending order of expert. One of 0 bits is
  removed: nothing of it is stored, and its weights count as zeros.
- ``linears``: path of a linear layer, relative to the decoder layer -> its width; it holds for
  every decoder layer that has such a linear.
- ``pruning``: how experts are pruned at run time, absent if they are not; see
  :mod:`mcsharp_sdk.runtime.pruning_layout`.

``experts`` and ``linears`` are empty in a model that is pruned but not quantised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.config_file import METHOD
from mcsharp_sdk.models.experts import Matrix
from mcsharp_sdk.quantization.grid import REMOVED, WIDTHS, PackedWeight, group_count
from mcsharp_sdk.quantization.packing import packed_bytes
from mcsharp_sdk.runtime.config_fields import check_fields
from mcsharp_sdk.runtime.pruning_layout import PruningLayout

FORMAT_VERSION = 1
WEIGHTS_NAME = "mcsharp"
"""Weight files are ``mcsharp-00001-of-0000N.safetensors`` with an index, never ``model…``:
so transformers without this package finds no weights instead of leaving experts random."""

FIELDS = frozenset({"format_version", "group_size", "experts", "linears", "rotation", "pruning"})
"""What a ``quantization_config`` may have besides ``quant_method``."""

HADAMARD = "hadamard"
"""The rotation of the experts' inputs that there is (``quantization.rotation``)."""

INDEX_FILE = f"{WEIGHTS_NAME}.safetensors.index.json"
TENSORS = ("qweight", "scales", "zeros")


@dataclass(frozen=True)
class PackedLayout:
    """Which tensors are packed, and how.

    Attributes
    ----------
    group_size : columns that share a scale and a zero point.
    experts : decoder layer -> width per expert.
    linears : path relative to the decoder layer -> width.
    pruning : which experts are left out at run time; None for none.
    rotated : whether the inputs of the experts' matrices are turned.
    """

    group_size: int
    experts: Mapping[int, tuple[int, ...]]
    linears: Mapping[str, int]
    pruning: PruningLayout | None = None
    rotated: bool = False

    @property
    def packs(self) -> bool:
        """Whether any tensor is packed: not in a model that is only pruned."""
        return bool(self.experts or self.linears)

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``."""
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "group_size": self.group_size,
            "experts": {str(layer): list(bits) for layer, bits in self.experts.items()},
            "linears": dict(self.linears),
            **({"rotation": HADAMARD} if self.rotated else {}),
            **({"pruning": self.pruning.to_dict()} if self.pruning else {}),
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> PackedLayout:
        """Read a ``quantization_config``.

        Raises
        ------
        InputError
            If it is of another version, or not what ``to_dict`` writes.
        """
        version = config.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"quantization_config has format_version {version!r}; this mcsharp_sdk reads "
                f"version {FORMAT_VERSION}"
            )
        check_layout_fields(config)
        pruning = _read_pruning(config.get("pruning"))
        try:
            layout = cls(
                group_size=_whole(config["group_size"]),
                experts={
                    int(layer): tuple(_whole(b) for b in bits)
                    for layer, bits in config["experts"].items()
                },
                linears={str(name): _whole(bits) for name, bits in config["linears"].items()},
                rotated=_read_rotation(config.get("rotation")),
                pruning=pruning,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"quantization_config is malformed: {error!r}") from error
        of_experts = {b for bits in layout.experts.values() for b in bits}
        widths = (of_experts - {REMOVED}) | set(layout.linears.values())
        if layout.group_size < 1 or not widths <= set(WIDTHS):
            raise InputError(
                f"quantization_config asks for group size {layout.group_size} and widths "
                f"{sorted(widths)}; group sizes from 1 and widths of {list(WIDTHS)} are stored"
            )
        return layout


def check_layout_fields(config: Mapping[str, Any]) -> None:
    """InputError if a ``quantization_config`` says more than is understood here."""
    check_fields("quantization_config", config, FIELDS | {"quant_method"})


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _read_rotation(rotation: Any) -> bool:
    if rotation not in (None, HADAMARD):
        raise ValueError(f"rotation {rotation!r}")
    return rotation is not None


def _read_pruning(config: Mapping[str, Any] | None) -> PruningLayout | None:
    return None if config is None else PruningLayout.from_dict(config)


def members(bits: Sequence[int]) -> dict[int, list[int]]:
    """Width -> the experts that have it, both ascending; without those that are removed."""
    widths = sorted(set(bits) - {REMOVED})
    return {width: [e for e, b in enumerate(bits) if b == width] for width in widths}


def removed(bits: Sequence[int]) -> list[int]:
    """The experts that are removed, ascending."""
    return [expert for expert, width in enumerate(bits) if width == REMOVED]


def bucket_name(width: int) -> str:
    """Name of the module that stacks the experts of one width."""
    return f"width_{width}"


def tensor_name(matrix: Matrix, part: str) -> str:
    """Name of a bucket's tensor: ``part`` (one of ``TENSORS``) of ``matrix``."""
    return f"{matrix}_{part}"


def stack_names(width: int, matrix: Matrix) -> list[str]:
    """Names within the experts module of the tensors of a width's stacked matrices."""
    return [f"{bucket_name(width)}.{tensor_name(matrix, part)}" for part in TENSORS]


def empty_packed(rows: int, columns: int, bits: int, group_size: int, *batch: int) -> PackedWeight:
    """Uninitialised tensors of one packed matrix [R, K], or of a stack of them."""
    groups = group_count(columns, group_size)
    return PackedWeight(
        torch.empty(*batch, rows, packed_bytes(columns, bits), dtype=torch.uint8),
        torch.empty(*batch, rows, groups, dtype=torch.float16),
        torch.empty(*batch, groups, packed_bytes(rows, bits), dtype=torch.uint8),
    )


def linear_tensors(path: str, packed: PackedWeight) -> dict[str, Tensor]:
    """Name -> tensor of one packed linear layer."""
    return {f"{path}.{part}": getattr(packed, part) for part in TENSORS}
