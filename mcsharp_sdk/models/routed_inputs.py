"""What reaches the routed experts of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mcsharp_sdk.models.evenly_spaced import evenly_spaced
from mcsharp_sdk.models.experts import tokens_of_expert
from mcsharp_sdk.models.ranks import ALONE, Ranks
from mcsharp_sdk.models.streamed_layer import StreamedLayer


@dataclass(frozen=True)
class RoutedInputs:
    """What reaches a layer's routed experts, over all calibration tokens.

    Attributes
    ----------
    hidden : [T, hidden], the model's dtype.
    router_hidden : [T, hidden], what the router decides on. It is ``hidden``, unless the experts
        get a projection of it.
    top_k_index : int64 [T, k]
    top_k_weights : [T, k], as the experts apply them.
    num_experts : that there are to choose from.
    ranks : the processes that have tokens of the layer, this one among them.
    batch_tokens : per forward batch, how many of the tokens are its own. Of sequences with images
        some models route the text alone here.
    """

    hidden: Tensor
    router_hidden: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    batch_tokens: tuple[int, ...]
    num_experts: int
    ranks: Ranks = ALONE

    @classmethod
    def none(cls, layer: StreamedLayer) -> RoutedInputs:
        """Of no tokens."""
        columns = layer.expert_weights.shape("gate_up")[1]
        hidden = layer.inputs.scratch.empty(0, columns, dtype=layer.source.dtype)
        index = torch.empty(0, layer.moe.top_k, dtype=torch.int64, device=hidden.device)
        weights, ranks = index.to(hidden.dtype), layer.inputs.ranks
        return cls(hidden, hidden, index, weights, (), layer.moe.num_experts, ranks)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.hidden.shape[0])

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Which tokens are routed to an expert, int64 [n], and their routing weights, [n]."""
        token, slot = tokens_of_expert(self.top_k_index, expert)
        return token, self.top_k_weights[token, slot]

    def sample(self, most: int) -> tuple[Tensor, Tensor]:
        """At most so many tokens [n, hidden], evenly spaced, and the mean routing weight, [].

        They are from the tokens of all processes.
        """
        own = torch.zeros(self.ranks.count, dtype=torch.int64)
        own[self.ranks.rank] = len(self.hidden)
        counts = self.ranks.sum_(own).tolist()
        chosen = evenly_spaced(sum(counts), most)
        chosen -= sum(counts[: self.ranks.rank])
        chosen = chosen[(chosen >= 0) & (chosen < len(self.hidden))]
        if self.ranks.alone:
            return self.hidden[chosen], self.top_k_weights.mean()
        total = self.ranks.total(float(self.top_k_weights.double().sum()))
        mean = self.top_k_weights.new_tensor(total / (sum(counts) * self.top_k_weights.shape[1]))
        return self.ranks.gather(self.hidden[chosen]), mean

    def first(self, tokens: int) -> RoutedInputs:
        """What reaches them of the first so many tokens, in one batch."""
        parts = (self.hidden, self.router_hidden, self.top_k_index, self.top_k_weights)
        hidden, router_hidden, index, weights = (part[:tokens] for part in parts)
        return RoutedInputs(hidden, router_hidden, index, weights, (len(hidden),), self.num_experts)

    def counts(self) -> list[int]:
        """Tokens per expert."""
        return torch.bincount(self.top_k_index.reshape(-1), minlength=self.num_experts).tolist()
