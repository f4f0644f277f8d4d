"""Train a layer's top-any network on the output of its own block (scope ``block``).

Pruning changes the routing weights w of a token into w', and so its block's output by
Σ_i (w'_i - w_i)·f_i with f_i the output of its i-th expert. The squared norm of that is
(w' - w)ᵀ G (w' - w) with G_ij = f_i·f_j. So the experts run once, the small matrices G are kept,
and the training never needs an expert again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcsharp_sdk.models.capture import routed_inputs
from mcsharp_sdk.models.ranks import Ranks
from mcsharp_sdk.models.routed_inputs import RoutedInputs
from mcsharp_sdk.models.streamed_layer import StreamedLayer
from mcsharp_sdk.modifiers.expert_outputs import slot_outputs, squared_norms_behind
from mcsharp_sdk.modifiers.top_any_target import apply_shift, keep_ratio, shift_for
from mcsharp_sdk.modifiers.top_any_training import (
    StepLosses,
    Training,
    new_network,
    renormalised,
)
from mcsharp_sdk.pruning.rule import ranked
from mcsharp_sdk.pruning.top_any import TopAnyNetwork, gumbel_noise, keep_mask, soft_keep

if TYPE_CHECKING:
    from mcsharp_sdk.modifiers.top_any_router import TopAnyRouter

CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class BlockTask:
    """What one layer's network is trained on; slots in falling order of weight.

    Attributes
    ----------
    hidden : (T, hidden) inputs of the experts, the model's dtype.
    weights : (T, k) float32 routing weights, falling.
    gram : (T, k, k) float32, G of each token.
    norms : (T,) float32, squared norms of the hidden states behind the layer.
    ranks : the processes that have tokens of the layer; T counts those of this one.
    before, whole : tokens of the processes before this one, and of all.
    """

    hidden: Tensor
    weights: Tensor
    gram: Tensor
    norms: Tensor
    ranks: Ranks
    before: int
    whole: int

    @classmethod
    @torch.no_grad()
    def of_layer(cls, layer: StreamedLayer) -> BlockTask:
        """Run a loaded layer's experts once; its ``expert_outputs`` are known then."""
        routed = in_falling_order(routed_inputs(layer))
        weights, scratch = routed.top_k_weights.float(), layer.inputs.scratch
        summed = scratch.empty(*routed.hidden.shape, dtype=routed.hidden.dtype)
        top_k = weights.shape[1]
        gram = torch.empty(len(weights), top_k, top_k, device=weights.device)
        for rows, found in slot_outputs(layer.expert_weights, routed, scratch):
            outputs = found.float()
            gram[rows] = outputs @ outputs.transpose(1, 2)
            summed[rows] = (weights[rows].unsqueeze(1) @ outputs).squeeze(1).to(summed.dtype)
        layer.expert_outputs = summed
        norms = squared_norms_behind(layer, summed)
        counts = routed.ranks.collect(routed.num_tokens)
        before = sum(counts[: routed.ranks.rank])
        return cls(routed.hidden, weights, gram, norms, routed.ranks, before, sum(counts))

    def error(self, keep: Tensor, rows: Tensor | slice) -> Tensor:
        """Sum over some tokens of the squared change of the block's output.

        It is relative to the squared norm of the token's hidden state behind the layer: what
        follows normalises that state, so this is what the token's change amounts to there.

        Parameters
        ----------
        keep : (t, k) floating, 1 where a slot is kept and 0 elsewhere.
        rows : which t tokens.
        """
        weights = self.weights[rows]
        change = renormalised(weights, keep.to(weights.dtype)) - weights
        squared = torch.einsum("ti,tij,tj->t", change, self.gram[rows], change)
        return (squared / self.norms[rows].clamp_min(torch.finfo(torch.float32).tiny)).sum()

    def worst_error(self) -> float:
        """Error if every token kept its first expert alone."""
        keep = torch.zeros_like(self.weights)
        keep[:, 0] = 1.0
        return self._mean_error(keep)

    def _mean_error(self, keep: Tensor) -> float:
        """Error over the tokens of all processes; ``keep`` (T, k) is of this one's."""
        return self.ranks.total(float(self.error(keep, slice(None)))) / self.whole

    def step_losses(
        self, network: TopAnyNetwork, tokens: int, temperature: float, generator: torch.Generator
    ) -> StepLosses:
        """This process's part of the losses of one training step, on tokens drawn at random.

        All processes draw the same tokens of the whole layer, and each works on those it has.
        """
        drawn = torch.randint(self.whole, (tokens,), generator=generator)
        top_k = self.weights.shape[1]
        noise = gumbel_noise(torch.empty(tokens, top_k), generator)
        own = (drawn >= self.before) & (drawn < self.before + len(self.weights))
        rows = (drawn[own] - self.before).to(self.hidden.device)
        logits = network(self.hidden[rows], self.weights[rows])
        keep = soft_keep(logits, temperature, noise=noise[own].to(logits.device))
        return StepLosses(self.error(keep, rows) / tokens, keep.sum() / (tokens * top_k))

    @torch.no_grad()
    def logits(self, network: TopAnyNetwork) -> Tensor:
        """(T, k) float32, what the network says of all tokens."""
        return torch.cat(
            [network(self.hidden[rows], self.weights[rows]) for rows in self._chunks()]
        )

    @torch.no_grad()
    def final_error(self, logits: Tensor) -> float:
        """Error with the masks of the finished network, over all tokens."""
        return self._mean_error(keep_mask(logits, self.weights).float())

    def _chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.weights), CHUNK_TOKENS):
            yield slice(start, start + CHUNK_TOKENS)


def in_falling_order(routed: RoutedInputs) -> RoutedInputs:
    """The same with each token's slots in falling order of weight."""
    order = ranked(routed.top_k_weights)
    return replace(
        routed,
        top_k_index=routed.top_k_index.gather(1, order),
        top_k_weights=routed.top_k_weights.gather(1, order),
    )


def train_block(
    task: BlockTask, layer: int, settings: TopAnyRouter, state: Path
) -> tuple[TopAnyNetwork, dict[str, Any]]:
    """Train the network of one layer.

    Parameters
    ----------
    state : file in which a training that is under way is kept.

    Returns
    -------
    The network, its bias shifted to the target, and notes: the share of experts that it keeps, the
    error that this makes, and the curve.
    """
    hidden_size, top_k = task.hidden.shape[1], task.weights.shape[1]
    network = new_network(layer, hidden_size, top_k, settings, str(task.hidden.device))
    training = Training(
        settings, str(layer), {layer: network}, task.worst_error(), state, task.ranks
    )
    curve = training.run(
        lambda temperature, generator: task.step_losses(
            network, settings.batch_tokens, temperature, generator
        )
    )
    logits = task.logits(network)
    if settings.target_activation is not None:
        whole = [task.ranks.gather(logits)]
        apply_shift({layer: network}, shift_for(whole, settings.target_activation))
        logits = task.logits(network)
    notes = {
        "keep_ratio": keep_ratio([task.ranks.gather(logits)]),
        "error": task.final_error(logits),
        "curve": asdict(curve),
    }
    return network, notes
