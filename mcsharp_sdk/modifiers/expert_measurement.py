"""Statistics of one MoE layer's experts, from the calibration tokens that reach them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mcsharp_sdk.artifacts import LayerStatistics, SourceStatistics
from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.experts import Matrix, finish, weigh
from mcsharp_sdk.models.memory import release_free_memory
from mcsharp_sdk.models.routed_inputs import RoutedInputs
from mcsharp_sdk.models.routing import router_scores
from mcsharp_sdk.models.streamed_layer import StreamedLayer
from mcsharp_sdk.modifiers.block_scores import block_cosines
from mcsharp_sdk.modifiers.expert_chunks import expert_chunks
from mcsharp_sdk.modifiers.expert_curvature import HessianName, gram_curvature, loss_curvature
from mcsharp_sdk.modifiers.expert_hessians import expert_hessians
from mcsharp_sdk.modifiers.layer_notes import LayerNotes
from mcsharp_sdk.modifiers.matrix_quantisation import FITS
from mcsharp_sdk.quantization.gptq import quantise_gptq
from mcsharp_sdk.quantization.inverse_factor import InverseFactor, factorise
from mcsharp_sdk.quantization.round_to_nearest import quantise_rtn
from mcsharp_sdk.quantization.search import GridSettings

HESSIAN_TOKENS = 2048
"""Tokens per expert that suffice for Hessians of no more columns: errors are compared, not stored.
"""

QUICK_SEARCH: dict[str, Any] = {"clip_ratios": (1.0, 0.8, 0.65, 0.5, 0.38), "refinements": 1}
"""A coarser search for scales than weights that are kept get, for the same reason."""

QuantisedPair = dict[Matrix, Tensor]
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
        runs = ExpertRuns.of_layer(layer, last=not self.block_scores)
        routed = runs.routed
        release_free_memory()
        count = layer.moe.num_experts
        reached = routed.counts()
        ranks = routed.ranks
        errors = {width: np.zeros(count) for width in self.widths} if self.block_errors else {}
        hessian_errors = {width: np.zeros(count) for width in self.widths}
        dropped = np.zeros(count)
        for chunk in expert_chunks(runs):
            samples = {expert: self._sample(runs, expert, gradients) for expert in chunk}
            for expert, sample in samples.items():
                dropped[expert] = sample.norm_of(sample.output - _left(runs, expert, sample))
            for width, changes, moved in self._changes(runs, chunk, samples):
                hessian_errors[width][chunk] = moved
                if self.block_errors:
                    errors[width][chunk] = changes
            runs.run(chunk)
        layer.expert_outputs = runs.finish()
        cosines: tuple[float | None, float | None] = (None, None)
        if self.block_scores:
            cosines = block_cosines(layer, layer.expert_outputs)
        scores = _selected_scores(layer, routed)

        def summed(values: Any) -> Any:
            return ranks.sum_(torch.as_tensor(values, dtype=torch.float64)).numpy()

        return LayerStatistics(
            layer=layer.index,
            activation_count=summed(reached),
            routing_weight_sum=summed(_summed(routed.top_k_index, scores, count)),
            quant_error={width: summed(error) for width, error in errors.items()},
            tokens=int(ranks.total(routed.num_tokens)),
            drop_error=summed(dropped),
            sources=self._of_sources(layer, routed, scores),
            hessian_error={width: summed(error) for width, error in hessian_errors.items()},
            block_cosine=cosines[0],
            predicted_block_cosine=cosines[1],
            loss_sensitivity=None
            if gradients is None
            else float(gradients.double().square().mean()),
        )

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
            tokens = int(routed.ranks.total(float(own.sum())))
            both = routed.ranks.sum_(torch.stack([torch.as_tensor(counts), torch.as_tensor(sums)]))
            found.append(SourceStatistics(name, tokens, *both.numpy()))
        return tuple(found)

    def _sample(self, runs: ExpertRuns, expert: int, gradients: Tensor | None) -> _Sample:
        """Some of an expert's tokens with what it makes of them, and how curved its error is."""
        hidden, routing, of = runs.sample_of(expert, self.error_tokens)
        tokens, routing = weigh(runs.weights.module, hidden, routing)
        sampled = of / max(1, len(tokens))
        inner = runs.weights.activated(expert, tokens)
        output = runs.weights.finished(expert, inner)
        if gradients is None or self.hessian == "input_gram":
            curvature = gram_curvature(tokens, inner, sampled)
        else:
            curvature = _loss_curvature(runs, expert, gradients)
        return _Sample(tokens, routing, output, sampled, curvature)

    def _changes(
        self, runs: ExpertRuns, chunk: Sequence[int], samples: Mapping[int, _Sample]
    ) -> Iterator[tuple[int, list[float], Any]]:
        """For each width, what quantising does to each expert of a chunk.

        By how much it changes the output, if that is measured, and the Hessian error, (n,) float64.
        Of the quantised gate and up projections only what they make of the sampled tokens is held
        while the down projections are quantised.
        """
        inner: dict[int, list[Tensor]] = {}
        moved: dict[int, Any] = {}
        for width, weights in self._variants(runs, "gate_up", chunk):
            moved[width] = _moved(runs, "gate_up", chunk, weights, samples)
            if self.block_errors:
                inner[width] = [
                    runs.weights.activated(e, samples[e].tokens, w)
                    for e, w in zip(chunk, weights, strict=True)
                ]
        for width, weights in self._variants(runs, "down", chunk):
            changes = []
            if self.block_errors:
                changes = [
                    samples[e].norm_of(samples[e].output - runs.weights.finished(e, i, w))
                    for e, i, w in zip(chunk, inner.pop(width), weights, strict=True)
                ]
            yield width, changes, moved[width] + _moved(runs, "down", chunk, weights, samples)

    def quantised_experts(
        self, runs: ExpertRuns
    ) -> Iterator[tuple[int, Iterator[tuple[int, QuantisedPair]]]]:
        """For each expert, its weights quantised to each candidate width.

        Hessians and their factors are computed once and serve all widths. Experts are run on all
        their tokens on the way, so that ``runs.outputs`` is complete behind the last one.
        """
        for chunk in expert_chunks(runs):
            first = dict(self._variants(runs, "gate_up", chunk))
            second = dict(self._variants(runs, "down", chunk))
            runs.run(chunk)
            for position, expert in enumerate(chunk):
                yield (
                    expert,
                    (
                        (w, {"gate_up": first[w][position], "down": second[w][position]})
                        for w in self.widths
                    ),
                )

    def _variants(
        self, runs: ExpertRuns, matrix: Matrix, chunk: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Widths, each with the weights of the chunk's experts, [n, R, K] in the model's dtype."""
        factor = self._factor(runs, matrix, chunk)
        weights = torch.stack([runs.weights.read(matrix, expert) for expert in chunk])
        release_free_memory()
        for width in self.widths:
            widths = [width] * len(chunk)
            batch = (
                quantise_rtn(weights, widths, self._grid, fit=FITS[self.quantizer])
                if factor is None
                else quantise_gptq(weights, factor, widths, self._grid)
            )
            yield width, batch.dequantise(weights.dtype)

    def _factor(
        self, runs: ExpertRuns, matrix: Matrix, chunk: Sequence[int]
    ) -> InverseFactor | None:
        if self.quantizer in FITS:
            return None
        hessians, _ = expert_hessians(runs, matrix, chunk, LayerNotes(), most=HESSIAN_TOKENS)
        return factorise(hessians)

    @property
    def _grid(self) -> GridSettings:
        return GridSettings(group_size=self.group_size, **QUICK_SEARCH)


@dataclass(frozen=True)
class _Sample:
    """Some of an expert's tokens.

    ``tokens`` [n, hidden], ``routing`` [n] what its output is multiplied by, ``output``
    [n, hidden], ``sampled`` tokens of the expert per token here, ``curvature`` the mean one of its
    matrices.
    """

    tokens: Tensor
    routing: Tensor
    output: Tensor
    sampled: float
    curvature: Mapping[Matrix, float]

    def norm_of(self, change: Tensor) -> float:
        """Frobenius norm of the routing-weighted change, [n, hidden], over all its tokens."""
        weighted = change.float() * self.routing.float().unsqueeze(-1)
        return float(weighted.norm()) * self.sampled**0.5


def _left(runs: ExpertRuns, expert: int, sample: _Sample) -> Tensor:
    """What an expert gives when it is removed, [n, hidden]: its biases stay, of zeros for weights.

    Those of its first matrix do not get through the second.
    """
    return finish(runs.weights.module, torch.zeros_like(sample.output), expert)


def _loss_curvature(runs: ExpertRuns, expert: int, gradients: Tensor) -> dict[Matrix, float]:
    """Mean curvature of the loss by an expert's matrices, on the tokens with gradients."""
    known = runs.routed.first(len(gradients))
    token, routing = known.tokens_of(expert)
    tokens, routing = weigh(runs.weights.module, known.hidden[token], routing)
    of_output = gradients[token] * routing.unsqueeze(-1)
    share = runs.routed.num_tokens / max(1, known.num_tokens)
    return loss_curvature(runs.weights, expert, tokens, of_output, share)


def _moved(
    runs: ExpertRuns,
    matrix: Matrix,
    chunk: Sequence[int],
    weights: Tensor,
    samples: Mapping[int, _Sample],
) -> Any:
    """(n,) float64, a matrix's part of Ω = Σ over matrices of curvature · ‖Q(W) − W‖² (HAWQ-V2).

    Parameters
    ----------
    weights : [n, R, K], the chunk's experts quantised.
    """
    found = []
    for expert, weight in zip(chunk, weights, strict=True):
        change = weight.to(torch.float32, copy=True).sub_(runs.weights.read(matrix, expert))
        found.append(samples[expert].curvature[matrix] * float(change.norm()) ** 2)
    return np.array(found)


def _selected_scores(layer: StreamedLayer, routed: RoutedInputs) -> Tensor:
    """[T, k] router scores of the selected experts, before renormalisation."""
    router = layer.source.router(layer.moe)
    return router_scores(router, routed.router_hidden).gather(1, routed.top_k_index)


def _summed(index: Tensor, scores: Tensor, experts: int) -> Any:
    """(experts,) float64, scores [T, k] summed over the tokens that selected each expert."""
    sums = torch.zeros(experts, dtype=torch.float64, device=index.device)
    sums.index_add_(0, index.reshape(-1), scores.reshape(-1).double())
    return sums.cpu().numpy()
