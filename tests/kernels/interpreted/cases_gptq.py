"""Quantising's Triton kernels, in the interpreter; run by ``tests/kernels/test_triton.py``."""

from __future__ import annotations

import pytest
import torch
from grid_errors import share_as_good, share_of_equal_grids

from mcsharp_sdk.kernels import gpu_support
from mcsharp_sdk.kernels.triton_gptq import quantise_columns
from mcsharp_sdk.kernels.triton_search import LONGEST_GROUP, search_groups
from mcsharp_sdk.quantization import (
    GridSettings,
    QuantizedBatch,
    compiled,
    factorise,
    gptq,
    quantise_gptq,
    search,
)
from mcsharp_sdk.quantization.search import GroupGrid, fit_group, search_by_torch


def problem(experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [E, R, K] and Hessians [E, K, K] of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(experts, rows, columns, generator=generator)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) * 0.1
    inputs = torch.randn(experts, 3 * columns, columns, generator=generator) @ mix
    return weights, 2 * inputs.transpose(1, 2) @ inputs


def output_error(weights: torch.Tensor, batch: QuantizedBatch, hessians: torch.Tensor) -> float:
    change = (weights - batch.dequantise()).double()
    return float(((change @ hessians.double()) * change).sum())


@pytest.mark.parametrize(
    ("columns", "group", "shared", "compensate"),
    [(144, 128, False, True), (72, 32, True, True), (40, 32, False, False)],
)
def test_the_kernel_quantises_as_the_loop_does(
    columns: int, group: int, shared: bool, compensate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, hessians = problem(3, 10, columns)
    if shared:
        hessians = hessians[:1]
    factor, grid = factorise(hessians), GridSettings(group_size=group)

    def quantised() -> QuantizedBatch:
        return quantise_gptq(weights, factor, (2, 1, 3), grid, compensate_within_block=compensate)

    loop = quantised()
    monkeypatch.setattr(gptq, "_column_loop", lambda exact: quantise_columns)
    kernel = quantised()
    assert kernel.bits == loop.bits
    # Sums in another order turn a rounding now and then; the error of the output is the same.
    assert (kernel.codes != loop.codes).float().mean() < 0.01
    errors = [output_error(weights, batch, hessians) for batch in (kernel, loop)]
    assert errors[0] == pytest.approx(errors[1], rel=5e-3)


def test_halves_go_to_even_codes_and_codes_stay_in_range() -> None:
    exact = torch.tensor([0.5, 1.5, 2.5, -0.5, -7.0, 9.0, 3.49, 3e9]).view(1, 1, 8)
    error = torch.empty_like(exact)
    codes = quantise_columns(exact, None, torch.full((1, 8), 3.0), error)
    assert codes.flatten().tolist() == [0, 2, 2, 0, 0, 3, 3, 3]
    assert torch.equal(error, exact - codes)


def found_by_both(
    weights: torch.Tensor,
    bits: int,
    importance: torch.Tensor,
    settings: GridSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[GroupGrid, GroupGrid]:
    """What the kernel finds for weights [n, g, R], and what torch does."""
    with monkeypatch.context() as patch:
        patch.setattr(search, "group_search", lambda device, columns: search_groups)
        kernel = fit_group(weights, bits, importance, settings)
    return kernel, search_by_torch(weights, bits, importance, settings)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("matrices", "columns", "rows", "shared"),
    [(2, 128, 70, False), (3, 72, 37, True), (1, 200, 64, False), (2, 7, 50, True)],
)
def test_the_kernel_finds_the_grids_that_torch_does(
    bits: int,
    matrices: int,
    columns: int,
    rows: int,
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(bits)
    # A group among others, and experts side by side, as GPTQ with a shared Hessian has them.
    around = torch.randn(columns + 9, matrices, rows, generator=generator) * 0.02
    weights = around[5 : 5 + columns].transpose(0, 1)
    # Columns of a diagonal lie apart.
    importance = torch.rand(1 if shared else matrices, columns, 3, generator=generator)[..., 1]
    settings = GridSettings(group_size=columns)
    kernel, expected = found_by_both(weights, bits, importance, settings, monkeypatch)
    assert share_as_good(weights, bits, importance, kernel, expected) > 0.98
    assert share_of_equal_grids(kernel, expected) > 0.95
    assert torch.equal(kernel.scales, kernel.scales.half().float())


@pytest.mark.parametrize(
    "settings",
    [
        GridSettings(refinements=0),
        GridSettings(clip_ratios=(0.8,), refinements=1, neighbours=()),
        GridSettings(refinements=5, neighbours=(-1.0, 0.75, 0.25)),
    ],
    ids=["range", "refit", "rounds"],
)
@pytest.mark.parametrize("bits", [1, 3])
def test_the_kernel_searches_as_the_settings_say(
    bits: int, settings: GridSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.randn(1, 40, 33, generator=torch.Generator().manual_seed(0)) + 0.7
    transposed = weights.transpose(1, 2).contiguous().transpose(1, 2)
    importance = torch.ones(1, 40)
    kernel, expected = found_by_both(transposed, bits, importance, settings, monkeypatch)
    assert share_of_equal_grids(kernel, expected) > 0.95


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-6, 1e-5, 1e6])
def test_scales_are_those_that_fp16_holds(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(0)) * scale
    importance = torch.rand(1, 30, generator=torch.Generator().manual_seed(1))
    for bits in (1, 2):
        found = found_by_both(weights, bits, importance, GridSettings(), monkeypatch)
        assert share_of_equal_grids(*found) > 0.97


def test_groups_too_long_for_registers_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_support, "missing_support", lambda device: "")
    chosen = compiled.group_search.__wrapped__
    assert chosen("cuda", LONGEST_GROUP) is search_groups
    assert chosen("cuda", LONGEST_GROUP + 1) is None
