"""The compiled half-quadratic search against the same in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcsharp_sdk.kernels import threads
from mcsharp_sdk.kernels.support import missing_support
from mcsharp_sdk.quantization.hqq import (
    LEAST_ERROR,
    NORM,
    PRICE,
    PRICE_GROWTH,
    SMALLEST_SCALE,
    TURNS,
    search_by_torch,
)

pytestmark = pytest.mark.skipif(bool(missing_support()), reason=missing_support())

PRICES = [PRICE * PRICE_GROWTH**turn for turn in range(TURNS)]
LIMITS = (LEAST_ERROR, SMALLEST_SCALE)


def compiled(weights: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    from mcsharp_sdk.kernels.half_quadratic import fit_zero_points

    return fit_zero_points(weights, top, NORM, LIMITS, PRICES)


def norms(weights: torch.Tensor, top: int, grid: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Of the errors of each row, [n, R]."""
    scale, zero = (part.double().unsqueeze(1) for part in grid)
    codes = (weights.double() / scale + zero).round().clamp(0, top)
    return (weights - (codes - zero) * scale).abs().clamp_min(LEAST_ERROR).pow(NORM).mean(1)


@settings(deadline=None)  # the first call compiles
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 150)),
    top=st.sampled_from([1, 3, 7, 15, 255]),
    scale=st.sampled_from([0.0, 1e-30, 1e-5, 0.02, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_grids_are_as_good_as_those_found_in_float64(
    shape: tuple[int, int, int], top: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=generator) * scale
    ours = norms(weights, top, compiled(weights, top))
    exact = norms(weights, top, search_by_torch(weights.double(), top))
    # Where a weight lies between two levels, another turn may come out best, and go on from there.
    rounding = (2e-6 * scale) ** NORM  # what fp32 leaves of errors that are none
    assert (ours <= exact * 1.0001 + rounding).float().mean() >= 0.9
    assert (ours - rounding).sum() <= exact.sum() * 1.01


def test_zero_points_are_those_of_float64_but_for_few() -> None:
    weights = torch.randn(4, 64, 500, generator=torch.Generator().manual_seed(1)) * 0.02
    for top in (1, 3, 7, 15):
        (scale, zero), exact = compiled(weights, top), search_by_torch(weights.double(), top)
        torch.testing.assert_close(scale.double(), exact[0], rtol=1e-6, atol=0)
        assert ((zero - exact[1]).abs() < 1e-4).float().mean() > 0.99


@pytest.mark.parametrize("size", [1e-8, 1e-4, 0.3, 1.0, 2.7, 1e4, 1e30])
def test_powers_are_within_millionths_of_themselves(size: float) -> None:
    import numba

    from mcsharp_sdk.kernels.simd_powers import ROWS, half_quadratic_turn

    @numba.njit
    def turn(tile, grid, found, top, norm, least, price):  # type: ignore[no-untyped-def]
        addresses = (tile.ctypes.data, 1, grid.ctypes.data, found.ctypes.data)
        half_quadratic_turn(*addresses, top, norm, least, price)
        return tile[0, 0] + grid[0, 0]  # both are kept until here

    errors = np.geomspace(size, 2.1 * size, ROWS).astype(np.float32)
    tile = np.full((1, ROWS), 0.25, np.float32)  # a quarter of a scale from the zero point's level
    grid, found = np.stack([4 * errors, np.zeros_like(errors)]), np.zeros((2, ROWS), np.float32)
    turn(tile, grid, found, *map(np.float32, (15, NORM, 1e-9, PRICE)))
    np.testing.assert_allclose(found[0], errors.astype(np.float64) ** NORM, rtol=4e-6)


def test_weights_that_lie_transposed_are_read_where_they_are() -> None:
    stored = torch.randn(96, 200, generator=torch.Generator().manual_seed(2))
    part = stored.T[None, 64:128]
    for found, again in zip(compiled(part, 3), compiled(part.contiguous(), 3), strict=True):
        assert torch.equal(found, again)


@pytest.mark.parametrize("shares", [2, 5, 50])
def test_threads_share_the_groups(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(3, 64, 150, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = compiled(weights, 7)
    monkeypatch.setattr(threads, "SMALL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: shares)
    for found, expected in zip(compiled(weights, 7), alone, strict=True):
        assert torch.equal(found, expected)
