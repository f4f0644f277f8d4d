"""Mean curvature of each expert's matrices: HAWQ-V2's Tr(H)/n (arXiv 1911.03852).

``input_gram`` takes the Hessian of the matrix's own output error, 2·Σ x xᵀ for every row, over the
tokens that reach the expert. ``loss`` takes that of the model's loss, as its Fisher matrix: a
token with input x and gradient a at the matrix's output adds |a|²·|x|² to the trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from mcsharp_sdk.models.expert_weights import ExpertWeights
from mcsharp_sdk.models.experts import MATRICES, Matrix, activate, finish

HessianName = Literal["input_gram", "loss"]


def gram_curvature(tokens: Tensor, inner: Tensor, sampled: float) -> dict[Matrix, float]:
    """Tr(H)/n of each matrix with H of its inputs.

    Parameters
    ----------
    tokens : [n, hidden], what the expert gets.
    inner : [n, K], inputs of its down projection.
    sampled : tokens of the expert per token given.
    """
    inputs: Mapping[Matrix, Tensor] = {"gate_up": tokens, "down": inner}
    return {
        matrix: 2 * sampled * float(x.double().square().sum()) / x.shape[-1]
        for matrix, x in inputs.items()
    }


def loss_curvature(
    weights: ExpertWeights, expert: int, tokens: Tensor, gradients: Tensor, sampled: float
) -> dict[Matrix, float]:
    """Tr(H)/n of each matrix with H that of the loss.

    Parameters
    ----------
    tokens : [n, hidden], what the expert gets.
    gradients : [n, hidden], of the loss by what the expert returns: the gradient by the block's
        output times what the expert's output is multiplied by.
    sampled : tokens of the expert per token given.
    """
    experts = weights.module
    first, second = (weights.read(matrix, expert).detach().float() for matrix in MATRICES)
    with torch.enable_grad():
        pre = (tokens.float() @ first.T).requires_grad_()
        inner = activate(experts, pre, expert)
        output = inner @ second.T
        output.retain_grad()
        finish(experts, output, expert).backward(gradients.float())
    inputs: dict[Matrix, tuple[Tensor, Tensor | None]] = {
        "gate_up": (tokens, pre.grad),
        "down": (inner.detach(), output.grad),
    }
    found: dict[Matrix, float] = {}
    for matrix, (x, gradient) in inputs.items():
        rows = torch.zeros_like(x) if gradient is None else gradient
        trace = (rows.double().square().sum(-1) * x.double().square().sum(-1)).sum()
        found[matrix] = sampled * float(trace) / (rows.shape[-1] * x.shape[-1])
    return found
