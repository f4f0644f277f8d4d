"""Hessians of experts from the tokens that are routed to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.experts import Matrix
from mcsharp_sdk.modifiers.layer_notes import LayerNotes
from mcsharp_sdk.quantization.hessian import accumulate, complete_


def expert_hessians(
    runs: ExpertRuns,
    matrix: Matrix,
    chunk: Sequence[int],
    notes: LayerNotes,
    *,
    routing_weighted: bool = False,
    most: int | None = None,
) -> tuple[Tensor, list[float]]:
    """Hessians of one matrix of some experts, [n, K, K], and of how many tokens each is.

    They are of the tokens routed to each. Experts with few are completed by tokens of the whole
    layer, and noted. Tokens that are weighed by their routing weight squared, v, count as
    (Σ v)²/Σ v² (Kish's effective sample size), and those that complete them get the expert's mean
    v. Of many tokens at least ``most`` are taken, and never so few that they need completion.
    """
    _, columns = runs.weights.shape(matrix)
    most = None if most is None else max(most, columns)
    hessians = torch.zeros(len(chunk), columns, columns, device=runs.routed.hidden.device)
    shared: Tensor | None = None
    counts = []
    for hessian, expert in zip(hessians, chunk, strict=True):
        tokens, weights, squares = 0, 0.0, 0.0
        for piece in runs.pieces(expert, matrix, most):
            routing = piece.routing if routing_weighted else None
            accumulate(hessian, piece.inputs, routing)
            tokens += len(piece.token)
            if routing is not None:
                weights += float(routing.double().square().sum())
                squares += float(routing.double().pow(4).sum())
        weighed = squares > 0
        counted = weights**2 / squares if weighed else tokens
        counts.append(max(float(counted), float(columns)))
        if counted < columns:
            notes.starved[str(expert)] = tokens
            if shared is None or matrix == "down":
                shared = None  # the old one goes before the new one is made
                shared = _mean_hessian(runs, matrix, expert)
            # What completes it gets the expert's mean weight.
            complete_(hessian, counted, shared, tokens / weights if weighed else 1)
    return hessians, counts


def _mean_hessian(runs: ExpertRuns, matrix: Matrix, expert: int) -> Tensor:
    """Hessian of one matrix of an expert per token, [K, K], over tokens of the whole layer.

    For gate and up it is the same for all experts.
    """
    inputs = runs.inputs_from_all_tokens(expert, matrix)
    columns = inputs.shape[-1]
    hessian = torch.zeros(columns, columns, device=inputs.device)
    accumulate(hessian, inputs)
    return hessian.div_(len(inputs))
