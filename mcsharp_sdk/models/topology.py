"""What is a decoder layer, a router, an expert and any other linear layer in a given model.

One generic reading of the module tree; what differs between families stands in tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.experts import is_experts

ROUTER_NAMES = ("gate", "router")

# Linear layers that steer the mixture instead of computing in it: tiny, and sensitive.
STEERING_LINEARS = frozenset({"gate", "router", "shared_expert_gate"})

KEPT_LINEARS: Mapping[str, str] = {
    "x_proj": "Mamba: makes the step sizes and what enters and leaves the state",
    "dt_proj": "Mamba: makes the step sizes; some kernels read its weight directly",
    "mixer.in_proj": "Mamba-2 (nemotron_h): makes step sizes and states among others",
    "mixer.out_proj": "Mamba-2 (nemotron_h): its fused kernel reads the weight directly",
    "in_proj_ba": "gated delta net: makes decay and write strength",
    "fc1_latent_proj": "nemotron_h: all experts of a layer get their tokens through it",
    "fc2_latent_proj": "nemotron_h: all experts of a layer give their outputs through it",
}
"""End of a linear layer's path -> why it keeps its precision."""

KEPT_EXPERTS: Mapping[str, str] = {
    "vision_moe.experts": "ernie4_5_vl_moe: experts of image tokens, a second group in each layer",
}
"""End of an experts module's path -> which they are: they stay as they are."""

NUM_EXPERTS_SETTING = "moe_num_experts"
"""What families call the number of experts that store them so that shapes do not tell it (dbrx,
ernie4_5_vl_moe)."""

TOP_K_SETTINGS = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_token")


@dataclass(frozen=True)
class MoeBlock:
    """Where one decoder layer keeps its mixture of experts (paths relative to the layer).

    ``weighs_input``: routing weights multiply an expert's input instead of its output.
    ``attends``: the layer has softmax attention that SDPA runs, so that it can be told what
    attention tokens receive.
    """

    layer: int
    experts: str
    router: str
    num_experts: int
    top_k: int
    weighs_input: bool = False
    attends: bool = True


@dataclass(frozen=True)
class Topology:
    """The parts of a model that compression works on.

    Attributes
    ----------
    layers_path : module path of the list of decoder layers, e.g. ``model.layers``.
    num_layers : length of that list.
    moe : decoder layer index -> its mixture of experts; dense layers are absent.
    linears : decoder layer index -> paths, relative to the layer, of the linear layers outside the
        routed experts that may be quantised (attention, shared experts, dense MLP).
    kept_experts : routed experts that are never compressed, as said in ``KEPT_EXPERTS``.
    kept_linears : linear layers that are never compressed, as named in ``KEPT_LINEARS``.
    """

    layers_path: str
    num_layers: int
    moe: dict[int, MoeBlock]
    linears: dict[int, tuple[str, ...]]
    kept_experts: tuple[str, ...] = ()
    kept_linears: tuple[str, ...] = ()

    @property
    def decoder_path(self) -> str:
        """Module path of what holds the layers, e.g. ``model``."""
        return self.layers_path.rpartition(".")[0]

    def layer_path(self, layer: int) -> str:
        """Module path of decoder layer ``layer``."""
        return f"{self.layers_path}.{layer}"

    def in_layers(self, name: str) -> bool:
        """Whether a tensor or module of the tree is in a decoder layer."""
        return name.startswith(f"{self.layers_path}.")

    def experts_per_layer(self) -> dict[int, int]:
        """Decoder layer index -> number of routed experts."""
        return {layer: block.num_experts for layer, block in self.moe.items()}


def read_topology(model: nn.Module, config: Any) -> Topology:
    """Find decoder layers, routers, experts and other linear layers in ``model`` (weights unused).

    Raises
    ------
    InputError
        If the model has no decoder layer with fused routed experts, or a layer has several groups
        of them or no router beside them.
    """
    layers_path, layers = _decoder_layers(model, config.model_type)
    sdpa = _has_sdpa(model.get_submodule(layers_path.rpartition(".")[0]))
    moe, linears = {}, {}
    for index, layer in enumerate(layers):
        block = _moe_block(index, layer, config, attends=sdpa and _attends(layer))
        if block is not None:
            moe[index] = block
        linears[index] = _other_linears(layer)
    return Topology(
        layers_path, len(layers), moe, linears, _kept_experts(layers), _kept_linears(layers)
    )


def why_not_prunable(blocks: Iterable[MoeBlock]) -> str | None:
    """Why tokens of a model with such MoE blocks cannot drop experts; None if they can."""
    found = list(blocks)
    if all(block.top_k < 2 for block in found):
        return "each token uses one expert in this model: there is none to drop"
    if any(block.weighs_input for block in found):
        return (
            "routing weights multiply the input of an expert in this model: growing those of the "
            "other experts would not make up for a dropped one"
        )
    return None


