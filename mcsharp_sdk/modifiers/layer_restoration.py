"""Give a layer the weights that an earlier stage, or a run that was cut off, quantised it to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mcsharp_sdk.models.expert_weights import ExpertWeights
from mcsharp_sdk.models.experts import MATRICES, Matrix, fused_weight
from mcsharp_sdk.models.shards import TensorSlice
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.streamed_layer import StreamedLayer
from mcsharp_sdk.models.topology import router_weight
from mcsharp_sdk.quantization.grid import REMOVED, PackedWeight, dequantise, unpack_weight
from mcsharp_sdk.quantization.rotation import expert_signs, turned_back
from mcsharp_sdk.runtime.layout import TENSORS, PackedLayout, members, stack_names

Packed = Mapping[str, TensorSlice]
"""Full names of a layer's packed tensors -> what reads them."""


@dataclass
class PackedExperts(ExpertWeights):
    """Weights that are packed in a file, unpacked one expert at a time.

    Attributes
    ----------
    bits : width of each expert.
    packed : names within the experts' module -> what reads the tensors.
    rotated : whether they are packed with their inputs turned.
    """

    module: Any
    bits: Sequence[int]
    group_size: int
    packed: Packed
    device: str
    rotated: bool

    def __post_init__(self) -> None:
        self._members = members(self.bits)
        self._in_use: dict[tuple[Matrix, int], Tensor] = {}

    @property
    def in_memory(self) -> bool:
        """Never."""
        return False

    def read(self, matrix: Matrix, expert: int) -> Tensor:
        """From the file, unless the expert is in use."""
        if (matrix, expert) not in self._in_use:
            width = self.bits[expert]
            like = fused_weight(self.module, matrix)[0]
            if width == REMOVED:
                return torch.zeros_like(like, device=self.device)
            slot = self._members[width].index(expert)
            stacks = (self.packed[name] for name in stack_names(width, matrix))
            parts = (stack[slot : slot + 1][0].to(self.device) for stack in stacks)
            signs = None
            if self.rotated:
                signs = expert_signs(self.num_experts, like.shape[-1], self.device)[expert]
            packed = PackedWeight(*parts)
            restored = _restored(packed, like, width, self.group_size, signs)
            self._in_use[matrix, expert] = restored
        return self._in_use[matrix, expert]

    def replace(self, matrix: Matrix, expert: int, weight: Tensor) -> None:
        """Kept in memory until the expert is released; what is on disk stays."""
        self._in_use[matrix, expert] = weight

    def release(self, expert: int) -> None:
        """Forget the expert."""
        for matrix in MATRICES:
            self._in_use.pop((matrix, expert), None)


@torch.no_grad()
def restore_packed(layer: StreamedLayer, packed: Packed, layout: PackedLayout) -> None:
    """Give a loaded layer the weights that are packed as ``layout`` says.

    Its routed experts are read from ``packed`` from now on, one by one.

    Parameters
    ----------
    packed : the layer's tensors, by their full names.
    """
    restore_linears(layer.source, layer.index, packed, layout)
    experts = packed_experts(layer.source, layer.index, packed, layout)
    layer.experts = layer.experts if experts is None else experts


@torch.no_grad()
def restore_whole(source: SourceModel, index: int, packed: Packed, layout: PackedLayout) -> None:
    """As :func:`restore_packed`, with all of the experts written into the loaded layer."""
    restore_linears(source, index, packed, layout)
    experts = packed_experts(source, index, packed, layout)
    if experts is None:
        return
    for expert in range(experts.num_experts):
        for matrix in MATRICES:
            fused_weight(experts.module, matrix)[expert] = experts.read(matrix, expert)
        experts.release(expert)


def restore_linears(source: SourceModel, index: int, packed: Packed, layout: PackedLayout) -> None:
    """Give the linears outside of the experts, and the router if it was rounded, what is packed."""
    prefix = f"{source.layer_path(index)}."
    layer: Any = source.layer(index)
    for name in source.topology.linears[index]:
        if name in layout.linears:
            linear = layer.get_submodule(name)
            parts = (packed[f"{prefix}{name}.{part}"][...] for part in TENSORS)
            weight = PackedWeight(*(part.to(source.device) for part in parts))
            linear.weight.copy_(
                _restored(weight, linear.weight, layout.linears[name], layout.group_size)
            )
    block = source.topology.moe.get(index)
    if block is not None and index in layout.experts:
        router = f"{block.router}.{router_weight(layer.get_submodule(block.router))}"
        if f"{prefix}{router}" in packed:
            layer.get_parameter(router).copy_(packed[f"{prefix}{router}"][...])


def packed_experts(
    source: SourceModel, index: int, packed: Packed, layout: PackedLayout
) -> PackedExperts | None:
    """A layer's packed experts; None if they are not packed."""
    if index not in layout.experts:
        return None
    block = source.topology.moe[index]
    prefix = f"{source.layer_path(index)}.{block.experts}."
    own = {n.removeprefix(prefix): t for n, t in packed.items() if n.startswith(prefix)}
    module = source.layer(index).get_submodule(block.experts)
    bits = layout.experts[index]
    return PackedExperts(module, bits, layout.group_size, own, source.device, layout.rotated)


def _restored(
    packed: PackedWeight, like: Tensor, bits: int, group_size: int, signs: Tensor | None = None
) -> Tensor:
    """Dequantised weight of the shape and dtype of ``like``; with ``signs``, turned back."""
    columns = like.shape[-1]
    weight = unpack_weight(packed, bits=bits, group_size=group_size, columns=columns)
    if signs is None:
        return dequantise(weight, like.dtype)
    return turned_back(weight, like.dtype, signs)
