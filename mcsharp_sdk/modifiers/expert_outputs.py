"""What each of a token's experts makes of it, one by one: for judging what dropping them does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mcsharp_sdk.models.bfloat16 import fast_linears
from mcsharp_sdk.models.capture import RoutedInputs
from mcsharp_sdk.models.experts import answering
from mcsharp_sdk.models.stream import StreamedLayer, in_turn

CHUNK_BYTES = 128 * 2**20
"""Float32 outputs of all experts of some tokens that are held at a time."""


@torch.no_grad()
def slot_outputs(experts: Any, routed: RoutedInputs) -> Iterator[tuple[slice, Tensor]]:
    """Outputs of every slot's expert, without its routing weight.

    Parameters
    ----------
    experts : the module of a layer's fused experts, loaded.
    routed : what reaches them.

    Yields
    ------
    slice, Tensor
        Some of the T tokens, and their experts' outputs [t, k, hidden], float32, in the order of
        ``routed.top_k_index``.
    """
    slots = routed.top_k_index.shape[1]
    size = max(1, CHUNK_BYTES // (4 * slots * routed.hidden.shape[1]))
    for start in range(0, routed.num_tokens, size):
        rows = slice(start, min(start + size, routed.num_tokens))
        hidden, index = routed.hidden[rows], routed.top_k_index[rows]
        alone = torch.ones(len(hidden), 1, device=hidden.device)
        with fast_linears():
            outputs = [experts(hidden, index[:, [slot]], alone).float() for slot in range(slots)]
        yield rows, torch.stack(outputs, dim=1)


@torch.no_grad()
def change_of_output(experts: Any, routed: RoutedInputs, weights: Tensor) -> float:
    """Σ over tokens of the squared norm of what other routing weights change at the output.

    Parameters
    ----------
    weights : (T, k) in place of ``routed.top_k_weights``.
    """
    change = weights.float() - routed.top_k_weights.float()
    concerned = change.any(dim=1).nonzero().squeeze(1)
    total = 0.0
    size = max(1, CHUNK_BYTES // (4 * routed.hidden.shape[1]))
    for rows in concerned.split(size):
        # Outputs are linear in the routing weights, so their change comes from the weights' change.
        with fast_linears():
            output = experts(routed.hidden[rows], routed.top_k_index[rows], change[rows])
        total += float(output.double().square().sum())
    return total


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
    with answering(layer.module.get_submodule(layer.moe.experts), in_turn(outputs)):
        for batch in inputs.batches():
            yield inputs.call(layer.module, layer.index, batch)
