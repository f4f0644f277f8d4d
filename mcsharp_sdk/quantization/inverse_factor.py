"""The factor of a Hessian's inverse that GPTQ walks along (arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the mean diagonal that GPTQ adds to the diagonal."""

DAMPING_RAISES = 3
"""How often the damping is multiplied by ten before an expert is given up."""

TRIANGLE_STEP = 256
"""Columns or rows that are multiplied by a triangular matrix at a time."""

ROWS_AT_A_TIME = 256
"""Rows of a factor that are checked or turned round at a time."""


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


def factorise(hessians: Tensor, *, damping: float | Sequence[float] = DAMPING) -> InverseFactor:
    """Factorise the inverses of damped Hessians: (H + λI)⁻¹ = Uᵀ U, λ = damping · mean diagonal.

    H = R Rᵀ with R upper triangular is the Cholesky factorisation of H read from its last row and
    column; U = R⁻¹. A column that no input excites (zero diagonal) counts as one of mean weight
    without correlations. An expert whose factorisation fails is tried again with ten times the
    damping, ``DAMPING_RAISES`` times; after that its factor is diagonal.

    Parameters
    ----------
    hessians : fp32 [E, K, K], symmetric; not changed. Besides them and the factor one more [K, K]
        is needed for a moment.
    damping : > 0, one for all or one for each.

    Returns
    -------
    InverseFactor with ``upper`` [E, K, K].

    Raises
    ------
    ValueError
        If a damping is not positive.
    """
    experts = len(hessians)
    wanted = [damping] * experts if isinstance(damping, float | int) else list(damping)
    if min(wanted, default=1.0) <= 0:
        raise ValueError(f"damping must be positive, got {min(wanted)}")
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    mean = _usable_mean(diagonal)
    used = list(wanted)
    upper, bad = _inverse_upper(hessians, _ridge(diagonal, mean, used))
    pending = [expert for expert in range(experts) if bad[expert]]
    for attempt in range(1, DAMPING_RAISES + 1):
        for expert in list(pending):
            one = slice(expert, expert + 1)
            used[expert] = wanted[expert] * 10**attempt
            ridge = _ridge(diagonal[one], mean[one], used[one])
            upper[one], (failed,) = _inverse_upper(hessians[one], ridge)
            if not failed:
                pending.remove(expert)
    for expert in pending:
        upper[expert] = torch.diag(_diagonal_only(diagonal[expert], mean[expert]))
    raised = tuple(e for e in range(experts) if used[e] > wanted[e] and e not in pending)
    return InverseFactor(upper, tuple(used), raised, tuple(pending))


def damped(hessians: Tensor, factor: InverseFactor, expert: int) -> Tensor:
    """H + λI of one expert as it was factorised, [K, K]; if it is in ``failed``, a diagonal."""
    one = slice(expert, expert + 1)
    diagonal = hessians[one].diagonal(dim1=-2, dim2=-1)
    mean = _usable_mean(diagonal)
    if expert in factor.failed:
        return torch.diag(_diagonal_only(diagonal[0], mean[0]) ** -2)
    found = hessians[expert].clone()
    found.diagonal().add_(_ridge(diagonal, mean, factor.damping[one])[0])
    return found


def _usable_mean(diagonal: Tensor) -> Tensor:
    """Mean of the diagonals, [E]; 1 where it cannot be used."""
    mean = diagonal.mean(-1)
    return torch.where(torch.isfinite(mean) & (mean > 0), mean, torch.ones_like(mean))


def _ridge(diagonal: Tensor, mean: Tensor, damping: Sequence[float]) -> Tensor:
    """What is added to the diagonals, [E, K]; the mean where no input excites a column."""
    share = torch.tensor(damping, dtype=mean.dtype, device=mean.device).unsqueeze(-1)
    return torch.where(diagonal <= 0, 1.0, share) * mean.unsqueeze(-1)


def _inverse_upper(hessians: Tensor, ridge: Tensor) -> tuple[Tensor, list[bool]]:
    """U of H + diag(ridge) per expert, and which of them failed."""
    upper = hessians.flip(-1, -2)
    upper.diagonal(dim1=-2, dim2=-1).add_(ridge.flip(-1))
    info = torch.zeros(len(upper), dtype=torch.int32, device=upper.device)
    for index in range(len(upper)):
        # One by one and in place, so that there is one copy at a time, LAPACK's own.
        torch.linalg.cholesky_ex(upper[index], out=(upper[index], info[index]))
    _turn_round(upper)
    _invert_upper(upper)
    return upper, [bool(i) or not _is_finite(one) for i, one in zip(info, upper, strict=True)]


def _turn_round(matrices: Tensor) -> None:
    """Flip rows and columns of [E, K, K], in place."""
    size = matrices.shape[-1]
    for start in range(0, size // 2, ROWS_AT_A_TIME):
        stop = min(start + ROWS_AT_A_TIME, size // 2)
        above, below = matrices[:, start:stop], matrices[:, size - stop : size - start]
        flipped = above.flip(-1, -2)
        above.copy_(below.flip(-1, -2))
        below.copy_(flipped)
    if size % 2:
        middle = matrices[:, size // 2]
        middle.copy_(middle.flip(-1))


def _is_finite(matrix: Tensor) -> bool:
    return all(bool(torch.isfinite(rows).all()) for rows in matrix.split(ROWS_AT_A_TIME))


def _invert_upper(upper: Tensor, leaf: int = 128) -> None:
    """Invert upper triangular matrices in place by halving, so that most of it is matmuls.

    The corner of [[A, C], [0, B]] becomes −A⁻¹ C B⁻¹, some columns and then some rows at a time:
    those that triangular factors have zeros for are left out.
    """
    size = upper.shape[-1]
    if size <= leaf:
        eye = torch.eye(size, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True))
        return
    half = size // 2
    first, second = upper[..., :half, :half], upper[..., half:, half:]
    _invert_upper(first, leaf)
    _invert_upper(second, leaf)
    corner = upper[..., :half, half:]
    for stop in range(size - half, 0, -TRIANGLE_STEP):
        part = slice(max(0, stop - TRIANGLE_STEP), stop)
        corner[..., part] = (corner[..., :stop] @ second[..., :stop, part]).neg_()
    for start in range(0, half, TRIANGLE_STEP):
        part = slice(start, start + TRIANGLE_STEP)
        corner[..., part, :] = first[..., part, start:] @ corner[..., start:, :]


def _diagonal_only(diagonal: Tensor, mean: Tensor) -> Tensor:
    usable = torch.isfinite(diagonal) & (diagonal > 0)
    return torch.where(usable, diagonal, mean).rsqrt()
