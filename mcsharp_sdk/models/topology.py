"""What is a decoder layer, a router, an expert and any other linear layer in a given model.

One generic reading of the module tree; what differs between families stands in tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.experts import is_experts

ROUTER_NAMES = ("gate", "router")

# Linear layers that steer the mixture instead of computing in it: tiny, and sensitive.
STEERING_LINEARS = frozenset({"gate", "router", "shared_expert_gate"})

TOP_K_SETTINGS = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token")


@dataclass(frozen=True)
class MoeBlock:
    """Where one decoder layer keeps its mixture of experts (paths relative to the layer)."""

    layer: int
    experts: str
    router: str
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class Topology:
    """The parts of a model that compression works on.

    Attributes
    ----------
    layers_path : module path of the list of decoder layers, e.g. ``model.layers``.
    num_layers : length of that list.
    moe : decoder layer index -> its mixture of experts; dense layers are absent.
    linears : decoder layer index -> paths, relative to the layer, of the linear layers outside the
        routed experts (attention, shared experts, dense MLP).
    """

    layers_path: str
    num_layers: int
    moe: dict[int, MoeBlock]
    linears: dict[int, tuple[str, ...]]

    def experts_per_layer(self) -> dict[int, int]:
        """Decoder layer index -> number of routed experts."""
        return {layer: block.num_experts for layer, block in self.moe.items()}


def read_topology(model: nn.Module, config: Any) -> Topology:
    """Find decoder layers, routers, experts and other linear layers in ``model`` (weights unused).

    Raises
    ------
    InputError
        If the model has no list of decoder layers, or none of them has fused routed experts.
    """
    layers_path, layers = _decoder_layers(model)
    moe, linears = {}, {}
    for index, layer in enumerate(layers):
        block = _moe_block(index, layer, config)
        if block is not None:
            moe[index] = block
        linears[index] = _other_linears(layer)
    if not moe:
        raise InputError(
            f"{config.model_type} has no mixture-of-experts layer that mcsharp_sdk knows: "
            "there is nothing to allocate bits to"
        )
    return Topology(layers_path, len(layers), moe, linears)


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: the list called ``layers`` that holds most experts."""
    candidates = [
        (sum(is_experts(m) for m in module.modules()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers"
    ]
    if not candidates:
        raise InputError(f"{type(model).__name__} has no list of decoder layers called 'layers'")
    _, name, module = max(candidates, key=lambda c: c[0])
    return name, module


def _moe_block(index: int, layer: nn.Module, config: Any) -> MoeBlock | None:
    found = [(name, module) for name, module in layer.named_modules() if is_experts(module)]
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise InputError(f"decoder layer {index} has several groups of routed experts: {names}")
    path, experts = found[0]
    parent = path.rpartition(".")[0]
    block = layer.get_submodule(parent)
    router = next((n for n in ROUTER_NAMES if isinstance(getattr(block, n, None), nn.Module)), None)
    if router is None:
        raise InputError(
            f"decoder layer {index}: no router beside the experts; "
            f"looked for {', '.join(ROUTER_NAMES)}"
        )
    return MoeBlock(
        layer=index,
        experts=path,
        router=f"{parent}.{router}" if parent else router,
        num_experts=int(experts.num_experts),
        top_k=_top_k(config),
    )


def _top_k(config: Any) -> int:
    text = config.get_text_config()
    for name in TOP_K_SETTINGS:
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    raise InputError(
        f"config.json of {config.model_type} does not say how many experts a token uses; "
        f"looked for {', '.join(TOP_K_SETTINGS)}"
    )


def _other_linears(layer: nn.Module) -> tuple[str, ...]:
    experts = [name for name, module in layer.named_modules() if is_experts(module)]
    return tuple(
        name
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
        and not STEERING_LINEARS.intersection(name.split("."))
        and not any(name.startswith(f"{path}.") for path in experts)
    )
