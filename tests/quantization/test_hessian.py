"""Hessians and the factors of their inverses, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mcsharp_sdk.quantization import (
    accumulate,
    complete_,
    diagonal_importance,
    factorise,
    squared_output_error,
)
from mcsharp_sdk.quantization.inverse_factor import damped


def random_hessians(experts: int, columns: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(experts, tokens, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) * 0.3 + torch.eye(columns)
    inputs = inputs @ mix
    return 2 * inputs.transpose(1, 2) @ inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulated_hessian_is_the_sum_over_tokens(dtype: torch.dtype, weighted: bool) -> None:
    inputs = torch.randn(3000, 24).to(dtype)
    sigma = torch.rand(3000) if weighted else None
    hessian = torch.zeros(24, 24)
    for chunk in (slice(0, 700), slice(700, 3000)):
        accumulate(hessian, inputs[chunk], None if sigma is None else sigma[chunk])
    exact = inputs.double() * (1 if sigma is None else sigma.double().unsqueeze(-1))
    expected = 2 * exact.T @ exact
    assert torch.linalg.norm(hessian - expected) <= 1e-6 * torch.linalg.norm(expected)
    assert torch.equal(hessian, hessian.T)


@pytest.mark.parametrize("columns", [5, 128, 300])
def test_factor_of_the_inverse_is_exact_and_upper_triangular(columns: int) -> None:
    hessians = random_hessians(3, columns, 2 * columns)
    before = hessians.clone()
    factor = factorise(hessians, damping=0.01)
    assert torch.equal(hessians, before)
    wanted = hessians.double().numpy()
    mean = np.diagonal(wanted, axis1=1, axis2=2).mean(-1)
    wanted = wanted + 0.01 * mean[:, None, None] * np.eye(columns)
    lower = np.linalg.cholesky(np.linalg.inv(wanted))
    expected = torch.from_numpy(lower).transpose(1, 2)
    torch.testing.assert_close(factor.upper.double(), expected, rtol=1e-3, atol=1e-5)
    assert factor.damping == (0.01, 0.01, 0.01)
    assert factor.raised == ()
    assert factor.failed == ()


def test_each_matrix_may_have_its_own_damping() -> None:
    hessians, dampings = random_hessians(3, 20, 40), (0.01, 0.3, 2.0)
    factor = factorise(hessians, damping=dampings)
    assert factor.damping == dampings
    for index, damping in enumerate(dampings):
        alone = factorise(hessians[index : index + 1], damping=damping)
        assert torch.equal(factor.upper[index], alone.upper[0])
        diagonal = torch.diag(damped(hessians, factor, index) - hessians[index])
        mean = hessians[index].diagonal().mean()
        torch.testing.assert_close(diagonal, (damping * mean).expand(20), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damping", [0, [0.01, -0.5]])
def test_damping_must_be_positive(damping: float | list[float]) -> None:
    with pytest.raises(ValueError, match=r"must be positive, got (0|-0\.5)$"):
        factorise(random_hessians(2, 20, 40), damping=damping)


def test_indefinite_hessian_gets_more_damping_and_is_named() -> None:
    hessians = random_hessians(3, 16, 64)
    vector = torch.linalg.eigh(hessians[1]).eigenvectors[:, :1]
    mean = hessians[1].diagonal().mean()
    hessians[1] -= vector @ vector.T * (vector.T @ hessians[1] @ vector + 0.05 * mean)
    factor = factorise(hessians, damping=0.01)
    assert factor.raised == (1,)
    assert factor.failed == ()
    assert factor.damping == pytest.approx((0.01, 0.1, 0.01))
    assert torch.isfinite(factor.upper).all()


def test_hopeless_hessian_falls_back_to_its_diagonal_and_is_named() -> None:
    hessians = random_hessians(3, 16, 64)
    hessians[0] -= 1e3 * hessians[0].diagonal().max() * torch.ones(16, 16).fill_diagonal_(0)
    hessians[2, 3, 4] = hessians[2, 4, 3] = float("nan")
    factor = factorise(hessians)
    assert factor.failed == (0, 2)
    assert factor.raised == ()
    off_diagonal = factor.upper[0] - torch.diag(factor.upper[0].diagonal())
    assert not off_diagonal.any()
    torch.testing.assert_close(factor.upper[2].diagonal(), hessians[2].diagonal().rsqrt())


def test_columns_without_input_are_uncorrelated() -> None:
    hessians = random_hessians(1, 12, 40)
    hessians[:, 5] = 0
    hessians[:, :, 5] = 0
    factor = factorise(hessians)
    row = factor.upper[0, 5].clone()
    assert row[5] > 0
    row[5] = 0
    assert not row.any()
    assert not factor.failed
    assert not factorise(torch.zeros(1, 4, 4)).failed


def test_experts_with_few_tokens_are_completed_from_all_tokens() -> None:
    many, few = random_hessians(2, 8, 100)
    overall, none = random_hessians(1, 8, 400, seed=1)[0], torch.zeros(8, 8)
    torch.testing.assert_close(complete_(few.clone(), 6, overall, 400), few + 2 / 400 * overall)
    torch.testing.assert_close(complete_(none.clone(), 0, overall, 400), 8 / 400 * overall)
    for enough in (8, 100):
        assert torch.equal(complete_(many.clone(), enough, overall, 400), many)
    with pytest.raises(ValueError, match="at least one token"):
        complete_(none, 0, overall, 0)


def test_importance_is_the_diagonal() -> None:
    hessians = random_hessians(2, 6, 10)
    assert torch.equal(diagonal_importance(hessians)[1], hessians[1].diagonal())


def test_squared_output_errors_are_those_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs, weight, change = (
        torch.randn(shape, generator=generator) for shape in ((50, 12), (7, 12), (7, 12))
    )
    hessian = torch.zeros(12, 12)
    accumulate(hessian, inputs)
    found = squared_output_error(weight, weight + 0.1 * change, hessian)
    true = [float((m.double() @ inputs.double().T).square().sum()) for m in (0.1 * change, weight)]
    factor = float(hessian.trace()) / float(inputs.square().sum())
    assert found == pytest.approx([factor * square for square in true], rel=1e-4)
    assert squared_output_error(weight, weight, hessian)[0] == 0


def test_squared_output_errors_of_a_hessian_with_nan_are_not_known() -> None:
    hessian = random_hessians(1, 6, 20)[0]
    hessian[2, 3] = float("nan")
    found = squared_output_error(torch.ones(2, 6), torch.zeros(2, 6), hessian)
    assert all(math.isnan(square) for square in found)
    # One with a negative eigenvalue stays below by rounding at most: squares are not negative.
    assert squared_output_error(torch.ones(1, 2), torch.zeros(1, 2), -torch.eye(2)) == (0.0, 0.0)
