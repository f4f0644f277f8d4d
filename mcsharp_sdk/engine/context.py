"""What a stage or an exporter is given to work with: explicit, and gone with the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from mcsharp_sdk.artifact_file import Artifact
from mcsharp_sdk.artifacts import TokenProtectionRule
from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.engine.progress import ProgressBars
from mcsharp_sdk.engine.report import RunReport
from mcsharp_sdk.engine.run_directory import AnyArtifact, LayerStore, RunDirectory
from mcsharp_sdk.models.routing import Router
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import StreamedLayer, stream_layers
from mcsharp_sdk.models.topology import router_weight
from mcsharp_sdk.modifiers.gptq_quantize import QUANTIZED_WEIGHTS
from mcsharp_sdk.modifiers.layer_restoration import restore_packed
from mcsharp_sdk.modifiers.router_calibration import CALIBRATED_ROUTERS
from mcsharp_sdk.modifiers.top_any_router import TOP_ANY_ROUTER
from mcsharp_sdk.recipe.schema import Recipe
from mcsharp_sdk.runtime.layout import PackedLayout
from mcsharp_sdk.runtime.pruning_layout import (
    MODES,
    LearnedPruning,
    PruningLayout,
    PruningMode,
    RulePruning,
)

Item = TypeVar("Item")


@dataclass
class RunContext:
    """One run.

    Attributes
    ----------
    model : the model that is compressed.
    recipe : as validated.
    calibration : sequences to measure with; none if the recipe has no calibration.
    directory : the run directory, open.
    progress : bars for long loops.
    report : what the reader should be told.
    """

    model: SourceModel
    recipe: Recipe
    calibration: CalibrationSet
    directory: RunDirectory
    progress: ProgressBars
    report: RunReport = field(default_factory=RunReport)

    def stream(self, description: str, *, quantised: bool = False) -> Iterator[StreamedLayer]:
        """Decoder layers one at a time, loaded, with the activations that reach them.

        What the consumer changes in a layer's weights, the layers behind it see.

        Parameters
        ----------
        description : of the progress bar.
        quantised : with the weights that an earlier stage quantised them to, if there is one.
        """
        layers = stream_layers(self.model, self.calibration, lambda r: self.track(r, description))
        for layer in layers:
            if quantised:
                self.restore_quantised(layer.source, layer.index)
            yield layer

    def quantised_layout(self) -> PackedLayout | None:
        """How an earlier stage quantised the model; None if none did."""
        stored = self.layers(QUANTIZED_WEIGHTS)
        return PackedLayout.from_dict(stored.summary()) if stored.is_complete() else None

    def pruning_layout(self) -> PruningLayout | None:
        """How the finished stages prune the model; None if none does.

        The default mode is the one that uses most of what there is.
        """
        rule, learned = None, None
        if self.directory.has(TokenProtectionRule):
            found = self.read(TokenProtectionRule)
            thresholds = found.thresholds()
            rule = RulePruning(found.metric, found.protect_ratio, found.drop_ratio, thresholds)
        networks = self.layers(TOP_ANY_ROUTER)
        if networks.is_complete():
            learned = LearnedPruning.from_dict(networks.summary())
        if rule is None and learned is None:
            return None
        possible = PruningLayout("off", rule, learned).modes
        mode: PruningMode = next(m for m in reversed(MODES) if m in possible)
        return PruningLayout(mode, rule, learned)

    def restore_quantised(self, source: SourceModel, layer: int) -> None:
        """Give a loaded decoder layer the weights that an earlier stage quantised it to, if any."""
        layout = self.quantised_layout()
        if layout is not None:
            restore_packed(source, layer, self.quantised_tensors(layer), layout)

    def quantised_tensors(self, layer: int) -> dict[str, Tensor]:
        """What stages made of a decoder layer's weights, by full names; empty if nothing.

        Its packed weights, and its router where that was rounded or calibrated.
        """
        stored = self.layers(QUANTIZED_WEIGHTS)
        tensors = stored.tensors(layer) if stored.has(layer) else {}
        calibrated = self.layers(CALIBRATED_ROUTERS)
        if calibrated.is_complete() and calibrated.has(layer):
            tensors |= calibrated.tensors(layer)
        return tensors

    def routers(self) -> Iterator[Router]:
        """The routers of all MoE layers as the stages left them, one at a time."""
        for router in self.model.routers():
            block = self.model.topology.moe[router.layer]
            module = self.model.layer(router.layer).get_submodule(block.router)
            path = f"{self.model.layer_path(router.layer)}.{block.router}"
            name = f"{path}.{router_weight(module)}"
            weight = self.quantised_tensors(router.layer).get(name, router.weight)
            yield replace(router, weight=weight)

    def track(self, items: Iterable[Item], description: str) -> Iterator[Item]:
        """Iterate with a progress bar."""
        return self.progress.track(items, description)

    def read(self, kind: type[AnyArtifact]) -> AnyArtifact:
        """The artifact of a kind that an earlier stage wrote."""
        return self.directory.read(kind)

    def write(self, artifact: Artifact) -> None:
        """Keep an artifact for the stages behind."""
        self.directory.write(artifact)

    def layers(self, name: str) -> LayerStore:
        """The store of artifact ``name``, written layer by layer."""
        return self.directory.layers(name)
