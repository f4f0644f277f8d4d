"""TopAnyRouter: small networks that say how many of its experts each token needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mcsharp_sdk.artifacts import (
    CALIBRATED_ROUTERS,
    QUANTIZED_WEIGHTS,
    TOP_ANY_ROUTER,
    WHOLE_MODEL,
    TopAnyTraining,
    TrainingCurve,
)
from mcsharp_sdk.errors import Problem
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.runtime.pruning_layout import MOST_UNITS

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.engine.run_directory import LayerStore
    from mcsharp_sdk.models.topology import MoeBlock

TRAINING_FILE = "training.safetensors"
"""State of a training that is under way, in the folder of the finished networks."""


class TopAnyRouter(Modifier):
    """Train a small network per layer that says how many experts each token keeps (OTP, MC#).

    Two linear layers on the token's hidden state and its routing weights, trained with
    Gumbel-Softmax while everything else is frozen (arXiv 2510.10962). The paper's text gives the
    idea; sizes, rates, temperatures, the choice of a count instead of a mask per expert, the loss
    relative to the hidden state, and the search for ``target_activation`` are ours.
    """

    type: Literal["TopAnyRouter"] = "TopAnyRouter"
    scope: Annotated[
        Literal["block", "model"],
        Field(
            description="What pruning should not change: each block's output, layer by layer; or "
            "the model's predictions, with the whole model in memory (small models)."
        ),
    ] = "block"
    target_activation: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="Share of the chosen experts that are kept on the calibration tokens: in "
            "each layer with scope block, over all layers with scope model.",
        ),
    ] = 0.8
    activation_penalty: Annotated[
        float | None,
        Field(
            ge=0,
            description="Price of the kept share in the loss (λ), in place of target_activation.",
        ),
    ] = None
    units: Annotated[int, Field(ge=1, le=MOST_UNITS, description="Width of the networks.")] = 32
    steps: Annotated[int, Field(ge=1, description="Most steps of a training.")] = 400
    batch_tokens: Annotated[
        int,
        Field(ge=1, description="Tokens per step; whole sequences with scope model, at least one."),
    ] = 1024
    learning_rate: Annotated[float, Field(gt=0, le=1, description="Of the Adam optimiser.")] = 0.005
    temperature_schedule: Annotated[
        Literal["constant", "linear", "exponential"],
        Field(description="How the Gumbel-Softmax's temperature goes from its first to its last."),
    ] = "exponential"
    temperature: Annotated[float, Field(gt=0, description="Temperature of the first step.")] = 2.0
    final_temperature: Annotated[
        float, Field(gt=0, description="Temperature of the last step, unless it is constant.")
    ] = 0.3
    patience: Annotated[
        int | None,
        Field(
            ge=1,
            description="Stop when so many steps were no better than as many before; null never.",
        ),
    ] = 100
    checkpoint_steps: Annotated[
        int, Field(ge=1, description="Steps after which the state is kept, to continue from.")
    ] = 100
    seed: Annotated[int, Field(ge=0, description="Seed of all that is random.")] = 0

    uses: ClassVar[tuple[str, ...]] = (QUANTIZED_WEIGHTS, CALIBRATED_ROUTERS)
    writes: ClassVar[str] = TOP_ANY_ROUTER
    uses_calibration: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _penalty_replaces_target(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and settings.get("activation_penalty") is not None:
            return {"target_activation": None, **settings}
        return settings

    @model_validator(mode="after")
    def _one_aim(self) -> Self:
        if (self.target_activation is None) == (self.activation_penalty is None):
            raise ValueError("give either target_activation or activation_penalty, and not both")
        return self

    def check_blocks(self, blocks: Mapping[int, MoeBlock]) -> list[Problem]:
        """Whether there are experts to drop, and the target leaves each token one."""
        from mcsharp_sdk.models.topology import why_not_prunable

        if (obstacle := why_not_prunable(blocks.values())) is not None:
            return [Problem("", obstacle)]
        most = max(block.top_k for block in blocks.values())
        if self.target_activation is not None and self.target_activation < 1 / most:
            return [
                Problem(
                    "target_activation",
                    f"{self.target_activation:g} of {most} experts is less than one, which every "
                    f"token keeps; the least is {1 / most:g}",
                )
            ]
        return []

    def run(self, context: RunContext) -> None:
        layers = context.layers(self.writes)
        state = layers.folder / TRAINING_FILE
        train = self._train_blocks if self.scope == "block" else self._train_model
        training = train(context, layers, state)
        context.write(training)
        summary = {"units": self.units, "layers": list(context.model.topology.moe)}
        layers.write_summary(summary)
        self._report(context, training)
        if context.ranks.first:
            state.unlink(missing_ok=True)

    def _train_blocks(self, context: RunContext, layers: LayerStore, state: Path) -> TopAnyTraining:
        from mcsharp_sdk.modifiers.top_any_block import BlockTask, train_block

        streamed = context.stream("training top-any networks", quantised=True, by_expert=True)
        for layer in streamed:
            if layer.moe is None:
                continue
            task = BlockTask.of_layer(layer)
            if not layers.has(layer.index):
                network, notes = train_block(task, layer.index, self, state)
                layers.write(layer.index, dict(network.state_dict()), notes)
        kept = {layer: layers.notes(layer) for layer in context.model.topology.moe}
        return TopAnyTraining(
            self.scope,
            {str(layer): TrainingCurve(**note["curve"]) for layer, note in kept.items()},
            {layer: note["keep_ratio"] for layer, note in kept.items()},
        )

    def _train_model(self, context: RunContext, layers: LayerStore, state: Path) -> TopAnyTraining:
        from mcsharp_sdk.modifiers.top_any_distillation import train_on_model

        networks, kept, curve = train_on_model(context, self, state)
        for layer, network in networks.items():
            layers.write(layer, dict(network.state_dict()), {"keep_ratio": kept[layer]})
        return TopAnyTraining(self.scope, {WHOLE_MODEL: curve}, kept)

    def _report(self, context: RunContext, training: TopAnyTraining) -> None:
        from mcsharp_sdk.modifiers.top_any_warnings import training_warnings

        top_k = {layer: block.top_k for layer, block in context.model.topology.moe.items()}
        for message in training_warnings(training, top_k, self.target_activation):
            context.report.warn(message)
        context.report.stages[self.type] = {
            "keep_ratio": sum(training.keep_ratio.values()) / len(training.keep_ratio),
            "layers": {str(layer): kept for layer, kept in training.keep_ratio.items()},
            "steps": {name: curve.steps for name, curve in training.curves.items()},
        }
