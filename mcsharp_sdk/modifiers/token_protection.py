"""TokenProtection: drop experts of little weight, except for tokens that matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from mcsharp_sdk.artifacts import (
    CALIBRATED_ROUTERS,
    QUANTIZED_WEIGHTS,
    LayerProtection,
    TokenProtectionRule,
)
from mcsharp_sdk.errors import Problem
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.settings import Settings

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.models.topology import MoeBlock
    from mcsharp_sdk.runtime.pruning_layout import RulePruning

Metric = Literal["attention", "kurtosis", "variance", "mean", "none", "drop_insignificant"]


class CheapestLayers(Settings):
    """Only some layers prune."""

    cheapest: Annotated[int, Field(ge=1, description="How many layers prune.")]


class TokenProtection(Modifier):
    """Find the rule by which each token drops experts when the model runs (ODP, MC Sec. 3.3).

    A token drops the expert of rank i ≥ 1 if its routing weight is below a threshold times the
    token's largest, except for tokens that attention makes important (arXiv 2410.06270, Eq. 6).
    Thresholds are quantiles of that ratio over calibration tokens. For two experts per token and
    quantile 0.5 that is the paper's; a threshold per rank for more experts is ours.
    """

    type: Literal["TokenProtection"] = "TokenProtection"
    metric: Annotated[
        Metric,
        Field(
            description="What makes a token important: attention received times magnitude; "
            "kurtosis, variance or mean magnitude of its hidden state; none protects no token; "
            "drop_insignificant drops all experts of the least important tokens instead."
        ),
    ] = "attention"
    protect_ratio: Annotated[
        float,
        Field(ge=0, le=1, description="Share of a sequence's tokens that keep all experts."),
    ] = 0.02
    drop_ratio: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Share of a sequence's tokens that lose all experts, with metric "
            "drop_insignificant.",
        ),
    ] = 0.02
    threshold: Annotated[
        float | None,
        Field(ge=0, le=1, description="Threshold of all layers and ranks; null measures them."),
    ] = None
    quantile: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Thresholds are this quantile of the ratio to the largest weight.",
        ),
    ] = 0.5
    layers: Annotated[
        Literal["all"] | CheapestLayers,
        Field(description="Layers that prune: all, or {cheapest: N}, those where it costs least."),
    ] = "all"

    uses: ClassVar[tuple[str, ...]] = (QUANTIZED_WEIGHTS, CALIBRATED_ROUTERS)
    writes: ClassVar[str] = TokenProtectionRule.NAME
    uses_calibration: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True

    @property
    def rule(self) -> RulePruning:
        """What is known of the rule before thresholds are measured."""
        from mcsharp_sdk.runtime.pruning_layout import RulePruning

        return RulePruning(self.metric, self.protect_ratio, self.drop_ratio, {})

    def check_blocks(self, blocks: Mapping[int, MoeBlock]) -> list[Problem]:
        """Whether there are experts to drop, a metric's attention, and as many layers to prune."""
        from mcsharp_sdk.models.topology import why_not_prunable, why_not_ranked_by_attention
        from mcsharp_sdk.pruning.importance import ATTENTION

        problems = []
        if (obstacle := why_not_prunable(blocks.values())) is not None:
            problems.append(Problem("", obstacle))
        elif self.rule.importance == ATTENTION:
            obstacle = why_not_ranked_by_attention(blocks.values())
            problems += [] if obstacle is None else [Problem("metric", obstacle)]
        if isinstance(self.layers, CheapestLayers) and self.layers.cheapest > len(blocks):
            problems.append(
                Problem(
                    "layers.cheapest",
                    f"{self.layers.cheapest} layers are more than the model's {len(blocks)} "
                    "mixture-of-experts layers",
                )
            )
        return problems

    def run(self, context: RunContext) -> None:
        from mcsharp_sdk.models.expert_runs import run_experts
        from mcsharp_sdk.modifiers.protection_measurement import ProtectionMeasurement

        measurement = ProtectionMeasurement(self.rule, self.threshold, self.quantile)
        layers = context.layers(self.writes)
        for layer in context.stream("measuring thresholds", quantised=True, by_expert=True):
            if layer.moe is None:
                continue
            if layers.has(layer.index):
                layer.expert_outputs = run_experts(layer)
            else:
                layers.write(layer.index, {}, measurement.of_layer(layer).to_json())
        found = [LayerProtection.from_json(layers.notes(i)) for i in context.model.topology.moe]
        artifact = TokenProtectionRule(
            self.metric, self.protect_ratio, self.drop_ratio, self._chosen(found)
        )
        context.write(artifact)
        self._report(context, artifact)

    def _chosen(self, found: Sequence[LayerProtection]) -> tuple[LayerProtection, ...]:
        """The layers, with those that do not prune marked."""
        if not isinstance(self.layers, CheapestLayers):
            return tuple(found)
        ranked = sorted(found, key=lambda layer: (layer.cost, layer.layer))
        pruned = {layer.layer for layer in ranked[: self.layers.cheapest]}
        return tuple(replace(layer, pruned=layer.layer in pruned) for layer in found)

    def _report(self, context: RunContext, rule: TokenProtectionRule) -> None:
        top_k = {index: block.top_k for index, block in context.model.topology.moe.items()}
        for found in (found for found in rule.layers if found.pruned):
            if found.keep_ratio == 1.0:
                context.report.warn(
                    f"layer {found.layer}: TokenProtection drops no expert of any token"
                )
            elif found.keep_ratio <= 1.0 / top_k[found.layer]:
                context.report.warn(
                    f"layer {found.layer}: TokenProtection keeps no more than one of "
                    f"{top_k[found.layer]} experts of any token"
                )
        kept = [found.keep_ratio if found.pruned else 1.0 for found in rule.layers]
        context.report.stages[self.type] = {
            "keep_ratio": sum(kept) / len(kept),
            "layers": {str(found.layer): found.to_json() for found in rule.layers},
        }
