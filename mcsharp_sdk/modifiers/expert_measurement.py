"""Statistics of one MoE layer's experts, from the calibration tokens that reach them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mcsharp_sdk.artifacts import LayerStatistics, SourceStatistics
from mcsharp_sdk.models.capture import RoutedInputs
from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.experts import Matrix, weigh
from mcsharp_sdk.models.memory import release_free_memory
from mcsharp_sdk.models.routing import router_scores
from mcsharp_sdk.models.stream import StreamedLayer
from mcsharp_sdk.modifiers.layer_quantisation import (
    LayerNotes,
    LayerQuantiser,
    QuantizerSettings,
    expert_chunks,
)
from mcsharp_sdk.quantization.gptq import quantise_gptq
from mcsharp_sdk.quantization.hessian import DAMPING, InverseFactor, factorise
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
    quantizer : ``gptq`` or ``rtn``.
    group_size : of the grid.
    error_tokens : most tokens per expert that errors are measured on.
    block_errors : whether to measure errors at the block's output at all.
    sources : names of the calibration's sources; of several, each is counted by itself too.
    """

    widths: Sequence[int]
    quantizer: Literal["gptq", "rtn"]
    group_size: int
    error_tokens: int
    block_errors: bool
    sources: Sequence[str] = ()

    @torch.no_grad()
    def of_layer(self, layer: StreamedLayer) -> LayerStatistics:
        """Statistics of a loaded MoE layer.

        ``quant_error[b][e]`` = ‖σ_e(t)·(F_e(x_t) − F_e^b(x_t))‖_F over the tokens t that select
        expert e: as only that expert changes, it is the change of the block's output. Where σ_e(t)
        weighs the expert's input, that stands inside.
        """
        runs = ExpertRuns.of_layer(layer)
        routed = runs.routed
        release_free_memory()
        count = layer.moe.num_experts
        reached = routed.counts(count)
        ranks = routed.ranks
        errors = {width: np.zeros(count) for width in self.widths} if self.block_errors else {}
        dropped = np.zeros(count)
        for chunk in expert_chunks(runs):
            samples = {expert: self._sample(runs, expert) for expert in chunk}
            for expert, sample in samples.items():
                dropped[expert] = sample.norm_of(sample.output)
            if self.block_errors:
                for width, changes in self._changes(runs, chunk, samples):
                    errors[width][chunk] = changes
            runs.run(chunk)
        layer.expert_outputs = runs.finish()
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

    def _sample(self, runs: ExpertRuns, expert: int) -> _Sample:
        """Some of an expert's tokens with what it makes of them."""
        hidden, routing, of = runs.sample_of(expert, self.error_tokens)
        tokens, routing = weigh(runs.weights.module, hidden, routing)
        sampled = of / max(1, len(tokens))
        output = runs.weights.finished(expert, runs.weights.activated(expert, tokens))
        return _Sample(tokens, routing, output, sampled)

    def _changes(
        self, runs: ExpertRuns, chunk: Sequence[int], samples: Mapping[int, _Sample]
    ) -> Iterator[tuple[int, list[float]]]:
        """For each width, by how much quantising changes the output of each expert of a chunk.

        Of the quantised gate and up projections only what they make of the sampled tokens is held
        while the down projections are quantised.
        """
        inner: dict[int, list[Tensor]] = {}
        for width, weights in self._variants(runs, "gate_up", chunk):
            inner[width] = [
                runs.weights.activated(e, samples[e].tokens, w)
                for e, w in zip(chunk, weights, strict=True)
            ]
        for width, weights in self._variants(runs, "down", chunk):
            outputs = [
                runs.weights.finished(e, i, w)
                for e, i, w in zip(chunk, inner.pop(width), weights, strict=True)
            ]
            yield (
                width,
                [
                    samples[e].norm_of(samples[e].output - output)
                    for e, output in zip(chunk, outputs, strict=True)
                ],
            )

    def quantised_experts(
        self, runs: ExpertRuns
    ) -> Iterator[tuple[int, Iterator[tuple[int, ExpertWeights]]]]:
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
                quantise_rtn(weights, widths, self._grid)
                if factor is None
                else quantise_gptq(weights, factor, widths, self._grid)
            )
            release_free_memory()
            yield width, batch.dequantise(weights.dtype)

    def _factor(
        self, runs: ExpertRuns, matrix: Matrix, chunk: Sequence[int]
    ) -> InverseFactor | None:
        if self.quantizer == "rtn":
            return None
        settings = QuantizerSettings("gptq", self._grid, DAMPING, False, True)
        quantiser = LayerQuantiser(settings, None, None)
        hessians = quantiser.expert_hessians(runs, matrix, chunk, LayerNotes(), HESSIAN_TOKENS)
        return factorise(hessians)

    @property
    def _grid(self) -> GridSettings:
        return GridSettings(group_size=self.group_size, **QUICK_SEARCH)


@dataclass(frozen=True)
class _Sample:
    """Some of an expert's tokens.

    ``tokens`` [n, hidden], ``routing`` [n] what its output is multiplied by, ``output``
    [n, hidden], ``sampled`` tokens of the expert per token here.
    """

    tokens: Tensor
    routing: Tensor
    output: Tensor
    sampled: float

    def norm_of(self, change: Tensor) -> float:
        """Frobenius norm of the routing-weighted change, [n, hidden], over all its tokens."""
        weighted = change.float() * self.routing.float().unsqueeze(-1)
        return float(weighted.norm()) * self.sampled**0.5


def _selected_scores(layer: StreamedLayer, routed: RoutedInputs) -> Tensor:
    """[T, k] router scores of the selected experts, before renormalisation."""
    router = layer.source.router(layer.moe)
    return router_scores(router, routed.router_hidden).gather(1, routed.top_k_index)


def _summed(index: Tensor, scores: Tensor, experts: int) -> Any:
    """(experts,) float64, scores [T, k] summed over the tokens that selected each expert."""
    sums = torch.zeros(experts, dtype=torch.float64, device=index.device)
    sums.index_add_(0, index.reshape(-1), scores.reshape(-1).double())
    return sums.cpu().numpy()
