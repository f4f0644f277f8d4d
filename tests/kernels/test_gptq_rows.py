"""The compiled loops of quantising against float64 and against torch's search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from grid_errors import squared_error
from hypothesis import given, settings
from hypothesis import strategies as st

from mcsharp_sdk.kernels import threads
from mcsharp_sdk.kernels.support import missing_support
from mcsharp_sdk.quantization.search import GridSettings, fit_group, search_by_torch

pytestmark = pytest.mark.skipif(bool(missing_support()), reason=missing_support())


@settings(deadline=None)  # the first call compiles
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 150)),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    shared=st.booleans(),
    scale=st.sampled_from([0.0, 1e-9, 1e-6, 1e-5, 0.02, 1e6]),
    seed=st.integers(0, 1000),
)
def test_search_is_as_good_as_torchs(
    shape: tuple[int, int, int], bits: int, shared: bool, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=generator) * scale
    importance = torch.rand(1 if shared else shape[0], shape[1], generator=generator)
    grid = GridSettings(group_size=shape[1])
    compiled = fit_group(weights, bits, importance, grid)
    by_torch = search_by_torch(weights, bits, importance, grid)
    ours = squared_error(weights, bits, importance, compiled)
    theirs = squared_error(weights, bits, importance, by_torch)
    # Sums in another order may choose another of two equally good grids, and go on from there.
    assert (ours <= theirs * 1.05 + 1e-30).float().mean() >= 0.9
    assert ours.sum() <= theirs.sum() * 1.01 + 1e-30
    assert torch.equal(compiled.scales, compiled.scales.half().float())


def test_scales_are_rounded_as_torch_rounds_to_fp16() -> None:
    from mcsharp_sdk.kernels.gptq_loops import storable

    numbers = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (numbers[1:] + numbers[:-1]) / 2
    around = [np.nextafter(between, np.float32(end)) for end in (0, np.inf)]
    scales = np.concatenate([numbers, between, *around, np.array([-1, 1e-30, 65519], np.float32)])
    found = [storable(s, np.float32(2**-24), np.float32(65504)) for s in scales]
    rounded = torch.from_numpy(scales).clamp(2**-24, 65504).half().float()
    assert torch.equal(torch.tensor(found), rounded)


def test_search_reads_transposed_weights_where_they_lie() -> None:
    stored = torch.randn(96, 200)
    grid = GridSettings(group_size=64)
    importance = torch.rand(1, 64) + 0.1
    part = stored.T[None, 64:128]
    found = fit_group(part, 2, importance, grid)
    again = fit_group(part.contiguous(), 2, importance, grid)
    assert torch.equal(found.scales, again.scales)
    assert torch.equal(found.zeros, again.zeros)


@settings(deadline=None)  # the first call compiles
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 131), st.integers(16, 90)),
    compensate=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_columns_follow_the_recurrence_in_float64(
    shape: tuple[int, int, int], compensate: bool, seed: int
) -> None:
    from mcsharp_sdk.kernels.gptq_rows import quantise_columns

    matrices, columns, rows = shape
    generator = torch.Generator().manual_seed(seed)
    around = torch.randn(matrices, columns + 5, rows, generator=generator) * 2 + 1.5
    exact = around[:, 3 : 3 + columns]
    updates = torch.randn(matrices, columns, columns + 7, generator=generator)[..., 5:-2] * 0.1
    top = torch.randint(0, 3, (matrices, rows), generator=generator).float().mul_(2).add_(1)
    errors = torch.zeros(matrices, columns + 2, rows)
    before = around.clone()

    codes = quantise_columns(exact, updates if compensate else None, top, errors[:, 1:-1])

    moved = exact.double()
    for i in range(columns):
        code = codes[:, i].double()
        assert (code <= top).all()
        # With the codes as they are, each must be the nearest to what the recurrence has there.
        within = (moved[:, i] - code).abs() <= 0.5 + 1e-4
        beyond = ((code == 0) & (moved[:, i] < 0)) | ((code == top) & (moved[:, i] > top))
        assert (within | beyond).all()
        error = moved[:, i] - code
        torch.testing.assert_close(errors[:, 1 + i].double(), error, rtol=1e-4, atol=1e-4)
        if compensate:
            later = updates[:, i, i + 1 :].double().unsqueeze(-1)
            moved[:, i + 1 :] -= later * error.unsqueeze(1)
    assert torch.equal(around, before)
    assert not errors[:, 0].any()
    assert not errors[:, -1].any()


@pytest.mark.parametrize("shares", [2, 5])
def test_threads_share_the_rows(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mcsharp_sdk.kernels.gptq_rows import quantise_columns

    exact = torch.randn(3, 64, 90) * 2 + 1.5
    updates = torch.randn(3, 64, 64) * 0.1
    top, alone, together = torch.full((3, 90), 3.0), torch.empty(3, 64, 90), torch.empty(3, 64, 90)
    grid, importance = GridSettings(group_size=64), torch.rand(3, 64) + 0.1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = quantise_columns(exact, updates, top, alone)
    searched = fit_group(exact, 2, importance, grid)
    monkeypatch.setattr(threads, "SMALL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: shares)
    assert torch.equal(quantise_columns(exact, updates, top, together), expected)
    assert torch.equal(together, alone)
    again = fit_group(exact, 2, importance, grid)
    assert torch.equal(again.scales, searched.scales)
    assert torch.equal(again.zeros, searched.zeros)
