"""What a model or a run has to prune experts with, as routers need it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mcsharp_exporters.graph_names import PruningChoice
from mcsharp_exporters.pruning_graph import LayerPruning
from mcsharp_sdk.artifacts import TOP_ANY_ROUTER, TokenProtectionRule
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.directory import CompressedFolder
from mcsharp_sdk.runtime.layout import PackedLayout
from mcsharp_sdk.runtime.pruning_layout import (
    DROP_INSIGNIFICANT,
    PRUNER,
    PruningLayout,
    PruningMode,
)

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext

NEEDED_ARTIFACTS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "off": (),
    "weights": (TokenProtectionRule.NAME,),
    "rule": (TokenProtectionRule.NAME,),
    "learned": (TOP_ANY_ROUTER,),
    "both": (TokenProtectionRule.NAME, TOP_ANY_ROUTER),
}
"""How exported routers or models drop experts -> artifacts that it takes."""

NOT_IN_A_ROUTER = (
    f"the rule {DROP_INSIGNIFICANT!r} drops all experts of whole tokens by the attention that they "
    "receive, which no router knows: leave those tokens out before the routers run, and export "
    "with pruning: off, or learned if the model has networks"
)


@dataclass(frozen=True)
class ModelPruning:
    """How a model can prune.

    Attributes
    ----------
    layout : as its config says.
    network : gives the parameters of a decoder layer's network, by name within the network.
    """

    layout: PruningLayout
    network: Callable[[int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class RouterPruning:
    """How all routers of a model prune in one mode.

    Attributes
    ----------
    mode : of all layers.
    model : where thresholds and networks are; None only with mode ``off``.
    protects : graphs are told which tokens are protected; otherwise none is.
    """

    mode: PruningMode = "off"
    model: ModelPruning | None = None
    protects: bool = True

    @classmethod
    def choose(cls, choice: PruningChoice, model: ModelPruning | None) -> RouterPruning:
        """The mode that was asked for; ``default`` is that in which the model is loaded.

        Raises
        ------
        InputError
            If the model lacks what the mode needs, or a router alone cannot do it.
        """
        if choice == "off" or (choice == "default" and model is None):
            return cls()
        if model is None:
            raise InputError(
                f"pruning '{choice}' is not possible: the model has neither a pruning rule (stage "
                "TokenProtection) nor learned pruning (stage TopAnyRouter)"
            )
        mode = model.layout.mode if choice == "default" else choice
        model.layout.check_mode(mode)
        if mode == "rule" and model.layout.rule and model.layout.rule.metric == DROP_INSIGNIFICANT:
            raise InputError(NOT_IN_A_ROUTER)
        return cls(mode, model)

    def of_layer(self, layer: int) -> LayerPruning:
        """What one layer prunes; nothing where the model prunes only others."""
        if self.model is None or self.mode == "off":
            return LayerPruning()
        rule, learned = self.model.layout.rule, self.model.layout.learned
        if self.mode == "rule" and rule is not None:
            thresholds = rule.thresholds.get(layer)
            return LayerPruning(self.mode, thresholds=thresholds, protects=self.protects)
        has_network = learned is not None and layer in learned.layers
        network = self.model.network(layer) if has_network else None
        return LayerPruning(self.mode, network=network, protects=self.protects)


def pruning_of_directory(path: Path) -> ModelPruning | None:
    """What a model folder has to prune with; None if it has nothing."""
    folder = CompressedFolder.open(path)
    return None if folder is None else pruning_of_folder(folder)


def pruning_of_folder(folder: CompressedFolder) -> ModelPruning | None:
    """The same of a folder that is open."""
    layout = PackedLayout.from_dict(folder.config.quantization_config).pruning

    def network(layer: int) -> Mapping[str, Tensor]:
        return folder.module_tensors(layer, f"{folder.topology.moe[layer].experts}.{PRUNER}")

    return None if layout is None else ModelPruning(layout, network)


def pruning_of_run(context: RunContext) -> ModelPruning | None:
    """What the stages of a run made to prune with; None if they made nothing."""
    layout = context.pruning_layout()
    return None if layout is None else ModelPruning(layout, context.layers(TOP_ANY_ROUTER).tensors)
