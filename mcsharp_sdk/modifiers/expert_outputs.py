"""What each of a token's experts makes of it, one by one: for judging what dropping them does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mcsharp_sdk.models.expert_runs import PIECE_TOKENS
from mcsharp_sdk.models.expert_weights import ExpertWeights
from mcsharp_sdk.models.experts import answering, tokens_of_expert
from mcsharp_sdk.models.routed_inputs import RoutedInputs
from mcsharp_sdk.models.scratch import Scratch
from mcsharp_sdk.models.streamed_layer import StreamedLayer, in_turn

CHUNK_BYTES = 2**30
"""Outputs of all experts of some tokens that are held in memory at a time."""


@torch.no_grad()
def slot_outputs(
    weights: ExpertWeights, routed: RoutedInputs, scratch: Scratch
) -> Iterator[tuple[slice, Tensor]]:
    """Outputs of every slot's expert, without its routing weight.

    Each expert is asked for once per chunk of tokens: where outputs lie on disk there is one.

    Parameters
    ----------
    weights : of the layer's experts.
    routed : what reaches them.
    scratch : where outputs are kept.

    Yields
    ------
    slice, Tensor
        Some of the T tokens, and their experts' outputs [t, k, hidden], in the order of
        ``routed.top_k_index``.
    """
    slots, hidden = routed.top_k_index.shape[1], routed.hidden.shape[1]
    size = max(1, CHUNK_BYTES // (routed.hidden.element_size() * slots * hidden))
    size = routed.num_tokens if scratch.spills else size
    for start in range(0, routed.num_tokens, size):
        rows = slice(start, min(start + size, routed.num_tokens))
        count = rows.stop - rows.start
        outputs = scratch.empty(count, slots, hidden, dtype=routed.hidden.dtype)
        for expert in range(weights.num_experts):
            token, slot = tokens_of_expert(routed.top_k_index[rows], expert)
            parts = zip(token.split(PIECE_TOKENS), slot.split(PIECE_TOKENS), strict=True)
            for some, at in parts:
                inner = weights.activated(expert, routed.hidden[rows][some])
                outputs[some, at] = weights.finished(expert, inner).to(outputs.dtype)
                scratch.release()
            weights.release(expert)
        for first in range(0, count, PIECE_TOKENS):
            last = min(first + PIECE_TOKENS, count)
            yield slice(start + first, start + last), outputs[first:last]
            scratch.release()


@torch.no_grad()
def change_of_output(
    weights: ExpertWeights, routed: RoutedInputs, routing: Tensor, scratch: Scratch
) -> float:
    """Σ over tokens of the squared norm of what other routing weights change at the output.

    Parameters
    ----------
    weights : of the layer's experts.
    routing : (T, k) in place of ``routed.top_k_weights``.
    scratch : where outputs are kept.
    """
    change = routing.float() - routed.top_k_weights.float()
    concerned = change.any(dim=1).nonzero().squeeze(1)
    columns, dtype = routed.hidden.shape[1], routed.hidden.dtype
    changed = scratch.zeros(len(concerned), columns, dtype=dtype)
    for expert in range(weights.num_experts):
        # Outputs are linear in the routing weights, so their change comes from the weights' change.
        token, slot = tokens_of_expert(routed.top_k_index[concerned], expert)
        for some, at in zip(token.split(PIECE_TOKENS), slot.split(PIECE_TOKENS), strict=True):
            rows = concerned[some]
            output = weights.finished(expert, weights.activated(expert, routed.hidden[rows]))
            part = output * change[rows, at].unsqueeze(-1)
            changed.index_add_(0, some, part.to(dtype))
            scratch.release()
        weights.release(expert)
    return sum(float(part.double().square().sum()) for part in changed.split(PIECE_TOKENS))


@torch.no_grad()
def squared_norms_behind(layer: StreamedLayer, outputs: Tensor) -> Tensor:
    """(T,) float32, squared norms of the hidden states behind a layer.

    Parameters
    ----------
    outputs : (T, hidden), the summed outputs of its routed experts.
    """
    states = states_behind(layer, outputs)
    return torch.cat([state.float().square().sum(-1).flatten() for state in states])


@torch.no_grad()
def states_behind(layer: StreamedLayer, outputs: Tensor) -> Iterator[Tensor]:
    """Hidden states behind a layer, (sequences, length, hidden) of one batch after the other.

    Parameters
    ----------
    outputs : (T, hidden), the summed outputs of its routed experts.
    """
    inputs = layer.inputs
    with answering(layer.experts_module, in_turn(outputs)):
        for batch in inputs.batches():
            yield inputs.call(layer.module, layer.index, batch)
