"""Bringing the tokens of an expert together in the process that works on it.

Each process has the tokens of its own sequences. An expert belongs to one process, which gets all
tokens that are routed to it, in the order that one process alone would have them in; so its Hessian
and what is made of it are the same. What it gives goes back to where the tokens came from, and is
added there expert by expert, again in that order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsharp_sdk.models.ranks import Ranks, divide
from mcsharp_sdk.models.routed_inputs import RoutedInputs
from mcsharp_sdk.models.scratch import Scratch


@dataclass(frozen=True)
class ExpertTokens(ABC):
    """Tokens of the experts that this process works on.

    Attributes
    ----------
    experts : which these are, ascending.
    hidden : [N, hidden], their tokens.
    owned : experts of each process.
    """

    experts: Sequence[int]
    hidden: Tensor
    owned: Sequence[Sequence[int]]

    @abstractmethod
    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Rows of ``hidden`` that are an expert's, int64 [n], and their routing weights, [n]."""

    @abstractmethod
    def returned(self, outputs: Tensor) -> Tensor:
        """[T, hidden], summed outputs of this process's tokens, from those of :attr:`hidden`."""


@dataclass(frozen=True)
class OwnTokens(ExpertTokens):
    """All experts, and the tokens where they are: the only process of a run."""

    routed: RoutedInputs

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """As the routing says."""
        return self.routed.tokens_of(expert)

    def returned(self, outputs: Tensor) -> Tensor:
        """They are that already."""
        return outputs


@dataclass(frozen=True)
class ExchangedTokens(ExpertTokens):
    """Some experts, with the tokens of all processes.

    Attributes
    ----------
    routed : what reaches all experts from this process's sequences.
    routing : [N].
    counts : [processes, experts] int64, tokens.
    ranks, scratch : the processes, and where activations are kept.
    """

    routed: RoutedInputs
    routing: Tensor
    counts: Tensor
    ranks: Ranks
    scratch: Scratch

    @classmethod
    def of_layer(
        cls, routed: RoutedInputs, cost: Sequence[float], ranks: Ranks, scratch: Scratch
    ) -> ExchangedTokens:
        """Send tokens to where their experts are.

        Parameters
        ----------
        cost : of working on an expert, and of each token of it.
        """
        own = torch.tensor(routed.counts())
        counts = ranks.gather(own.unsqueeze(0))
        totals = counts.sum(0).tolist()
        owned = divide([cost[0] + cost[1] * tokens for tokens in totals], ranks.count)
        experts = owned[ranks.rank]
        size = sum(totals[expert] for expert in experts)
        hidden = scratch.empty(size, routed.hidden.shape[1], dtype=routed.hidden.dtype)
        routing = routed.top_k_weights.new_empty(size)
        whole = cls(experts, hidden, owned, routed, routing, counts, ranks, scratch)
        for rows, asked in whole._rounds():
            token, weight = whole._to_send(asked)
            sent, received = whole._sizes(asked)
            hidden[rows] = ranks.swap(routed.hidden[token], sent, received)
            routing[rows] = ranks.swap(weight, sent, received)
            scratch.release()
        return whole

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The expert's tokens lie one behind the other."""
        rows = self._rows(expert)
        return torch.arange(rows.start, rows.stop, device=self.hidden.device), self.routing[rows]

    def returned(self, outputs: Tensor) -> Tensor:
        """Send outputs back, and add them up in the order of the experts."""
        columns = outputs.shape[1]
        starts = [0, *self.counts[self.ranks.rank].cumsum(0).tolist()]
        found = self.scratch.empty(starts[-1], columns, dtype=outputs.dtype)
        for rows, asked in self._rounds():
            sent, received = self._sizes(asked)
            back = self.ranks.swap(outputs[rows], received, sent)
            for expert, part in zip(asked, back.split(sent), strict=True):
                if expert is not None:
                    found[starts[expert] : starts[expert + 1]] = part
            self.scratch.release()
        summed = self.scratch.zeros(*self.routed.hidden.shape, dtype=outputs.dtype)
        for expert in range(self.counts.shape[1]):
            token, _ = self.routed.tokens_of(expert)
            summed.index_add_(0, token, found[starts[expert] : starts[expert + 1]])
            self.scratch.release()
        return summed

    def _rounds(self) -> Iterator[tuple[slice, list[int | None]]]:
        """One expert of each process at a time; and the rows that this process's one has."""
        for position in range(max(map(len, self.owned))):
            asked = [own[position] if position < len(own) else None for own in self.owned]
            mine = asked[self.ranks.rank]
            yield (slice(0, 0) if mine is None else self._rows(mine)), asked

    def _rows(self, expert: int) -> slice:
        totals = self.counts.sum(0)
        start = sum(int(totals[e]) for e in self.experts if e < expert)
        return slice(start, start + int(totals[expert]))

    def _to_send(self, asked: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        pairs = [self.routed.tokens_of(expert) for expert in asked if expert is not None]
        return torch.cat([token for token, _ in pairs]), torch.cat([w for _, w in pairs])

    def _sizes(self, asked: Sequence[int | None]) -> tuple[list[int], list[int]]:
        """Rows that go to each process, and come from each."""
        own, mine = self.counts[self.ranks.rank], asked[self.ranks.rank]
        sent = [0 if expert is None else int(own[expert]) for expert in asked]
        received = [0] * self.ranks.count if mine is None else self.counts[:, mine].tolist()
        return sent, received
