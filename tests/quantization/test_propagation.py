"""Weights that make up for the errors of their inputs, against least squares in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcsharp_sdk.quantization import factorise
from mcsharp_sdk.quantization.hessian import accumulate
from mcsharp_sdk.quantization.inverse_factor import damped
from mcsharp_sdk.quantization.propagation import accumulate_cross, make_up

DAMPING = 0.03


def inputs(tokens: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Correlated original inputs, and those with an error that depends on them, [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    original = torch.randn(tokens, columns, generator=generator) @ mix
    noise = torch.randn(tokens, columns, generator=generator)
    return original, 0.8 * original + 0.3 * noise


def moments(original: Tensor, found: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hessian and cross-Gram matrix, [1, K, K]."""
    hessian = torch.zeros(found.shape[1], found.shape[1])
    cross = torch.zeros_like(hessian)
    for part in (slice(0, 100), slice(100, None)):
        sigma = None if weight is None else weight[part]
        accumulate(hessian, found[part], sigma)
        accumulate_cross(cross, original[part], found[part], sigma)
    return hessian.unsqueeze(0), cross.unsqueeze(0)


@pytest.mark.parametrize("rows", [7, 90])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_whole_share_is_the_ridge_regression_on_the_original_outputs(
    rows: int, weighted: bool
) -> None:
    tokens, columns = 2300, 40
    original, found = inputs(tokens, columns, seed=0)
    generator = torch.Generator().manual_seed(1)
    sigma = torch.rand(tokens, generator=generator) if weighted else None
    weight = torch.randn(rows, columns, generator=generator)
    hessian, cross = moments(original, found, sigma)
    factor = factorise(hessian, damping=DAMPING)
    made = make_up(weight.unsqueeze(0), cross, factor, 1.0)[0]

    # min ‖(W X − V X̂) σ‖² + λ/2 ‖W − V‖² as plain least squares on stacked rows.
    scale = torch.ones(tokens).double() if sigma is None else sigma.double()
    ridge = (damped(hessian, factor, 0) - hessian[0]).diagonal().double() / 2
    x, y = found.double() * scale[:, None], original.double() * scale[:, None]
    left = torch.cat([x, ridge.sqrt().diag()])
    right = torch.cat([y @ weight.double().T, ridge.sqrt().diag() @ weight.double().T])
    expected = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_share_lies_on_the_way_and_lowers_the_error_of_the_outputs() -> None:
    original, found = inputs(900, 30, seed=2)
    weight = torch.randn(1, 20, 30, generator=torch.Generator().manual_seed(3))
    hessian, cross = moments(original, found, None)
    factor = factorise(hessian, damping=DAMPING)
    half, whole = (make_up(weight, cross, factor, share) for share in (0.5, 1.0))
    torch.testing.assert_close(half, (weight + whole) / 2, rtol=1e-4, atol=1e-5)
    errors = [
        float((original @ weight[0].T - found @ w[0].T).norm()) for w in (weight, half, whole)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_matrices_whose_hessian_could_not_be_factorised_stay_as_they_are() -> None:
    original, found = inputs(100, 12, seed=4)
    weight = torch.randn(2, 5, 12)
    hessian, cross = moments(original, found, None)
    broken = torch.cat([hessian, torch.full_like(hessian, torch.nan)])
    factor = factorise(broken)
    assert factor.failed == (1,)
    made = make_up(weight, cross.expand(2, -1, -1), factor, 1.0)
    assert torch.equal(made[1], weight[1])
    assert not torch.equal(made[0], weight[0])
