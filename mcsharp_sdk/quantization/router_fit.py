"""Fit a router to what another router decides on other inputs.

After quantisation a router sees inputs that differ from those it was trained on, and picks other
experts. Its weight W is fitted so that its scores on the inputs x_t that it now gets are those that
the original router gave on the original ones:

    mean_t D(target_t ‖ scores of (W x_t + bias)) + ridge · m · ‖W − W₀‖²

D is the Kullback-Leibler divergence: of the probabilities over all experts where scores are a
softmax, summed over the experts' own yes-or-no probabilities where they are sigmoids. m is the mean
square of an input's element. Each term is convex in W, so there is one optimum; it is found by
L-BFGS in coordinates in which the inputs are uncorrelated. Matching routers after quantisation is
from EAC-MoE (arXiv 2508.01625); this loss and the ridge are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Scoring = Literal["softmax", "sigmoid"]

WHITENING = 1e-3
"""Share of the mean square added to the inputs' second moments before they are factorised."""

HISTORY = 20
"""Steps that L-BFGS remembers: few experts have few parameters worth remembering."""


def fit_router(
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    target: Tensor,
    scoring: Scoring,
    *,
    ridge: float,
    steps: int,
) -> Tensor:
    """The fitted weight.

    Parameters
    ----------
    weight : [E, K], W₀, any float dtype; not changed.
    bias : [E], added to the logits, or None.
    inputs : [T, K], x_t, any float dtype.
    target : [T, E], logits of the original router on the original inputs.
    scoring : what makes scores of logits.
    ridge : > 0, price of changing the weight.
    steps : most steps of L-BFGS; it stops before when it has converged.

    Returns
    -------
    fp32 [E, K].

    Raises
    ------
    ValueError
        If there are no tokens, shapes do not agree, or ``ridge`` is not positive.
    """
    _check(weight, inputs, target, ridge)
    start, rows, wanted = weight.float(), inputs.float(), target.float()
    moments = (rows.T @ rows).double() / len(rows)
    mean_square = float(moments.diagonal().mean()) or 1.0
    coordinates = _whitener(moments, mean_square).float()
    change = torch.zeros_like(start, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [change],
        max_iter=steps,
        history_size=HISTORY,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        moved = change @ coordinates
        logits = F.linear(rows, start + moved, None if bias is None else bias.float())
        value = divergence(wanted, logits, scoring) + ridge * mean_square * moved.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return start + change.detach() @ coordinates


def divergence(target: Tensor, logits: Tensor, scoring: Scoring) -> Tensor:
    """Mean over tokens of D(target ‖ fitted), in nats.

    Parameters
    ----------
    target, logits : [T, E], both before the scoring.
    """
    return _DIVERGENCES[scoring](target, logits)


def _softmax_divergence(target: Tensor, logits: Tensor) -> Tensor:
    known, fitted = F.log_softmax(target, dim=-1), F.log_softmax(logits, dim=-1)
    return F.kl_div(fitted, known, reduction="batchmean", log_target=True)


def _sigmoid_divergence(target: Tensor, logits: Tensor) -> Tensor:
    # softplus(-z) = -log sigmoid(z); of the other outcome, softplus(z).
    chance = torch.sigmoid(target)
    yes = chance * (F.softplus(-logits) - F.softplus(-target))
    no = (1 - chance) * (F.softplus(logits) - F.softplus(target))
    return (yes + no).sum(-1).mean()


_DIVERGENCES: Mapping[Scoring, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": _softmax_divergence,
    "sigmoid": _sigmoid_divergence,
}


def _whitener(moments: Tensor, mean_square: float) -> Tensor:
    """P, [K, K], such that P x has second moments near the identity."""
    damped = moments.clone()
    damped.diagonal().add_(WHITENING * mean_square)
    lower = torch.linalg.cholesky(damped)
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False)


def _check(weight: Tensor, inputs: Tensor, target: Tensor, ridge: float) -> None:
    experts, columns = weight.shape
    if not len(inputs):
        raise ValueError("a router cannot be fitted without tokens")
    if inputs.shape != (len(inputs), columns) or target.shape != (len(inputs), experts):
        raise ValueError(
            f"a router of [{experts}, {columns}] needs inputs [T, {columns}] and targets "
            f"[T, {experts}], got {list(inputs.shape)} and {list(target.shape)}"
        )
    if ridge <= 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
