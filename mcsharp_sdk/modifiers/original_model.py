"""The original model beside the one that is being quantised, a layer at a time.

Its activations are carried along, so that matrices can be fitted to what the original's get.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mcsharp_sdk.models.capture import routed_inputs
from mcsharp_sdk.models.expert_runs import PIECE_TOKENS, ExpertRuns
from mcsharp_sdk.models.experts import Matrix, weigh
from mcsharp_sdk.models.stream import advance
from mcsharp_sdk.models.streamed_layer import LayerInputs, StreamedLayer
from mcsharp_sdk.quantization.propagation import accumulate_cross


def copied_inputs(inputs: LayerInputs) -> LayerInputs:
    """The same inputs of a layer, whose hidden states advance by themselves."""
    counts = [hidden.shape[:2].numel() for hidden in inputs.hidden]
    like = inputs.hidden[0]
    room = inputs.scratch.empty(sum(counts), like.shape[-1], dtype=like.dtype)
    hidden = [
        part.view_as(own).copy_(own)
        for part, own in zip(room.split(counts), inputs.hidden, strict=True)
    ]
    return replace(inputs, hidden=hidden)


@dataclass
class OriginalModel:
    """Carries the original activations along with the quantised ones."""

    _inputs: LayerInputs | None = field(default=None, repr=False)

    def layer(self, layer: StreamedLayer) -> OriginalLayer:
        """The original of a layer that is loaded and not yet changed; to be asked for each."""
        if self._inputs is None:
            self._inputs = copied_inputs(layer.inputs)
        names = layer.source.topology.linears[layer.index]
        weights = {f"{name}.weight": _weight(layer, name).clone() for name in names}
        return OriginalLayer(layer, self._inputs, weights)


def _weight(layer: StreamedLayer, name: str) -> Tensor:
    return layer.module.get_parameter(f"{name}.weight").detach()


@dataclass
class OriginalLayer:
    """A layer as it was before it was quantised, with the original model's activations.

    Attributes
    ----------
    layer : the one that is being quantised.
    inputs : of the original, in front of it; behind it once :meth:`advance` was called, but for the
        last layer.
    weights : of the linears outside of the routed experts.
    hidden : [T, hidden], what reaches the original's experts, once it has advanced.
    """

    layer: StreamedLayer
    inputs: LayerInputs
    weights: dict[str, Tensor]
    hidden: Tensor | None = None

    @contextmanager
    def in_place(self) -> Iterator[StreamedLayer]:
        """The layer with its original linears and the original activations, for a while."""
        changed = {name: self.layer.module.get_parameter(name) for name in self.weights}
        kept = {name: parameter.data for name, parameter in changed.items()}
        for name, parameter in changed.items():
            parameter.data = self.weights[name]
        try:
            yield StreamedLayer(
                self.layer.source,
                self.layer.index,
                self.layer.module,
                self.inputs,
                self.layer.experts,
            )
        finally:
            for name, parameter in changed.items():
                parameter.data = kept[name]

    @torch.no_grad()
    def advance(self) -> None:
        """Run the original layer; its experts and its router must not have been changed yet.

        The last layer is run only up to its experts: nobody asks for what is behind it.
        """
        with self.in_place() as original:
            if original.is_last:
                if original.moe is not None:
                    self.hidden = routed_inputs(original).hidden
                return
            if original.moe is not None:
                runs = ExpertRuns.of_layer(original, last=True)
                self.hidden = runs.routed.hidden
                runs.run(runs.experts)
                original.expert_outputs = runs.finish()
            advance(original)

    def experts(self, runs: ExpertRuns) -> OriginalExperts:
        """What the original's experts get, beside those of ``runs``."""
        if self.hidden is None:
            raise ValueError(f"the original of decoder layer {self.layer.index} has not been run")
        return OriginalExperts(runs, self.hidden)


@dataclass
class OriginalExperts:
    """What the original's experts get, for the tokens that are routed to them now.

    Attributes
    ----------
    runs : of the experts that are being quantised.
    hidden : [T, hidden], what reaches the original's experts, of the same tokens.
    first : expert -> its gate and up projections as they were.
    """

    runs: ExpertRuns
    hidden: Tensor
    first: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, chunk: Sequence[int]) -> None:
        """Remember the first matrices of some experts, and forget those of others."""
        self.first = {expert: self.runs.weights.read("gate_up", expert).clone() for expert in chunk}

    def cross_grams(
        self, matrix: Matrix, chunk: Sequence[int], *, routing_weighted: bool
    ) -> Tensor:
        """Cross-Gram matrices of one matrix of some experts, fp32 [n, K, K]."""
        _, columns = self.runs.weights.shape(matrix)
        grams = torch.zeros(len(chunk), columns, columns, device=self.hidden.device)
        for gram, expert in zip(grams, chunk, strict=True):
            routing = self.runs.tokens.of(expert)[1].split(PIECE_TOKENS)
            for piece, weight in zip(self.runs.pieces(expert, matrix), routing, strict=True):
                wanted = self._inputs(matrix, expert, piece.token, weight)
                sigma = piece.routing if routing_weighted else None
                accumulate_cross(gram, wanted, piece.inputs, sigma)
        return grams

    def _inputs(self, matrix: Matrix, expert: int, token: Tensor, routing: Tensor) -> Tensor:
        """Original inputs of a matrix on some tokens, [n, K]."""
        tokens, _ = weigh(self.runs.weights.module, self.hidden[token], routing)
        if matrix == "gate_up":
            return tokens
        return self.runs.weights.activated(expert, tokens, self.first[expert])
