"""Thresholds of TokenProtection for one MoE layer, and what pruning with them costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mcsharp_sdk.artifacts import LayerProtection
from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.routed_inputs import RoutedInputs
from mcsharp_sdk.models.streamed_layer import StreamedLayer
from mcsharp_sdk.modifiers.expert_outputs import change_of_output, squared_norms_behind
from mcsharp_sdk.pruning.importance import (
    ATTENTION,
    least_important,
    most_important,
    token_importance,
)
from mcsharp_sdk.pruning.rule import renormalise, slot_thresholds, weight_rule
from mcsharp_sdk.runtime.pruning_layout import RulePruning
from mcsharp_sdk.runtime.received_attention import (
    AttentionTap,
    TokenBatch,
    attach_tap,
    use_received_attention,
)


@dataclass(frozen=True)
class ProtectionMeasurement:
    """How thresholds are found and judged.

    Attributes
    ----------
    rule : metric and shares; its thresholds are not looked at.
    threshold : of all layers and ranks, or None to measure them.
    quantile : of the ratio to the largest weight that a measured threshold is.
    """

    rule: RulePruning
    threshold: float | None
    quantile: float

    @torch.no_grad()
    def of_layer(self, layer: StreamedLayer) -> LayerProtection:
        """Measure a loaded MoE layer; its ``expert_outputs`` are known then."""
        runs, received = self._run(layer)
        weights = runs.routed.top_k_weights
        top_k = weights.shape[1]
        thresholds = (
            slot_thresholds(runs.routed.ranks.gather(weights), self.quantile)
            if self.threshold is None
            else [self.threshold] * (top_k - 1)
        )
        kept = self._kept(layer, runs.routed, received, thresholds)
        pruned = weights * kept if self.rule.drops_tokens else renormalise(weights, kept)
        ranks = runs.routed.ranks
        change = ranks.total(change_of_output(runs.weights, runs.routed, pruned, runs.scratch))
        norms = squared_norms_behind(layer, layer.known_outputs)
        behind = ranks.total(float(norms.double().sum()))
        slots = ranks.total(kept.numel())
        return LayerProtection(
            layer=layer.index,
            thresholds=tuple([0.0] * (top_k - 1) if self.rule.drops_tokens else thresholds),
            cost=(change / behind) ** 0.5 if behind else 0.0,
            keep_ratio=ranks.total(float(kept.double().sum())) / slots,
        )

    def _run(self, layer: StreamedLayer) -> tuple[ExpertRuns, list[Tensor] | None]:
        """The layer's experts, run; and per batch the attention that tokens received, [B, L]."""
        attention: list[Tensor] | None = None
        if self.rule.importance == ATTENTION:
            with receiving(layer) as received:
                runs = ExpertRuns.of_layer(layer)
            attention = received
        else:
            runs = ExpertRuns.of_layer(layer)
        runs.run(runs.experts)
        layer.expert_outputs = runs.finish()
        return runs, attention

    def _kept(
        self,
        layer: StreamedLayer,
        routed: RoutedInputs,
        received: list[Tensor] | None,
        thresholds: Sequence[float],
    ) -> Tensor:
        """bool (T, k): slots that the rule keeps."""
        weights = routed.top_k_weights
        dropping = self.rule.drops_tokens
        kept = weight_rule(weights, [0.0] * len(thresholds) if dropping else thresholds)
        if self.rule.importance is None:
            return kept
        _check_whole_sequences(layer, routed)
        chosen = []
        for batch, hidden in enumerate(routed.hidden.split(routed.batch_tokens)):
            hidden = hidden.view_as(layer.inputs.hidden[batch])
            valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            attention = None if received is None else received[batch]
            importance = token_importance(self.rule.importance, hidden, attention, valid)
            choose = least_important if dropping else most_important
            share = self.rule.drop_ratio if dropping else self.rule.protect_ratio
            chosen.append(choose(importance, valid, share).view(-1, 1))
        return kept & ~torch.cat(chosen) if dropping else kept | torch.cat(chosen)


def _check_whole_sequences(layer: StreamedLayer, routed: RoutedInputs) -> None:
    """Refuse sequences of which other tokens than text do not reach the routed experts."""
    for count, hidden in zip(routed.batch_tokens, layer.inputs.hidden, strict=True):
        if count != hidden.shape[:2].numel():
            raise InputError(
                f"TokenProtection: decoder layer {layer.index} routes tokens of images elsewhere, "
                "so importance within a sequence is not known: calibrate on text, or give "
                "'metric: none'"
            )


@contextmanager
def receiving(layer: StreamedLayer) -> Iterator[list[Tensor]]:
    """Collect, while batches run up to the experts, what attention each token receives, [B, L].

    Raises
    ------
    RunError
        If the layer has no softmax attention.
    """
    tap = AttentionTap(TokenBatch())
    received: list[Tensor] = []
    decoder = layer.source.model.get_submodule(layer.source.topology.decoder_path)

    def collect(*_: Any) -> None:
        found = tap.take()
        if found is None:
            raise RunError(
                f"TokenProtection: decoder layer {layer.index} has no softmax attention that could "
                "tell how important its tokens are: give another metric, such as 'metric: variance'"
            )
        received.append(found)

    attach_tap(layer.module, tap)
    handle = layer.experts_module.register_forward_pre_hook(collect)
    use_received_attention(decoder, True)
    tap.wanted = True
    try:
        yield received
    finally:
        tap.wanted = False
        use_received_attention(decoder, False)
        handle.remove()
