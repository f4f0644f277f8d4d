"""Statistics of one MoE layer's experts, from the calibration tokens that reach them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mcsharp_sdk.artifacts import LayerStatistics, SourceStatistics
from mcsharp_sdk.models.bfloat16 import linear
from mcsharp_sdk.models.capture import RoutedInputs
from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.experts import (
    MATRICES,
    Matrix,
    activate,
    finish,
    fused_weight,
    tokens_of_expert,
    weigh,
)
from mcsharp_sdk.models.memory import release_free_memory
from mcsharp_sdk.models.routing import router_scores
from mcsharp_sdk.models.stream import StreamedLayer
from mcsharp_sdk.modifiers.block_scores import block_cosines
from mcsharp_sdk.modifiers.expert_curvature import HessianName, gram_curvature, loss_curvature
from mcsharp_sdk.modifiers.layer_quantisation import (
    LayerNotes,
    LayerQuantiser,
    QuantizerSettings,
    expert_chunks,
)
from mcsharp_sdk.quantization.gptq import quantise_gptq
from mcsharp_sdk.quantization.hessian import DAMPING, InverseFactor, factorise
from mcsharp_sdk.quantization.hqq import quantise_hqq
from mcsharp_sdk.quantization.round_to_nearest import quantise_rtn
from mcsharp_sdk.quantization.search import GridSettings

HESSIAN_TOKENS = 2048
"""Most tokens per expert that Hessians are summed over: errors are compared, not stored."""

QUICK_SEARCH: dict[str, Any] = {"clip_ratios": (1.0, 0.8, 0.65, 0.5, 0.38), "refinements": 1}
"""A coarser search for scales than weights that are kept get, for the same reason."""

ExpertWeights = dict[Matrix, Tensor]
"""Matrix -> [R, K], one expert's weights in the model's dtype."""


@dataclass(frozen=True)
class ExpertMeasurement:
    """What is measured, and how.

    Attributes
    ----------
    widths : candidate bit widths.
    quantizer : ``gptq``, ``rtn`` or ``hqq``.
    group_size : of the grid.
    error_tokens : most tokens per expert that errors are measured on.
    block_errors : whether to measure errors at the block's output at all.
    sources : names of the calibration's sources; of several, each is counted by itself too.
    hessian : of which Hessian the curvature is taken.
    block_scores : whether to measure how much each layer changes its input.
    """

    widths: Sequence[int]
    quantizer: Literal["gptq", "rtn", "hqq"]
    group_size: int
    error_tokens: int
    block_errors: bool
    sources: Sequence[str] = ()
    hessian: HessianName = "input_gram"
    block_scores: bool = False

    @torch.no_grad()
    def of_layer(self, layer: StreamedLayer, gradients: Tensor | None = None) -> LayerStatistics:
        """Statistics of a loaded MoE layer.

        Parameters
        ----------
        gradients : [T', hidden], of the loss by the block's output on the first T' tokens.

        ``quant_error[b][e]`` = ‖σ_e(t)·(F_e(x_t) − F_e^b(x_t))‖_F over the tokens t that select
        expert e: as only that expert changes, it is the change of the block's output. Where σ_e(t)
        weighs the expert's input, that stands inside.
        """
        runs = ExpertRuns.of_layer(layer)
        routed, experts = runs.routed, runs.experts
        release_free_memory()
        count = layer.moe.num_experts
        reached = routed.counts(count)
        errors = {width: np.zeros(count) for width in self.widths} if self.block_errors else {}
        hessian_errors = {width: np.zeros(count) for width in self.widths}
        dropped = np.zeros(count)
        for expert, variants in self.quantised_experts(runs):
            tokens, routing = weigh(experts, *routed.of_expert(expert, self.error_tokens))
            sampled = reached[expert] / max(1, tokens.shape[0])
            output = _run_expert(experts, expert, tokens)
            dropped[expert] = _norm(output, routing, sampled)
            curvature = self._curvature(runs, expert, gradients)
            for width, weights in variants:
                hessian_errors[width][expert] = _moved(experts, expert, weights, curvature)
                if self.block_errors:
                    change = output - _run_expert(experts, expert, tokens, weights)
                    errors[width][expert] = _norm(change, routing, sampled)
        layer.expert_outputs = runs.outputs
        cosines = block_cosines(layer, runs.outputs) if self.block_scores else (None, None)
        scores = _selected_scores(layer, routed)
        return LayerStatistics(
            layer=layer.index,
            activation_count=np.array(reached, dtype=np.float64),
            routing_weight_sum=_summed(routed.top_k_index, scores, count),
            quant_error=errors,
            tokens=routed.num_tokens,
            drop_error=dropped,
            sources=self._of_sources(layer, routed, scores),
            hessian_error=hessian_errors,
            block_cosine=cosines[0],
            predicted_block_cosine=cosines[1],
            loss_sensitivity=None
            if gradients is None
            else float(gradients.double().square().mean()),
        )

    def _curvature(
        self, runs: ExpertRuns, expert: int, gradients: Tensor | None
    ) -> dict[Matrix, float]:
        """Mean curvature of an expert's matrices, on as many of its tokens as errors are."""
        experts, routed = runs.experts, runs.routed
        if gradients is None or self.hessian == "input_gram":
            hidden, routing = routed.of_expert(expert, self.error_tokens)
            reached = int((routed.top_k_index == expert).sum())
            tokens, _ = weigh(experts, hidden, routing)
            return gram_curvature(experts, expert, tokens, reached / max(1, len(tokens)))
        known = routed.first(len(gradients))
        token, slot = tokens_of_expert(known.top_k_index, expert)
        tokens, routing = weigh(experts, known.hidden[token], known.top_k_weights[token, slot])
        of_output = gradients[token] * routing.unsqueeze(-1)
        share = routed.num_tokens / max(1, known.num_tokens)
        return loss_curvature(experts, expert, tokens, of_output, share)

    def _of_sources(
        self, layer: StreamedLayer, routed: RoutedInputs, scores: Tensor
    ) -> tuple[SourceStatistics, ...]:
        """Counts and sums of each source, if there are several."""
        if len(self.sources) < 2:
            return ()
        found = []
        owner = layer.inputs.token_sources(routed.batch_tokens).to(routed.top_k_index.device)
        for number, name in enumerate(self.sources):
            own = owner == number
            index, count = routed.top_k_index[own], layer.moe.num_experts
            counts = torch.bincount(index.reshape(-1), minlength=count).double().cpu().numpy()
            sums = _summed(index, scores[own], count)
            found.append(SourceStatistics(name, int(own.sum()), counts, sums))
        return tuple(found)

    def quantised_experts(
        self, runs: ExpertRuns
    ) -> Iterator[tuple[int, Iterator[tuple[int, ExpertWeights]]]]:
        """For each expert, its weights quantised to each candidate width.

        Hessians and their factors are computed once and serve all widths. Experts are run on all
        their tokens on the way, so that ``runs.outputs`` is complete behind the last one.
        """
        for chunk in expert_chunks(runs.experts):
            variants = self._chunk_variants(runs, chunk)
            for position, expert in enumerate(chunk):
                yield expert, _variants_of(variants, position)

    def _chunk_variants(self, runs: ExpertRuns, chunk: Sequence[int]) -> dict[int, ExpertWeights]:
        """Width -> matrix -> weights of the chunk's experts, [n, R, K] in the model's dtype."""
        variants: dict[int, ExpertWeights] = {width: {} for width in self.widths}
        for matrix in MATRICES:
            weights = fused_weight(runs.experts, matrix)[chunk]
            factor = self._factor(runs, matrix, chunk)
            release_free_memory()
            for width in self.widths:
                widths = [width] * len(chunk)
                batch = (
                    _UNCALIBRATED[self.quantizer](weights, widths, self._grid)
                    if factor is None
                    else quantise_gptq(weights, factor, widths, self._grid)
                )
                variants[width][matrix] = batch.dequantise(weights.dtype)
                del batch
                release_free_memory()
        for expert in chunk:
            runs.add_output(expert)
        return variants

    def _factor(
        self, runs: ExpertRuns, matrix: Matrix, chunk: Sequence[int]
    ) -> InverseFactor | None:
        if self.quantizer in _UNCALIBRATED:
            return None
        settings = QuantizerSettings("gptq", self._grid, DAMPING, False, True)
        quantiser = LayerQuantiser(settings, None, None)
        hessians = quantiser.expert_hessians(runs, matrix, chunk, LayerNotes(), HESSIAN_TOKENS)
        return factorise(hessians)

    @property
    def _grid(self) -> GridSettings:
        return GridSettings(group_size=self.group_size, **QUICK_SEARCH)


_UNCALIBRATED = {"rtn": quantise_rtn, "hqq": quantise_hqq}
"""Quantisers that take no Hessian."""


def _variants_of(
    variants: dict[int, ExpertWeights], position: int
) -> Iterator[tuple[int, ExpertWeights]]:
    for width, matrices in variants.items():
        yield width, {matrix: stacked[position] for matrix, stacked in matrices.items()}


def _run_expert(
    experts: Any, expert: int, tokens: Tensor, weights: ExpertWeights | None = None
) -> Tensor:
    """Output of an expert on tokens [n, hidden], with other weights than its own if given."""
    if weights is None:
        weights = {matrix: fused_weight(experts, matrix)[expert] for matrix in MATRICES}
    inner = activate(experts, linear(tokens, weights["gate_up"]), expert)
    return finish(experts, linear(inner, weights["down"]), expert)


def _moved(
    experts: Any, expert: int, weights: ExpertWeights, curvature: Mapping[Matrix, float]
) -> float:
    """Ω = Σ over matrices of curvature · ‖Q(W) − W‖² (HAWQ-V2)."""
    return math.fsum(
        curvature[matrix]
        * float((weights[matrix].float() - fused_weight(experts, matrix)[expert].float()).norm())
        ** 2
        for matrix in MATRICES
    )


def _norm(change: Tensor, routing: Tensor, sampled: float) -> float:
    """Frobenius norm of the routing-weighted change; ``sampled`` is tokens per measured token."""
    weighted = change.float() * routing.float().unsqueeze(-1)
    return float(weighted.norm()) * sampled**0.5


def _selected_scores(layer: StreamedLayer, routed: RoutedInputs) -> Tensor:
    """[T, k] router scores of the selected experts, before renormalisation."""
    router = layer.source.router(layer.moe)
    return router_scores(router, routed.router_hidden).gather(1, routed.top_k_index)


def _summed(index: Tensor, scores: Tensor, experts: int) -> Any:
    """(experts,) float64, scores [T, k] summed over the tokens that selected each expert."""
    sums = torch.zeros(experts, dtype=torch.float64, device=index.device)
    sums.index_add_(0, index.reshape(-1), scores.reshape(-1).double())
    return sums.cpu().numpy()
