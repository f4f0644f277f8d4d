"""ExpertStats: how often each expert is used, with what weight, and what quantising it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from mcsharp_sdk.artifacts import ExpertStatistics, LayerStatistics
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.quantization.grid import WIDTHS

if TYPE_CHECKING:
    from torch import Tensor

    from mcsharp_sdk.artifacts import DomainShift
    from mcsharp_sdk.engine.context import RunContext


UNLIKE = 0.5
"""Rank correlation below which two sources are said to use the experts differently."""


class ExpertStats(Modifier):
    """Measure the importance of each expert on calibration tokens (MC, arXiv 2410.06270, Sec. 3.2).

    ``mode: released`` measures errors as the released code does (round to nearest, output of the
    block); ``paper`` as Eq. 3 says (output of the model); ``best`` with the quantiser that will be
    used.
    """

    type: Literal["ExpertStats"] = "ExpertStats"
    mode: Annotated[
        Literal["best", "paper", "released"],
        Field(description="Whose choices the other settings default to."),
    ] = "best"
    bits: Annotated[
        tuple[int, ...],
        Field(min_length=1, description="Widths whose error is measured, of 1, 2, 3, 4 and 8."),
    ] = (1, 2, 3)
    quantizer: Annotated[
        Literal["gptq", "rtn", "hqq"], Field(description="Quantiser whose error is measured.")
    ] = "gptq"
    scope: Annotated[
        Literal["block", "model"],
        Field(description="Error at the output of the MoE block, or of the model (small models)."),
    ] = "block"
    group_size: Annotated[
        int, Field(ge=8, description="Columns that share a scale and a zero point.")
    ] = 128
    error_tokens: Annotated[
        int,
        Field(
            ge=1,
            description="Errors are measured on at most this many tokens of an expert; with scope "
            "model on the first sequences of so many tokens in all, whole ones and at least one.",
        ),
    ] = 512
    hessian: Annotated[
        Literal["input_gram", "loss"],
        Field(
            description="Whose curvature the allocator 'hessian' gets: that of each matrix's own "
            "output error, or of the loss (needs loss_tokens)."
        ),
    ] = "input_gram"
    loss_tokens: Annotated[
        int,
        Field(
            ge=0,
            description="Measure on so many tokens, whole sequences, how much the loss feels what "
            "changes at each block's output; 0 leaves it out.",
        ),
    ] = 0
    block_scores: Annotated[
        bool,
        Field(description="Measure what the block score allocators rank layers by."),
    ] = False
    coverage: Annotated[
        int, Field(ge=0, description="Experts that fewer tokens reach are named in the report.")
    ] = 128

    writes: ClassVar[str] = ExpertStatistics.NAME
    uses_calibration: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True
    reads_routing: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"quantizer": "rtn", "scope": "model"},
        "released": {"quantizer": "rtn", "scope": "block"},
    }

    @field_validator("bits")
    @classmethod
    def _widths(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        unknown = sorted(set(bits) - set(WIDTHS))
        if unknown:
            raise ValueError(f"{unknown} are no widths that can be stored; these are {WIDTHS}")
        return tuple(sorted(set(bits)))

    @model_validator(mode="after")
    def _gradients_where_needed(self) -> Self:
        if self.hessian == "loss" and not self.loss_tokens:
            raise ValueError("hessian: loss needs gradients of the loss: give 'loss_tokens: 2048'")
        return self

    def why_not_shared(self) -> str | None:
        if self.scope == "model":
            return "errors at the model's output are measured by one process: give 'scope: block'"
        if self.loss_tokens:
            return "gradients of the loss are measured by one process: give 'loss_tokens: 0'"
        if self.block_scores:
            return "block scores are fitted by one process: give 'block_scores: false'"
        return None

    def run(self, context: RunContext) -> None:
        from mcsharp_sdk.models.expert_runs import run_experts
        from mcsharp_sdk.modifiers.expert_measurement import ExpertMeasurement
        from mcsharp_sdk.modifiers.loss_gradients import measure_loss_gradients
        from mcsharp_sdk.modifiers.model_errors import measure_model_errors

        measurement = ExpertMeasurement(
            self.bits,
            self.quantizer,
            self.group_size,
            self.error_tokens,
            self.scope == "block",
            context.calibration.sources,
            self.hessian,
            self.block_scores,
        )
        if self.loss_tokens:
            measure_loss_gradients(context, self.loss_tokens)
        layers = context.layers(self.writes)
        for layer in context.stream("measuring experts", by_expert=True):
            if layer.moe is None:
                continue
            if layers.has(layer.index):
                layer.expert_outputs = run_experts(layer, last=True)
            else:
                found = measurement.of_layer(layer, self._gradients(context, layer.index))
                layers.write(layer.index, {}, found.to_json())
        measured = [
            LayerStatistics.from_json(layers.notes(index)) for index in context.model.topology.moe
        ]
        if self.scope == "model":
            measured = measure_model_errors(context, measurement, measured)
        self._name_starved(context, measured)
        statistics = self._statistics(context, measured)
        context.write(statistics)
        self._report_shift(context, statistics.domain_shift())

    def _gradients(self, context: RunContext, layer: int) -> Tensor | None:
        from mcsharp_sdk.modifiers.loss_gradients import GRADIENT, LOSS_GRADIENTS

        if not self.loss_tokens:
            return None
        return context.layers(LOSS_GRADIENTS).tensors(layer)[GRADIENT].to(context.model.device)

    def _statistics(self, context: RunContext, measured: list[LayerStatistics]) -> ExpertStatistics:
        blocks = list(context.model.topology.moe.values())
        counts = {block.num_experts for block in blocks}
        return ExpertStatistics(
            model=context.model.path.name,
            source=f"{context.calibration.describe()}, "
            f"error of {self.quantizer} at the {self.scope}'s output, group {self.group_size}",
            num_experts=counts.pop() if len(counts) == 1 else None,
            top_k=blocks[0].top_k,
            layers=tuple(measured),
        )

    def _report_shift(self, context: RunContext, shifts: Sequence[DomainShift]) -> None:
        """Tell how differently the sources use the experts, and warn where they do most."""
        if not shifts:
            return
        context.report.stages[self.type] = {"domain_shift": [s.to_json() for s in shifts]}
        pairs: dict[tuple[str, str], list[tuple[float, DomainShift]]] = {}
        for shift in shifts:
            if shift.rank_correlation is not None and shift.rank_correlation < UNLIKE:
                pair = pairs.setdefault((shift.first, shift.second), [])
                pair.append((shift.rank_correlation, shift))
        for (first, second), found in pairs.items():
            correlation, worst = min(found, key=lambda one: one[0])
            context.report.warn(
                f"{first} and {second} use the experts differently (rank correlation below "
                f"{UNLIKE} in {len(found)} layers; {correlation:.2f} in layer {worst.layer}, where "
                f"shares change most for {worst.describe()}): weigh the sources as the model is "
                "used"
            )

    def _name_starved(self, context: RunContext, measured: list[LayerStatistics]) -> None:
        starved = sum(int((layer.activation_count < self.coverage).sum()) for layer in measured)
        if starved:
            context.report.warn(
                f"fewer than {self.coverage} calibration tokens reached {starved} of "
                f"{sum(layer.num_experts for layer in measured)} experts, so their statistics are "
                "weak (the report names them): give more 'sequences', or text that is more like "
                "what the model is for"
            )
