"""RouterCalibration: let the routers of a quantised model decide as those of the original do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from mcsharp_sdk.artifacts import (
    CALIBRATED_ROUTERS,
    QUANTIZED_WEIGHTS,
    TOP_ANY_ROUTER,
    TokenProtectionRule,
)
from mcsharp_sdk.errors import Problem
from mcsharp_sdk.modifiers.base import Modifier

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.models.router_settings import RouterSettings


class RouterCalibration(Modifier):
    """Fit each router of the quantised model to the choices of the original.

    A layer at a time: the original router's probabilities on what the original layers give are the
    target, what the quantised layers give is the input, and the layers behind get what comes out
    with the fitted router. The idea is from EAC-MoE (arXiv 2508.01625); the loss, the ridge and the
    tokens that are held out are ours. A router whose fit is no better on these stays as it is.
    """

    type: Literal["RouterCalibration"] = "RouterCalibration"
    tokens: Annotated[
        int, Field(ge=64, description="Fit on at most this many calibration tokens.")
    ] = 16384
    ridge: Annotated[
        float,
        Field(gt=0, description="Price of changing a router's weight, see docs/quantisation.md."),
    ] = 0.001
    steps: Annotated[int, Field(ge=1, description="Most steps of the fit of a router.")] = 60

    reads: ClassVar[tuple[str, ...]] = (QUANTIZED_WEIGHTS,)
    writes: ClassVar[str] = CALIBRATED_ROUTERS
    uses_calibration: ClassVar[bool] = True
    reads_routing: ClassVar[bool] = True

    def why_not_shared(self) -> str | None:
        return "routers are fitted by one process, on tokens of all sequences: start one process"

    def check_earlier(self, stages: Sequence[Modifier]) -> list[Problem]:
        """Whether no stage has measured with the routers as they were."""
        return [
            Problem(
                "",
                f"{stage.type} would drop experts by what it measured with the routers as they "
                f"were: put RouterCalibration in front of {stage.type}",
            )
            for stage in stages
            if stage.writes in (TokenProtectionRule.NAME, TOP_ANY_ROUTER)
        ]

    def check_routers(self, routers: Mapping[int, RouterSettings]) -> list[Problem]:
        """Whether probabilities over experts say how these routers choose."""
        mixing = [s.model_type for s in routers.values() if s.sparse_mixing is not None]
        if not mixing:
            return []
        return [
            Problem(
                "",
                f"routers of {mixing[0]} cannot be calibrated: SparseMixer chooses experts one "
                "after the other, and not by probabilities over all of them; leave the stage out",
            )
        ]

    def run(self, context: RunContext) -> None:
        from mcsharp_sdk.modifiers.router_fitting import RouterFitting

        fitting = RouterFitting(self.tokens, self.ridge, self.steps)
        layers = context.layers(self.writes)
        for layer in context.stream("calibrating routers", by_expert=True):
            target = fitting.target_of(layer)
            context.restore_streamed(layer)
            if target is None:
                continue
            if layers.has(layer.index):
                fitting.put_back(layer, layers.tensors(layer.index))
            else:
                tensors, notes = fitting.fit(layer, target)
                layers.write(layer.index, tensors, notes)
        layers.write_summary({"layers": list(context.model.topology.moe)})
        self._report(context, {i: layers.notes(i) for i in context.model.topology.moe})

    def _report(self, context: RunContext, notes: Mapping[int, Mapping[str, Any]]) -> None:
        kept = [str(layer) for layer, note in notes.items() if not note["changed"]]
        if kept:
            context.report.warn(
                "fitting did not bring these layers' routers closer to the original's choices on "
                f"tokens held out, so they stay as they are: {', '.join(kept)}"
            )
        means = {
            name: sum(note[name] for note in notes.values()) / len(notes)
            for name in ("divergence_before", "divergence_after", "same_before", "same_after")
        }
        context.report.stages[self.type] = {
            **means,
            "layers": {str(layer): dict(note) for layer, note in notes.items()},
        }
