"""Run a layer's routed experts one after the other, each on the tokens routed to it.

What goes into an expert's down projection is computed once, for its Hessian and for its output; and
the outputs, summed up as the experts are done, are what the layer goes on with. So calibrating a
layer costs one run of its experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mcsharp_sdk.models.capture import RoutedInputs, routed_inputs
from mcsharp_sdk.models.expert_weights import ExpertWeights
from mcsharp_sdk.models.experts import Matrix, weigh
from mcsharp_sdk.models.scratch import Scratch
from mcsharp_sdk.models.stream import StreamedLayer

PIECE_TOKENS = 4096
"""Tokens that go through an expert at a time."""

KEPT_BYTES = 128 * 2**20
"""Inputs of down projections that are kept for the outputs; beyond it they are computed again."""


class Piece(NamedTuple):
    """Some of the tokens of an expert.

    ``token`` int64 [n], ``routing`` [n] what the expert's output on them is multiplied by,
    ``inputs`` [n, K] of a matrix.
    """

    token: Tensor
    routing: Tensor
    inputs: Tensor


@dataclass
class ExpertRuns:
    """The routed experts of one layer with the tokens that reach them.

    Attributes
    ----------
    weights : of the experts.
    routed : what reaches them.
    outputs : [T, hidden], routing-weighted outputs of the experts done so far, summed.
    scratch : where they are kept.
    """

    weights: ExpertWeights
    routed: RoutedInputs
    outputs: Tensor
    scratch: Scratch
    _kept: dict[int, list[Piece]] = field(default_factory=dict)

    @classmethod
    def of_layer(cls, layer: StreamedLayer) -> ExpertRuns:
        """Run a layer up to its experts; none of them is done yet."""
        routed = routed_inputs(layer)
        scratch = layer.inputs.scratch
        outputs = scratch.zeros(*routed.hidden.shape, dtype=routed.hidden.dtype)
        return cls(layer.expert_weights, routed, outputs, scratch)

    @property
    def experts(self) -> Sequence[int]:
        """The experts, in order."""
        return range(self.weights.num_experts)

    def pieces(self, expert: int, matrix: Matrix, most: int | None = None) -> Iterator[Piece]:
        """The expert's tokens with the inputs of one of its matrices, some at a time.

        Of more than ``most`` tokens only every second, third … is given.

        Those of ``down`` come from the ``gate_up`` that the expert has when they are first asked
        for; it must not change between that and :meth:`add_output`.
        """
        token, routing = self.routed.tokens_of(expert)
        every = 1 if most is None else max(1, -(-len(token) // most))
        for piece in self._all_pieces(expert, matrix, token, routing):
            yield piece if every == 1 else Piece(*(part[::every] for part in piece))

    def _all_pieces(
        self, expert: int, matrix: Matrix, token: Tensor, routing: Tensor
    ) -> Iterator[Piece]:
        if expert in self._kept and matrix == "down":
            yield from self._kept[expert]
            return
        keep: list[Piece] | None = [] if matrix == "down" and self._has_room(len(token)) else None
        for part, weight in zip(
            token.split(PIECE_TOKENS), routing.split(PIECE_TOKENS), strict=True
        ):
            tokens, factor = weigh(self.weights.module, self.routed.hidden[part], weight)
            self.scratch.release()
            piece = Piece(part, factor, self.inputs(expert, matrix, tokens))
            if keep is not None:
                keep.append(piece)
            yield piece
        if keep is not None:
            self._kept[expert] = keep

    def inputs(self, expert: int, matrix: Matrix, tokens: Tensor) -> Tensor:
        """Inputs of one of an expert's matrices, [n, K], from those of the expert, [n, hidden]."""
        return tokens if matrix == "gate_up" else self.weights.activated(expert, tokens)

    def inputs_from_all_tokens(self, expert: int, matrix: Matrix, most: int) -> Tensor:
        """Inputs of one of an expert's matrices, [n, K], as if any token of the layer chose it.

        Of more than ``most`` tokens so many are taken, evenly spaced. Where routing weights
        multiply inputs, the layer's mean one does.
        """
        hidden, weight = self.routed.sample(most)
        tokens, _ = weigh(self.weights.module, hidden, weight.expand(len(hidden)))
        return self.inputs(expert, matrix, tokens)

    def add_output(self, expert: int) -> None:
        """Run the rest of an expert and add its output; its weights must be final."""
        for token, routing, inputs in self.pieces(expert, "down"):
            output = self.weights.finished(expert, inputs)
            weighted = (output * routing.unsqueeze(-1)).to(self.outputs.dtype)
            self.outputs.index_add_(0, token, weighted)
            self.scratch.release()
        self._kept.pop(expert, None)

    def run(self, experts: Sequence[int]) -> None:
        """Add the outputs of some experts, and release them."""
        for expert in experts:
            self.add_output(expert)
            self.weights.release(expert)

    def _has_room(self, tokens: int) -> bool:
        kept = sum(p.inputs.nbytes for pieces in self._kept.values() for p in pieces)
        _, columns = self.weights.shape("down")
        return kept + tokens * columns * self.outputs.element_size() <= KEPT_BYTES


@torch.no_grad()
def run_experts(layer: StreamedLayer) -> Tensor:
    """Summed outputs of a layer's routed experts, [T, hidden], as if they had been calibrated."""
    runs = ExpertRuns.of_layer(layer)
    runs.run(runs.experts)
    return runs.outputs
