"""A decoder layer that is loaded for a while, and the calibration activations in front of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mcsharp_sdk.models.bfloat16 import fast_linears
from mcsharp_sdk.models.expert_weights import ExpertWeights
from mcsharp_sdk.models.experts import answering
from mcsharp_sdk.models.ranks import ALONE, Ranks
from mcsharp_sdk.models.scratch import Scratch
from mcsharp_sdk.models.source import SourceModel

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a decoder layer besides the hidden states."""


@dataclass(frozen=True)
class Addition:
    """What a model adds to the hidden states of some tokens of a batch in front of a layer.

    Attributes
    ----------
    rows : int64 [m], which of the batch's tokens.
    values : [m, hidden], the model's dtype.
    """

    rows: Tensor
    values: Tensor

    def add_to(self, hidden: Tensor) -> None:
        """Add to contiguous hidden states, (sequences, length, hidden), in place."""
        hidden.view(-1, hidden.shape[-1])[self.rows] += self.values


@dataclass
class LayerInputs:
    """Hidden states before a decoder layer and the other arguments it takes, per forward batch.

    Attributes
    ----------
    hidden : per batch (sequences, length, hidden), the model's dtype; changed by ``advance``.
        Lengths may differ between batches.
    arguments : per batch and layer, positional and keyword arguments.
    sources : per batch, the source of its tokens in the calibration set.
    additions : (batch, layer) -> what the model adds in front of the layer, where it does.
    scratch : where activations are kept.
    ranks : the processes that share the calibration set; these are this one's sequences.
    adding : type of decoder layer -> whether it adds its routed experts' outputs last, where tried.
    """

    hidden: list[Tensor]
    arguments: list[list[Arguments]]
    sources: list[int]
    additions: dict[tuple[int, int], Addition] = field(default_factory=dict)
    scratch: Scratch = field(default_factory=Scratch)
    ranks: Ranks = ALONE
    adding: dict[type[nn.Module], bool] = field(default_factory=dict)

    def token_sources(self, batch_tokens: Sequence[int]) -> Tensor:
        """int64 [T], the source of each token, given the number of tokens of each batch."""
        counts = torch.tensor(batch_tokens, dtype=torch.int64)
        return torch.tensor(self.sources, dtype=torch.int64).repeat_interleave(counts)

    def batches(self) -> range:
        """Numbers of the batches, one forward each."""
        return range(len(self.hidden))

    def call(self, layer: nn.Module, index: int, batch: int) -> Tensor:
        """Output of ``layer`` (decoder layer ``index``) for one batch."""
        self.scratch.release()
        args, kwargs = self.arguments[batch][index]
        with fast_linears():
            output = layer(self.hidden[batch], *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def advance(self, layer: nn.Module, index: int) -> None:
        """Replace the hidden states by what ``layer``, and the model behind it, make of them."""
        for batch in self.batches():
            self.hidden[batch].copy_(self.call(layer, index, batch))
            self.add_additions(index, batch)

    def add_additions(self, index: int, batch: int) -> None:
        """Add what the model adds to one batch behind decoder layer ``index``."""
        added = self.additions.get((batch, index + 1))
        if added is not None:
            added.add_to(self.hidden[batch])


def in_turn(outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """An answer that gives each batch of hidden states the next rows of ``outputs``, [T, hidden].

    Batches may differ in size, and a batch may have fewer tokens than its sequences: some models
    route those of images to experts of their own.
    """
    done = 0

    def answer(hidden: Tensor) -> Tensor:
        nonlocal done
        start = done
        done += hidden.numel() // outputs.shape[-1]
        return outputs[start:done].view_as(hidden)

    return answer


@dataclass
class StreamedLayer:
    """One loaded decoder layer with the calibration activations in front of it.

    Attributes
    ----------
    source, index, module : the model, and which of its layers this is.
    inputs : in front of it.
    experts : the weights of its routed experts; None if it is dense.
    expert_outputs : [T, hidden], the sum of the routed experts' outputs on all tokens if the
        consumer has computed it; they are not run again then.
    passed : batches that are through the layer already, but for its experts' outputs: ``inputs``
        holds what these have to be added to.
    """

    source: SourceModel
    index: int
    module: nn.Module
    inputs: LayerInputs
    experts: ExpertWeights | None = None
    expert_outputs: Tensor | None = None
    passed: set[int] = field(default_factory=set)

    @property
    def moe(self) -> Any:
        """The layer's mixture of experts, or None if it is dense."""
        return self.source.topology.moe.get(self.index)

    @property
    def is_last(self) -> bool:
        """Whether there is no decoder layer behind it, so that nobody asks what it gives."""
        return self.index + 1 == self.source.topology.num_layers

    @property
    def experts_module(self) -> nn.Module:
        """The module of a MoE layer that runs its routed experts."""
        return self.module.get_submodule(self.moe.experts)

    @property
    def expert_weights(self) -> ExpertWeights:
        """The weights of the routed experts of a MoE layer."""
        if self.experts is None:
            raise ValueError(f"decoder layer {self.index} has no routed experts")
        return self.experts

    @property
    def known_outputs(self) -> Tensor:
        """``expert_outputs`` of a layer whose experts the consumer has run."""
        if self.expert_outputs is None:
            raise ValueError(f"the experts of decoder layer {self.index} have not been run")
        return self.expert_outputs

    def advance_with(self, outputs: Tensor) -> None:
        """Advance with the routed experts' outputs, [T, hidden], known already."""
        answer = in_turn(outputs)
        with answering(self.experts_module, answer):
            for batch in self.inputs.batches():
                hidden = self.inputs.hidden[batch]
                if batch in self.passed:
                    hidden += answer(hidden)
                else:
                    hidden.copy_(self.inputs.call(self.module, self.index, batch))
                self.inputs.add_additions(self.index, batch)
        self.passed.clear()
