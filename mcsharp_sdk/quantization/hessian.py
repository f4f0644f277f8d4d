"""Hessians of the layer-wise error, and the factor of their inverse that GPTQ walks along.

For a linear layer with inputs x_t the squared output error of a change ΔW is tr(ΔW H ΔWᵀ)/2 with
H = 2 Σ_t x_t x_tᵀ (GPTQ, arXiv 2210.17323, Eq. 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal."""

DAMPING_RAISES = 3
"""How often the damping is multiplied by ten before an expert is given up."""


@dataclass(frozen=True)
class InverseFactor:
    """Upper factors U with (H + λI)⁻¹ = Uᵀ U, and what it took to get them.

    Attributes
    ----------
    upper : fp32 [E, K, K], upper triangular, positive diagonal. For an expert in ``failed`` it is
        diagonal, with which GPTQ becomes round-to-nearest.
    damping : the damping that each expert was factorised with, length E.
    raised : experts that needed more than the damping asked for.
    failed : experts that no damping helped.
    """

    upper: Tensor
    damping: tuple[float, ...]
    raised: tuple[int, ...]
    failed: tuple[int, ...]


def accumulate(hessian: Tensor, inputs: Tensor, weight: Tensor | None = None) -> None:
    """Add 2 Σ_t σ_t² x_t x_tᵀ to a Hessian, in place.

    Parameters
    ----------
    hessian : fp32 [K, K]
    inputs : [T, K], any float dtype; products and sums are fp32.
    weight : [T], σ_t, e.g. the routing weights; ones if left out.
    """
    inputs = inputs.to(hessian.dtype)
    if weight is not None:
        inputs = inputs * weight.to(hessian.dtype).unsqueeze(-1)
    hessian.addmm_(inputs.T, inputs, alpha=2.0)


def shrink(
    hessians: Tensor,
    tokens: Sequence[int],
    overall: Tensor,
    overall_tokens: int,
    *,
    enough: int | None = None,
) -> Tensor:
    """Complete the Hessians of experts with few tokens by that of all tokens of the layer.

    An expert with n < ``enough`` tokens gets ``enough − n`` tokens' worth of the mean Hessian of all
    tokens; one without tokens gets only that. Our choice; the papers do not treat the case.

    Parameters
    ----------
    hessians : fp32 [E, K, K], sums over each expert's tokens.
    tokens : number of tokens in each, length E.
    overall : fp32 [K, K], sum over all tokens.
    overall_tokens : number of tokens in it, > 0.
    enough : tokens that need no completion; K if left out.

    Returns
    -------
    fp32 [E, K, K]; ``hessians`` itself where nothing was to do.
    """
    if overall_tokens <= 0:
        raise ValueError("the overall Hessian needs at least one token")
    enough = hessians.shape[-1] if enough is None else enough
    missing = hessians.new_tensor([max(enough - count, 0) / overall_tokens for count in tokens])
    if not missing.any():
        return hessians
    return hessians + missing.view(-1, 1, 1) * overall


def diagonal_importance(hessians: Tensor) -> Tensor:
    """Weight of each column in a column-wise error: the diagonal of H, [E, K]."""
    return hessians.diagonal(dim1=-2, dim2=-1).clone()


def factorise(hessians: Tensor, *, damping: float = DAMPING) -> InverseFactor:
    """Factorise the inverses of damped Hessians: (H + λI)⁻¹ = Uᵀ U, λ = damping · mean diagonal.

    H = R Rᵀ with R upper triangular is the Cholesky factorisation of H read from its last row and
    column; U = R⁻¹. A column that no input excites (zero diagonal) counts as one of mean weight
    without correlations. An expert whose factorisation fails is tried again with ten times the
    damping, ``DAMPING_RAISES`` times; after that its factor is diagonal.

    Parameters
    ----------
    hessians : fp32 [E, K, K], symmetric; not changed.
    damping : > 0

    Returns
    -------
    InverseFactor with ``upper`` [E, K, K].
    """
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    mean = torch.where(torch.isfinite(mean) & (mean > 0), mean, torch.ones_like(mean))
    dead = diagonal <= 0
    upper = torch.empty_like(hessians)
    used = [damping] * len(hessians)
    pending = list(range(len(hessians)))
    for attempt in range(DAMPING_RAISES + 1):
        strength = damping * 10**attempt
        ridge = torch.where(dead[pending], 1.0, strength) * mean[pending, None]
        factor, bad = _inverse_upper(hessians[pending], ridge)
        for position, expert in enumerate(pending):
            used[expert] = strength
            if not bad[position]:
                upper[expert] = factor[position]
        pending = [expert for position, expert in enumerate(pending) if bad[position]]
        if not pending:
            break
    for expert in pending:
        upper[expert] = torch.diag(_diagonal_only(diagonal[expert], mean[expert]))
    raised = tuple(e for e, strength in enumerate(used) if strength > damping and e not in pending)
    return InverseFactor(upper, tuple(used), raised, tuple(pending))


def _inverse_upper(hessians: Tensor, ridge: Tensor) -> tuple[Tensor, list[bool]]:
    """U of H + diag(ridge) per expert, and which of them failed. ``hessians`` is overwritten."""
    hessians.diagonal(dim1=-2, dim2=-1).add_(ridge)
    lower, info = torch.linalg.cholesky_ex(hessians.flip(-1, -2))
    upper = _invert_upper(lower.flip(-1, -2))
    finite = torch.isfinite(upper).flatten(1).all(-1)
    return upper, [bool(i) or not bool(ok) for i, ok in zip(info, finite, strict=True)]


def _invert_upper(upper: Tensor, leaf: int = 128) -> Tensor:
    """Inverse of upper triangular matrices by halving, so that most of the work is matmuls."""
    size = upper.shape[-1]
    if size <= leaf:
        eye = torch.eye(size, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)
    half = size // 2
    out = torch.zeros_like(upper)
    first = _invert_upper(upper[..., :half, :half], leaf)
    second = _invert_upper(upper[..., half:, half:], leaf)
    out[..., :half, :half] = first
    out[..., half:, half:] = second
    out[..., :half, half:] = first @ (upper[..., :half, half:] @ second).neg_()
    return out


def _diagonal_only(diagonal: Tensor, mean: Tensor) -> Tensor:
    usable = torch.isfinite(diagonal) & (diagonal > 0)
    return torch.where(usable, diagonal, mean).rsqrt()
