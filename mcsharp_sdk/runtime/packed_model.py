"""Make a model's modules those of a compressed one."""

from __future__ import annotations

from typing import Any

from torch import nn

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.normal_form import normalise
from mcsharp_sdk.models.topology import read_topology
from mcsharp_sdk.runtime.layout import PackedLayout
from mcsharp_sdk.runtime.modules import PackedLinear, pack_experts_module
from mcsharp_sdk.runtime.pruned_routing import install_pruning


def pack_modules(model: Any, layout: PackedLayout) -> None:
    """Replace the modules that ``layout`` names by packed ones, in place, with empty tensors.

    If the model is to prune its experts, it gets pruners, switched off.

    Raises
    ------
    InputError
        If the layout does not fit the model: other layers, experts or linears.
    """
    normalise(model)
    topology = read_topology(model, model.config)
    if layout.pruning is not None:
        install_pruning(model, topology, layout.pruning)
    if layout.experts and set(layout.experts) != set(topology.moe):
        raise InputError(
            f"quantization_config has experts in decoder layers {sorted(layout.experts)}, "
            f"but the model in {sorted(topology.moe)}"
        )
    found: set[str] = set()
    for index, layer in enumerate(model.get_submodule(topology.layers_path)):
        for name in topology.linears[index]:
            if name in layout.linears:
                found.add(name)
                _pack_linear(layer, name, layout)
        if index in layout.experts:
            block = topology.moe[index]
            bits = layout.experts[index]
            if len(bits) != block.num_experts:
                raise InputError(
                    f"quantization_config gives {len(bits)} widths to the {block.num_experts} "
                    f"experts of decoder layer {index}"
                )
            experts = layer.get_submodule(block.experts)
            pack_experts_module(experts, bits, layout.group_size, rotated=layout.rotated)
    if missing := sorted(set(layout.linears) - found):
        raise InputError(f"quantization_config names linears that the model lacks: {missing}")


def _pack_linear(layer: nn.Module, name: str, layout: PackedLayout) -> None:
    linear: Any = layer.get_submodule(name)
    packed = PackedLinear(
        linear.in_features,
        linear.out_features,
        layout.linears[name],
        layout.group_size,
        linear.bias,
    )
    layer.set_submodule(name, packed)
