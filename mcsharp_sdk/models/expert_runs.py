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

from mcsharp_sdk.models.capture import routed_inputs
from mcsharp_sdk.models.evenly_spaced import evenly_spaced
from mcsharp_sdk.models.expert_exchange import ExchangedTokens, ExpertTokens, OwnTokens
from mcsharp_sdk.models.expert_weights import ExpertWeights
from mcsharp_sdk.models.experts import MATRICES, Matrix, weigh
from mcsharp_sdk.models.routed_inputs import RoutedInputs
from mcsharp_sdk.models.scratch import Scratch
from mcsharp_sdk.models.streamed_layer import StreamedLayer

PIECE_TOKENS = 4096
"""Tokens that go through an expert at a time."""

OVERALL_TOKENS = 4096
"""Tokens of the whole layer that stand in where few tokens reach an expert."""

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
    routed : what reaches them from this process's sequences.
    tokens : of the experts that this process works on.
    outputs : [N, hidden], routing-weighted outputs of these on their tokens, summed.
    scratch : where they are kept.
    """

    weights: ExpertWeights
    routed: RoutedInputs
    tokens: ExpertTokens
    outputs: Tensor
    scratch: Scratch
    _kept: dict[int, list[Piece]] = field(default_factory=dict)
    _sampled: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of_layer(cls, layer: StreamedLayer, *, last: bool = False) -> ExpertRuns:
        """Run a layer up to its experts; none of them is done yet.

        ``last`` as of :func:`~mcsharp_sdk.models.capture.routed_inputs`.
        """
        if layer.inputs.ranks.alone:  # otherwise which experts come first is not known yet
            layer.expert_weights.expect(range(1))
        routed = routed_inputs(layer, last=last)
        scratch, ranks, weights = layer.inputs.scratch, layer.inputs.ranks, layer.expert_weights
        every = range(weights.num_experts)
        tokens: ExpertTokens = OwnTokens(every, routed.hidden, [every], routed)
        if not ranks.alone:
            tokens = ExchangedTokens.of_layer(routed, _cost(weights), ranks, scratch)
        outputs = scratch.zeros(*tokens.hidden.shape, dtype=routed.hidden.dtype)
        runs = cls(weights, routed, tokens, outputs, scratch)
        if runs.calibrated and not ranks.alone:
            runs._sampled = routed.sample(OVERALL_TOKENS)  # all processes do this together
        return runs

    @property
    def calibrated(self) -> bool:
        """Whether there are any tokens in the run."""
        return bool(self.routed.batch_tokens)

    @property
    def experts(self) -> Sequence[int]:
        """The experts that this process works on, in order."""
        return self.tokens.experts

    def sample_of(self, expert: int, most: int) -> tuple[Tensor, Tensor, int]:
        """At most so many of an expert's tokens [n, hidden], evenly spaced.

        Returns
        -------
        The tokens, their routing weights [n], and how many the expert has in all.
        """
        token, routing = self.tokens.of(expert)
        if len(token) > most:
            chosen = evenly_spaced(len(token), most)
            return self.tokens.hidden[token[chosen]], routing[chosen], len(token)
        return self.tokens.hidden[token], routing, len(token)

    def pieces(self, expert: int, matrix: Matrix, most: int | None = None) -> Iterator[Piece]:
        """The expert's tokens with the inputs of one of its matrices, some at a time.

        Of twice as many as ``most`` tokens or more only every second, third … is given: at least
        ``most`` of them.

        Those of ``down`` come from the ``gate_up`` that the expert has when they are first asked
        for; it must not change between that and :meth:`add_output`.
        """
        token, routing = self.tokens.of(expert)
        every = 1 if most is None else max(1, len(token) // most)
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
            tokens, factor = weigh(self.weights.module, self.tokens.hidden[part], weight)
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

    def inputs_from_all_tokens(self, expert: int, matrix: Matrix) -> Tensor:
        """Inputs of one of an expert's matrices, [n, K], as if any token of the layer chose it.

        Of more than ``OVERALL_TOKENS`` so many are taken, evenly spaced. Where routing weights
        multiply inputs, the layer's mean one does.
        """
        if self._sampled is None:
            self._sampled = self.routed.sample(OVERALL_TOKENS)
        hidden, weight = self._sampled
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
        for position, expert in enumerate(experts):
            self.weights.expect(experts[position + 1 : position + 2])
            self.add_output(expert)
            self.weights.release(expert)

    def finish(self) -> Tensor:
        """[T, hidden], the summed outputs of all experts on this process's tokens."""
        return self.tokens.returned(self.outputs)

    def _has_room(self, tokens: int) -> bool:
        kept = sum(p.inputs.nbytes for pieces in self._kept.values() for p in pieces)
        _, columns = self.weights.shape("down")
        return kept + tokens * columns * self.outputs.element_size() <= KEPT_BYTES


@torch.no_grad()
def run_experts(layer: StreamedLayer, *, last: bool = False) -> Tensor:
    """Summed outputs of a layer's routed experts, [T, hidden], as if they had been calibrated.

    ``last`` as of :func:`~mcsharp_sdk.models.capture.routed_inputs`.
    """
    runs = ExpertRuns.of_layer(layer, last=last)
    runs.run(runs.experts)
    return runs.finish()


def _cost(weights: ExpertWeights) -> tuple[float, float]:
    """Multiplications for quantising an expert, and for each token of it."""
    shapes = [weights.shape(matrix) for matrix in MATRICES]
    fixed = sum(columns**3 + 6 * rows * columns**2 for rows, columns in shapes)
    return float(fixed), float(sum(columns**2 + rows * columns for rows, columns in shapes))
