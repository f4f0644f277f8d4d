"""Give a layer the weights that an earlier, cut off run had quantised it to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mcsharp_sdk.models.experts import MATRICES, fused_weight
from mcsharp_sdk.models.stream import StreamedLayer
from mcsharp_sdk.quantization.grid import PackedWeight, dequantise, unpack_weight
from mcsharp_sdk.runtime.layout import TENSORS, bucket_name, members, tensor_name


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
    prefix = f"{layer.source.layer_path(layer.index)}."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in packed.items()}
    for name in layer.source.topology.linears[layer.index]:
        if linear_bits is not None:
            linear: Any = layer.module.get_submodule(name)
            weight = PackedWeight(*(tensors[f"{name}.{part}"] for part in TENSORS))
            linear.weight.copy_(_restored(weight, linear.weight, linear_bits, group_size))
    if expert_bits is None:
        return
    router = f"{layer.moe.router}.weight"
    if router in tensors:
        layer.module.get_parameter(router).copy_(tensors[router])
    experts: Any = layer.module.get_submodule(layer.moe.experts)
    for matrix in MATRICES:
        weights = fused_weight(experts, matrix)
        for width, chosen in members(expert_bits).items():
            bucket = f"{layer.moe.experts}.{bucket_name(width)}."
            stacked = [tensors[f"{bucket}{tensor_name(matrix, part)}"] for part in TENSORS]
            for slot, expert in enumerate(chosen):
                weight = PackedWeight(*(part[slot] for part in stacked))
                weights[expert] = _restored(weight, weights[expert], width, group_size)


def _restored(packed: PackedWeight, like: Tensor, bits: int, group_size: int) -> Tensor:
    """Dequantised weight of the shape and dtype of ``like``."""
    columns = like.shape[-1]
    weight = unpack_weight(packed, bits=bits, group_size=group_size, columns=columns)
    return dequantise(weight, like.dtype)
