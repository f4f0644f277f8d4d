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

from mcsharp_sdk.models.capture import RoutedInputs, routed_inputs
from mcsharp_sdk.models.stream import StreamedLayer
from mcsharp_sdk.modifiers.expert_outputs import slot_outputs, squared_norms_behind
from mcsharp_sdk.modifiers.top_any_target import apply_shift, keep_ratio, shift_for
from mcsharp_sdk.modifiers.top_any_training import (
    StepLosses,
    Training,
    new_network,
    noise_like,
    renormalised,
)
from mcsharp_sdk.pruning.rule import ranked
from mcsharp_sdk.pruning.top_any import TopAnyNetwork, keep_mask, soft_keep

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
    """

    hidden: Tensor
    weights: Tensor
    gram: Tensor
    norms: Tensor

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
        return cls(routed.hidden, weights, gram, squared_norms_behind(layer, summed))

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.weights)

    def error(self, keep: Tensor, rows: Tensor | slice) -> Tensor:
        """Mean over some tokens of the squared change of the block's output.

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
        return (squared / self.norms[rows].clamp_min(torch.finfo(torch.float32).tiny)).mean()

    def worst_error(self) -> float:
        """Error if every token kept its first expert alone."""
        keep = torch.zeros_like(self.weights)
        keep[:, 0] = 1.0
        return float(self.error(keep, slice(None)))

    def step_losses(
        self, network: TopAnyNetwork, tokens: int, temperature: float, generator: torch.Generator
    ) -> StepLosses:
        """Losses of one training step, on tokens drawn at random."""
        rows = torch.randint(self.num_tokens, (tokens,), generator=generator)
        rows = rows.to(self.hidden.device)
        logits = network(self.hidden[rows], self.weights[rows])
        keep = soft_keep(logits, temperature, noise=noise_like(logits, generator))
        return StepLosses(self.error(keep, rows), keep.mean())

    @torch.no_grad()
    def logits(self, network: TopAnyNetwork) -> Tensor:
        """(T, k) float32, what the network says of all tokens."""
        return torch.cat(
            [network(self.hidden[rows], self.weights[rows]) for rows in self._chunks()]
        )

    @torch.no_grad()
    def final_error(self, logits: Tensor) -> float:
        """Error with the masks of the finished network, over all tokens."""
        return float(self.error(keep_mask(logits, self.weights).float(), slice(None)))

    def _chunks(self) -> Iterator[slice]:
        for start in range(0, self.num_tokens, CHUNK_TOKENS):
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
    training = Training(settings, str(layer), {layer: network}, task.worst_error(), state)
    curve = training.run(
        lambda temperature, generator: task.step_losses(
            network, settings.batch_tokens, temperature, generator
        )
    )
    logits = task.logits(network)
    if settings.target_activation is not None:
        apply_shift({layer: network}, shift_for([logits], settings.target_activation))
        logits = task.logits(network)
    notes = {
        "keep_ratio": keep_ratio([logits]),
        "error": task.final_error(logits),
        "curve": asdict(curve),
    }
    return network, notes
