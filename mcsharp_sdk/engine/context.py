"""What a stage or an exporter is given to work with: explicit, and gone with the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from mcsharp_sdk.artifact_file import Artifact
from mcsharp_sdk.artifacts import (
    CALIBRATED_ROUTERS,
    QUANTIZED_WEIGHTS,
    TOP_ANY_ROUTER,
    BitMap,
    TokenProtectionRule,
)
from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.engine.progress import ProgressBars
from mcsharp_sdk.engine.report import RunReport
from mcsharp_sdk.engine.run_directory import AnyArtifact, LayerStore, RunDirectory
from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.models.ranks import ALONE, Ranks
from mcsharp_sdk.models.routing import Router
from mcsharp_sdk.models.scratch import Scratch
from mcsharp_sdk.models.shards import TensorSlice
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import stream_layers
from mcsharp_sdk.models.streamed_layer import StreamedLayer
from mcsharp_sdk.models.topology import router_weight
from mcsharp_sdk.modifiers.layer_restoration import restore_packed, restore_whole
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
    spill : keep activations in files of the run directory.
    ranks : the processes of the run. Each streams some of the calibration sequences.
    """

    model: SourceModel
    recipe: Recipe
    calibration: CalibrationSet
    directory: RunDirectory
    progress: ProgressBars
    report: RunReport = field(default_factory=RunReport)
    spill: bool = False
    ranks: Ranks = ALONE

    @property
    def calibrated(self) -> bool:
        """Whether there is anything to measure with."""
        return bool(self.calibration.groups)

    def stream(
        self, description: str, *, quantised: bool = False, by_expert: bool = False
    ) -> Iterator[StreamedLayer]:
        """Decoder layers one at a time, loaded, with the activations that reach them.

        What the consumer changes in a layer's weights, the layers behind it see.

        Parameters
        ----------
        description : of the progress bar.
        quantised : with the weights that an earlier stage quantised them to, if there is one.
        by_expert : with routed experts on disk, to be read one by one through ``layer.experts``.
            Otherwise they are loaded with the layer.
        """
        layers = stream_layers(
            self.model,
            self.calibration,
            lambda r: self.track(r, description),
            by_expert=by_expert,
            scratch=self.scratch(),
            ranks=self.ranks,
        )
        for layer in layers:
            if quantised and by_expert:
                self.restore_streamed(layer)
            elif quantised:
                self.restore_quantised(layer.source, layer.index)
            yield layer

    def scratch(self) -> Scratch:
        """Where activations are kept: in memory, or in the run directory."""
        return Scratch(self.directory.path if self.spill else None, self.model.device)

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
            restore_whole(source, layer, self.quantised_tensors(layer), layout)

    def restore_streamed(self, layer: StreamedLayer) -> None:
        """As ``restore_quantised``, with routed experts to be read through ``layer.experts``."""
        layout = self.quantised_layout()
        if layout is not None:
            restore_packed(layer, self.quantised_tensors(layer.index), layout)

    def quantised_tensors(self, layer: int) -> dict[str, TensorSlice]:
        """What stages made of a decoder layer's weights, by full names; empty if nothing.

        Its packed weights, and its router where that was rounded or calibrated. Each tensor is read
        when it is asked for.
        """
        stored = self.layers(QUANTIZED_WEIGHTS)
        tensors = stored.slices(layer) if stored.has(layer) else {}
        calibrated = self.layers(CALIBRATED_ROUTERS)
        if calibrated.is_complete() and calibrated.has(layer):
            tensors |= calibrated.slices(layer)
        return tensors

    def routers(self) -> Iterator[Router]:
        """The routers of all MoE layers as the stages left them, one at a time."""
        for router in self.model.routers():
            block = self.model.topology.moe[router.layer]
            module = self.model.layer(router.layer).get_submodule(block.router)
            path = f"{self.model.layer_path(router.layer)}.{block.router}"
            name = f"{path}.{router_weight(module)}"
            kept = self.quantised_tensors(router.layer)
            yield replace(router, weight=kept[name].read()) if name in kept else router

    def track(self, items: Iterable[Item], description: str) -> Iterator[Item]:
        """Iterate with a progress bar."""
        return self.progress.track(items, description)

    def read(self, kind: type[AnyArtifact]) -> AnyArtifact:
        """The artifact of a kind that an earlier stage wrote."""
        return self.directory.read(kind)

    def write(self, artifact: Artifact) -> None:
        """Keep an artifact for the stages behind.

        Raises
        ------
        RunError
            If it is a bit map that does not fit the model.
        """
        if isinstance(artifact, BitMap):
            try:
                artifact.for_model(self.model.topology.experts_per_layer())
            except InputError as error:
                raise RunError(f"the bit map that a stage made {error}") from error
        self.directory.write(artifact)

    def layers(self, name: str) -> LayerStore:
        """The store of artifact ``name``, written layer by layer."""
        return self.directory.layers(name)
