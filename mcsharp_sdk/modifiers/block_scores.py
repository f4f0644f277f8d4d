"""How much a decoder layer changes what goes through it: what block score allocators rank by.

The score of MoE quantisation benchmarks (Li et al., arXiv 2406.08155): the cosine between what
enters and what leaves a block, which a predictor tells from the input alone. Here a block is a
whole decoder layer, and the predictor a linear map of the hidden state, fitted by least squares
with a ridge on one half of the tokens and asked about the other; both are our choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mcsharp_sdk.models.evenly_spaced import evenly_spaced
from mcsharp_sdk.models.streamed_layer import StreamedLayer
from mcsharp_sdk.modifiers.expert_outputs import states_behind

FITTED_TOKENS = 1024
"""Tokens that the predictor is fitted on, and at most as many that it is asked about."""

RIDGE = 0.1
"""Share of the mean square of the inputs that is added in fitting the predictor."""


@torch.no_grad()
def block_cosines(layer: StreamedLayer, outputs: Tensor) -> tuple[float, float]:
    """Mean cosine between a layer's inputs and outputs, true and predicted.

    Parameters
    ----------
    outputs : (T, hidden), the summed outputs of the layer's routed experts.
    """
    states = zip(layer.inputs.hidden, states_behind(layer, outputs), strict=True)
    cosines = torch.cat(
        [
            F.cosine_similarity(before.float(), after.float(), dim=-1).flatten()
            for before, after in states
        ]
    )
    return float(cosines.double().mean()), _predicted(layer.inputs.hidden, cosines)


def _predicted(inputs: Sequence[Tensor], cosines: Tensor) -> float:
    """Mean of what a predictor that was fitted on the first half says of the second.

    Parameters
    ----------
    inputs : per batch (sequences, length, hidden).
    cosines : (T,) of their tokens.
    """
    half = len(cosines) // 2
    if not half:
        return float(cosines.double().mean())
    known = evenly_spaced(half, FITTED_TOKENS)
    asked = half + evenly_spaced(len(cosines) - half, min(half, FITTED_TOKENS))
    rows, values = _rows(inputs, known), cosines[known].double()
    centre, mean = rows.mean(0), values.mean()
    rows -= centre
    # Fewer tokens than hidden elements, often: solved in the space of the tokens.
    gram = rows @ rows.T
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) or 1.0)
    weight = rows.T @ torch.linalg.solve(gram, values - mean)
    return float(mean + ((_rows(inputs, asked) - centre) @ weight).mean())


def _rows(inputs: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """[n, hidden] float64, hidden states of some tokens, given in ascending order."""
    found, start = [], 0
    for batch in inputs:
        rows = batch.flatten(0, 1)
        own = chosen[(chosen >= start) & (chosen < start + len(rows))] - start
        found.append(rows[own].double())
        start += len(rows)
    return torch.cat(found)