def why_not_ranked_by_attention(blocks: Iterable[MoeBlock]) -> str | None:
    """Why tokens in front of such MoE blocks have no importance by attention; None if they do."""
    silent = [str(block.layer) for block in blocks if not block.attends]
    if not silent:
        return None
    layers = f"layer {silent[0]} has" if len(silent) == 1 else f"layers {', '.join(silent)} have"
    return (
        f"{layers} no softmax attention, run by SDPA, that could tell how important tokens are: "
        "give 'metric: variance' or 'none'"
    )


def router_weight(router: nn.Module) -> str:
    """Name, within a router module, of its (experts, hidden) weight."""
    named = router.named_parameters()
    return next(name for name, p in named if name.endswith("weight") and p.ndim == 2)


def _decoder_layers(model: nn.Module, model_type: str) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: the list of modules that holds most experts."""
    candidates = [
        (sum(is_experts(m) for m in module.modules()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    count, name, layers = max(candidates, key=lambda c: c[0], default=(0, "", None))
    if layers is None or not count:
        raise InputError(
            f"{model_type} has no mixture-of-experts layer that mcsharp_sdk knows: "
            "there is nothing to allocate bits to"
        )
    return name, layers


def _kept(path: str, table: Mapping[str, str]) -> list[str]:
    """The entries of a table of what stays as it is that a module's path ends with."""
    return [end for end in table if f".{path}".endswith(f".{end}")]


def stays_as_it_is(experts: str) -> bool:
    """Whether the experts module at a path is never compressed, as said in ``KEPT_EXPERTS``."""
    return bool(_kept(experts, KEPT_EXPERTS))


def _kept_experts(layers: nn.ModuleList) -> tuple[str, ...]:
    paths = [name for name, module in layers.named_modules() if is_experts(module)]
    found = dict.fromkeys(end for path in paths for end in _kept(path, KEPT_EXPERTS))
    return tuple(KEPT_EXPERTS[end] for end in found)


def _kept_linears(layers: nn.ModuleList) -> tuple[str, ...]:
    paths = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    return tuple(dict.fromkeys(end for path in paths for end in _kept(path, KEPT_LINEARS)))


def _moe_block(index: int, layer: nn.Module, config: Any, *, attends: bool) -> MoeBlock | None:
    found = [
        (name, module)
        for name, module in layer.named_modules()
        if is_experts(module) and not stays_as_it_is(name)
    ]
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
    count, top_k = int(experts.num_experts), _top_k(block, router, config)
    if not 1 <= top_k <= count:
        raise InputError(
            f"decoder layer {index}: a token cannot use {top_k} of {count} experts; see "
            f"{_top_k_setting(config)} in config.json"
        )
    return MoeBlock(
        layer=index,
        experts=path,
        router=f"{parent}.{router}" if parent else router,
        num_experts=count,
        top_k=top_k,
        weighs_input=getattr(experts, "weighs_input", False),
        attends=attends,
    )


def _has_sdpa(decoder: nn.Module) -> bool:
    """Whether transformers runs the decoder's attention by SDPA."""
    return bool(getattr(decoder, "_supports_sdpa", False))


def _attends(layer: nn.Module) -> bool:
    """Whether a decoder layer has softmax attention: linear attention has no ``is_causal``."""
    return any(hasattr(m, "layer_idx") and hasattr(m, "is_causal") for m in layer.modules())


def _top_k(block: nn.Module, router: str, config: Any) -> int:
    """Experts that a token uses: as the modules say, since it may differ from layer to layer."""
    places = [(getattr(block, router), "top_k"), (block, "top_k")]
    places += [(config.get_text_config(), name) for name in TOP_K_SETTINGS]
    for owner, name in places:
        value = getattr(owner, name, None)
        if isinstance(value, int):
            return value
    raise InputError(
        f"config.json of {config.model_type} does not say how many experts a token uses; "
        f"looked for {', '.join(TOP_K_SETTINGS)}"
    )


def _top_k_setting(config: Any) -> str:
    """What a config calls the number of experts that a token uses."""
    text = config.get_text_config()
    return next((name for name in TOP_K_SETTINGS if hasattr(text, name)), TOP_K_SETTINGS[0])


def _other_linears(layer: nn.Module) -> tuple[str, ...]:
    experts = [name for name, module in layer.named_modules() if is_experts(module)]
    return tuple(
        name
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
        and not _kept(name, KEPT_LINEARS)
        and not STEERING_LINEARS.intersection(name.split("."))
        and not any(name.startswith(f"{path}.") for path in experts)
    )
