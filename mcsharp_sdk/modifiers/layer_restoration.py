"""Give a layer the weights that an earlier stage, or a run that was cut off, quantised it to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mcsharp_sdk.models.experts import MATRICES, fused_weight
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import StreamedLayer
from mcsharp_sdk.models.topology import MoeBlock, router_weight
from mcsharp_sdk.quantization.grid import PackedWeight, dequantise, unpack_weight
from mcsharp_sdk.runtime.layout import (
    TENSORS,
    PackedLayout,
    bucket_name,
    members,
    tensor_name,
)


@torch.no_grad()
def restore_layer(
    layer: StreamedLayer,
    packed: Mapping[str, Tensor],
    *,
    expert_bits: Sequence[int] | None,
    linear_bits: int | None,
    group_size: int,
) -> None:
    """Give a loaded layer the weights that :meth:`LayerQuantiser.quantise` left it with.

    Parameters
    ----------
    packed : the tensors that it returned.
    expert_bits, linear_bits, group_size : that it worked with.
    """
    names = layer.source.topology.linears[layer.index]
    linears = {} if linear_bits is None else dict.fromkeys(names, linear_bits)
    experts = {} if expert_bits is None else {layer.index: tuple(expert_bits)}
    layout = PackedLayout(group_size, experts, linears)
    restore_packed(layer.source, layer.index, packed, layout)


@torch.no_grad()
def restore_packed(
    source: SourceModel, index: int, packed: Mapping[str, Tensor], layout: PackedLayout
) -> None:
    """Give a loaded layer the weights that are packed as ``layout`` says.

    Parameters
    ----------
    source, index : the model, and which of its layers.
    packed : the layer's tensors, by their full names.
    """
    prefix = f"{source.layer_path(index)}."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in packed.items()}
    for name in source.topology.linears[index]:
        if name in layout.linears:
            linear: Any = source.layer(index).get_submodule(name)
            weight = PackedWeight(*(tensors[f"{name}.{part}"] for part in TENSORS))
            linear.weight.copy_(
                _restored(weight, linear.weight, layout.linears[name], layout.group_size)
            )
    if index in layout.experts:
        block = source.topology.moe[index]
        _restore_moe(source.layer(index), block, tensors, layout)


def _restore_moe(
    layer: nn.Module, block: MoeBlock, tensors: Mapping[str, Tensor], layout: PackedLayout
) -> None:
    """The router, if it was rounded, and the experts; ``tensors`` by names within the layer."""
    router = f"{block.router}.{router_weight(layer.get_submodule(block.router))}"
    if router in tensors:
        layer.get_parameter(router).copy_(tensors[router])
    experts: Any = layer.get_submodule(block.experts)
    for matrix in MATRICES:
        weights = fused_weight(experts, matrix)
        for width, chosen in members(layout.experts[block.layer]).items():
            bucket = f"{block.experts}.{bucket_name(width)}."
            stacked = [tensors[f"{bucket}{tensor_name(matrix, part)}"] for part in TENSORS]
            for slot, expert in enumerate(chosen):
                weight = PackedWeight(*(part[slot] for part in stacked))
                weights[expert] = _restored(weight, weights[expert], width, layout.group_size)


def _restored(packed: PackedWeight, like: Tensor, bits: int, group_size: int) -> Tensor:
    """Dequantised weight of the shape and dtype of ``like``."""
    columns = like.shape[-1]
    weight = unpack_weight(packed, bits=bits, group_size=group_size, columns=columns)
    return dequantise(weight, like.dtype)
