"""What a model folder holds, without loading a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mcsharp_sdk.arguments import given_path
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.cost import ModelCost, cost_facts, model_cost
from mcsharp_sdk.evaluation.stored import read_config_json, read_layout
from mcsharp_sdk.folders import check_model_folder
from mcsharp_sdk.models.architecture import empty_model
from mcsharp_sdk.models.routing import RouterSettings, router_settings
from mcsharp_sdk.models.source import read_config
from mcsharp_sdk.models.topology import Topology, read_topology
from mcsharp_sdk.runtime.pruning_layout import PruningLayout


@dataclass(frozen=True)
class Inspection:
    """Architecture, cost and bit widths of a model folder.

    Attributes
    ----------
    model : the folder.
    model_type : family, as in config.json.
    layers : number of decoder layers.
    experts_per_layer : decoder layer -> routed experts, for the layers that have any.
    experts_by_name : that is told by the names of stored tensors, since the architecture that
        config.json gives has no layer with experts that is known.
    top_k : experts per token; 0 without any.
    router : how experts are chosen, None where that is not known.
    unsupported : why mcsharp_sdk cannot compress this model, empty if it can.
    cost : bytes, parameters and bits.
    widths : decoder layer -> bits of each expert; None if not compressed.
    linear_widths : linear layer, relative to its decoder layer -> bits; None if not compressed.
    pruning : how it can prune experts at run time; None if it cannot.
    """

    model: str
    model_type: str
    layers: int
    experts_per_layer: dict[int, int]
    experts_by_name: bool
    top_k: int
    router: RouterSettings | None
    unsupported: str
    cost: ModelCost
    widths: Mapping[int, tuple[int, ...]] | None
    linear_widths: Mapping[str, int] | None
    pruning: PruningLayout | None

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; what ``mcsharp evaluate`` also tells has the same name there."""
        fields = {**vars(self), "router": self.router and asdict(self.router)}
        fields["pruning"] = self.pruning.to_dict() if self.pruning else None
        facts = {"supported": not self.unsupported, **cost_facts(fields.pop("cost"))}
        return {**fields, **facts}


def inspect(model: str | Path) -> Inspection:
    """Read what config and safetensors headers say of a model folder; no weight is loaded.

    Raises
    ------
    InputError
        If the folder is no model or is damaged. A sound model that cannot be compressed is no
        error: see ``Inspection.unsupported``.
    """
    directory = given_path(model, "model")
    check_model_folder(directory)
    config = read_config(directory)
    cost = model_cost(directory)
    layout = read_layout(read_config_json(directory), directory)
    topology, unsupported = _topology(config)
    router, router_fault = _router(config, topology) if topology else (None, "")
    stored = {layer: len(sizes) for layer, sizes in cost.expert_bytes.items()}
    return Inspection(
        model=str(directory),
        model_type=config.model_type,
        layers=topology.num_layers if topology else config.get_text_config().num_hidden_layers,
        experts_per_layer=topology.experts_per_layer() if topology else stored,
        experts_by_name=topology is None and bool(stored),
        top_k=cost.top_k,
        router=router,
        unsupported=unsupported or router_fault,
        cost=cost,
        widths=layout.experts if layout and layout.packs else None,
        linear_widths=layout.linears if layout and layout.packs else None,
        pruning=layout.pruning if layout else None,
    )


def _topology(config: Any) -> tuple[Topology | None, str]:
    """Where layers and experts are, or None and the reason why that is not known."""
    try:
        return read_topology(empty_model(config, torch.float32), config), ""
    except (InputError, ValueError) as error:
        return None, str(error)


def _router(config: Any, topology: Topology) -> tuple[RouterSettings | None, str]:
    """How the first MoE layer routes, or None and the reason why that is not known."""
    try:
        return router_settings(config, min(topology.moe)), ""
    except InputError as error:
        return None, str(error)
