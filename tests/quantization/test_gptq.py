"""Batched GPTQ, against a loop over single matrices and columns in float64."""

from __future__ import annotations

import pytest
import torch
from textbook_gptq import textbook_gptq

from mcsharp_sdk.quantization import (
    GridSettings,
    InverseFactor,
    dequantise,
    factorise,
    quantise_gptq,
    quantise_rtn,
)
from mcsharp_sdk.quantization.grid import QuantizedBatch, QuantizedWeight
from mcsharp_sdk.quantization.search import BinaryScale


def layer(
    experts: int, rows: int, columns: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [E, R, K] and Hessians [E, K, K] of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(experts, rows, columns, generator=generator) * 0.05
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) * 0.15
    inputs = torch.randn(experts, 3 * columns, columns, generator=generator) @ mix
    return weights, 2 * inputs.transpose(1, 2) @ inputs


def output_error(
    weights: torch.Tensor, quantised: QuantizedBatch, hessians: torch.Tensor
) -> torch.Tensor:
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) of each expert."""
    change = weights - quantised.dequantise()
    energy = torch.einsum("erk,ekl,erl->e", weights, hessians, weights)
    return torch.einsum("erk,ekl,erl->e", change, hessians, change) / energy


def reference_column_loop(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    damping: float,
    quantised: QuantizedWeight,
    *,
    block: int,
) -> torch.Tensor:
    """GPTQ of one matrix in float64 by the inverse Hessian itself, on the grid of ``quantised``.

    After each column the inverse is reduced by elimination (the OBQ form of GPTQ), so neither the
    Cholesky factor nor lazy updates are shared with the code under test. ``block`` columns at a
    time are not compensated within; 1 is GPTQ.
    """
    rest = weight.double().clone()
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(
        len(hessian), dtype=torch.float64
    )
    inverse = torch.linalg.inv(damped)
    top = 2**quantised.bits - 1
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for i in range(weight.shape[1]):
        group = i // quantised.group_size
        scale = quantised.scales[:, group].double()
        zero = top / 2 + 0.25 * quantised.zeros[:, group].double()
        code = (rest[:, i] / scale + zero).round().clamp(0, top)
        codes[:, i] = code.to(torch.uint8)
        error = (rest[:, i] - scale * (code - zero)) / inverse[i, i]
        update = error[:, None] * inverse[i][None]
        update[:, : (i // block + 1) * block if block > 1 else i] = 0
        rest -= update
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("columns", "group_size"), [(150, 20), (200, 64), (330, 128), (300, 256)])
def test_codes_equal_those_of_a_float64_loop_over_columns(
    bits: int, columns: int, group_size: int
) -> None:
    weights, hessians = layer(2, 12, columns)
    factor = factorise(hessians, damping=0.05)
    quantised = quantise_gptq(weights, factor, [bits] * 2, GridSettings(group_size=group_size))
    for expert in range(2):
        one = quantised.expert(expert)
        expected = reference_column_loop(weights[expert], hessians[expert], 0.05, one, block=1)
        different = (one.codes != expected).double().mean()
        # A weight half-way between levels may fall either way in fp32 and shift its row from there.
        assert different < 0.02


def test_released_manner_compensates_only_between_blocks() -> None:
    weights, hessians = layer(2, 12, 300)
    factor = factorise(hessians, damping=0.05)
    quantised = quantise_gptq(
        weights, factor, [2, 3], GridSettings(group_size=64), compensate_within_block=False
    )
    for expert in range(2):
        one = quantised.expert(expert)
        expected = reference_column_loop(weights[expert], hessians[expert], 0.05, one, block=128)
        assert (one.codes != expected).double().mean() < 0.02


@pytest.mark.parametrize("within", [True, False])
def test_experts_in_one_batch_do_not_touch_each_other(within: bool) -> None:
    weights, hessians = layer(4, 24, 136)
    widths = [3, 1, 4, 2]
    grid = GridSettings(group_size=32)
    batch = quantise_gptq(
        weights, factorise(hessians), widths, grid, compensate_within_block=within
    )
    for expert, width in enumerate(widths):
        one = slice(expert, expert + 1)
        alone = quantise_gptq(
            weights[one], factorise(hessians[one]), [width], grid, compensate_within_block=within
        )
        torch.testing.assert_close(
            dequantise(batch.expert(expert)), dequantise(alone.expert(0)), rtol=0, atol=0
        )


def test_released_manner_leaves_wide_experts_to_plain_gptq_whatever_stands_beside_them() -> None:
    weights, hessians = layer(3, 12, 300)
    factor = factorise(hessians, damping=0.05)
    widths = [4, 2, 8]
    quantised = quantise_gptq(
        weights, factor, widths, GridSettings(group_size=64), compensate_within_block=False
    )
    for expert, block in enumerate([1, 128, 1]):
        one = quantised.expert(expert)
        expected = reference_column_loop(weights[expert], hessians[expert], 0.05, one, block=block)
        assert (one.codes != expected).double().mean() < 0.02


@pytest.mark.parametrize("within", [True, False])
def test_a_shared_factor_equals_the_same_factor_for_each(within: bool) -> None:
    weights, hessians = layer(3, 20, 100)
    shared = factorise(hessians[:1])
    each = InverseFactor(shared.upper.expand(3, -1, -1).contiguous(), (0.01,) * 3, (), ())
    grid = GridSettings(group_size=64)
    widths = [2, 4, 1]
    first = quantise_gptq(weights, shared, widths, grid, compensate_within_block=within)
    second = quantise_gptq(weights, each, widths, grid, compensate_within_block=within)
    difference = (first.dequantise() - second.dequantise()).abs() > 0
    assert difference.double().mean() < 0.01


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_compensation_lowers_the_output_error(bits: int) -> None:
    weights, hessians = layer(3, 40, 192)
    grid = GridSettings(group_size=64)
    widths = [bits] * 3
    factor = factorise(hessians)
    full = output_error(weights, quantise_gptq(weights, factor, widths, grid), hessians)
    blockwise = quantise_gptq(weights, factor, widths, grid, compensate_within_block=False)
    importance = hessians.diagonal(dim1=1, dim2=2)
    nearest = quantise_rtn(weights, widths, grid, importance=importance)
    assert (full < output_error(weights, blockwise, hessians)).all()
    assert (full < 0.8 * output_error(weights, nearest, hessians)).all()


def test_search_beats_the_full_range_and_its_stored_scale_is_the_one_used() -> None:
    weights, hessians = layer(1, 64, 128)
    factor = factorise(hessians)
    narrow = GridSettings(group_size=64, clip_ratios=(1.0,), refinements=0)
    plain = output_error(weights, quantise_gptq(weights, factor, [2], narrow), hessians)
    searched = quantise_gptq(weights, factor, [2], GridSettings(group_size=64))
    assert (output_error(weights, searched, hessians) < 0.8 * plain).all()
    assert searched.scales.dtype == torch.float16


def test_an_expert_that_could_not_be_factorised_is_rounded_to_nearest() -> None:
    weights, hessians = layer(2, 16, 72)
    hessians[1, 0, 1] = hessians[1, 1, 0] = float("nan")
    grid = GridSettings(group_size=32)
    factor = factorise(hessians)
    assert factor.failed == (1,)
    quantised = quantise_gptq(weights, factor, [2, 2], grid)
    nearest = quantise_rtn(
        weights, [2, 2], grid, importance=hessians.diagonal(dim1=1, dim2=2).contiguous()
    )
    torch.testing.assert_close(dequantise(quantised.expert(1)), dequantise(nearest.expert(1)))


def test_columns_without_input_are_still_quantised() -> None:
    weights, hessians = layer(1, 16, 64)
    hessians[:, 10:20] = 0
    hessians[:, :, 10:20] = 0
    quantised = quantise_gptq(weights, factorise(hessians), [4], GridSettings(group_size=32))
    change = (weights - quantised.dequantise())[..., 10:20].abs()
    assert change.max() < 0.5 * weights.abs().max()


def test_result_is_as_good_as_the_textbook_loop_over_matrices() -> None:
    weights, hessians = layer(3, 64, 288)
    grid = GridSettings(group_size=64)
    widths = [1, 2, 3]
    batched = quantise_gptq(weights, factorise(hessians, damping=0.02), widths, grid)
    for expert, width in enumerate(widths):
        one = textbook_gptq(weights[expert], hessians[expert], width, grid, 0.02)
        same = (one - dequantise(batched.expert(expert))).abs() < 1e-5
        assert same.double().mean() > 0.98


@pytest.mark.parametrize(("binary", "per_group"), [("released", True), ("paper", False)])
def test_one_bit_scale_is_the_mean_magnitude(binary: BinaryScale, per_group: bool) -> None:
    weights, _ = layer(2, 10, 96)
    quantised = quantise_rtn(weights, [1, 1], GridSettings(group_size=32, binary=binary))
    magnitude = weights.unflatten(-1, (3, 32)).abs().mean(-1)
    if not per_group:
        magnitude = weights.abs().mean((1, 2), keepdim=True).expand(2, 10, 3)
    expected = torch.sign(weights) * magnitude.repeat_interleave(32, -1)
    torch.testing.assert_close(quantised.dequantise(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", ["stacked", "interleaved"])
def test_the_papers_one_bit_scale_is_of_each_linear_layer_by_itself(rows: str) -> None:
    gate, up = layer(1, 24, 64)[0][0], 3 * layer(1, 24, 64)[0][0].flip(0)
    fused = torch.cat([gate, up])
    matrix_of_row = torch.arange(48) // 24
    if rows == "interleaved":
        fused, matrix_of_row = torch.stack([gate, up], 1).flatten(0, 1), torch.arange(48) % 2
    grid, factor = GridSettings(group_size=32, binary="paper"), factorise(torch.eye(64)[None])
    for quantised in (
        quantise_rtn(fused[None], [1], grid, matrix_of_row=matrix_of_row),
        quantise_gptq(fused[None], factor, [1], grid, matrix_of_row=matrix_of_row),
    ):
        levels = quantised.dequantise()[0].abs()
        for number, weight in enumerate((gate, up)):
            expected = weight.abs().mean().expand(24, 64)
            torch.testing.assert_close(levels[matrix_of_row == number], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("binary", ["optimised", "released", "paper"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("quantise", ["gptq", "rtn"])
def test_weights_of_tiny_size_lose_no_more_than_others(
    quantise: str, bits: int, binary: BinaryScale
) -> None:
    weights, hessians = layer(1, 24, 128)
    factor, grid = factorise(hessians), GridSettings(group_size=64, binary=binary)

    def lost(size: float) -> float:
        scaled = weights / weights.std() * size
        if quantise == "rtn":
            batch = quantise_rtn(scaled, [bits], grid)
        else:
            batch = quantise_gptq(scaled, factor, [bits], grid)
        return float((batch.dequantise() - scaled).norm() / scaled.norm())

    assert lost(1e-5) == pytest.approx(lost(1.0), rel=0.05)


def test_zero_weights_stay_zero() -> None:
    weights = torch.zeros(1, 4, 64)
    quantised = quantise_rtn(weights, [2], GridSettings(group_size=32))
    assert not quantised.dequantise().any()


@pytest.mark.parametrize("rows", [1, 8, 513])
def test_rounding_leaves_the_weights_as_they_are(rows: int) -> None:
    weights, _ = layer(1, rows, 64)
    before = weights.clone()
    quantise_rtn(weights, [2], GridSettings(group_size=32))
    assert torch.equal(weights, before)


def test_bf16_weights_are_left_as_they_are() -> None:
    weights, hessians = layer(1, 8, 64)
    half = weights.bfloat16()
    before = half.clone()
    quantised = quantise_gptq(half, factorise(hessians), [8], GridSettings(group_size=64))
    assert torch.equal(half, before)
    assert output_error(half.float(), quantised, hessians).max() < 1e-3


@pytest.mark.parametrize("quantise", ["gptq", "rtn"])
def test_wrong_arguments_are_named(quantise: str) -> None:
    weights, hessians = layer(2, 8, 32)
    grid = GridSettings(group_size=32)
    factor = factorise(hessians)

    def run(bits: list[int], wrong_shape: bool = False) -> QuantizedBatch:
        if quantise == "gptq":
            return quantise_gptq(weights[:, :, :-1] if wrong_shape else weights, factor, bits, grid)
        importance = torch.ones(3 if wrong_shape else 2, 32)
        return quantise_rtn(weights, bits, grid, importance=importance)

    with pytest.raises(ValueError, match="2 experts need as many widths, got 1"):
        run([2])
    with pytest.raises(ValueError, match="no grid of 5 bits"):
        run([2, 5])
    with pytest.raises(ValueError, match=r"\[2 or 1, 3"):
        run([2, 2], wrong_shape=True)
    with pytest.raises(ValueError, match="clip_ratios"):
        GridSettings(clip_ratios=(1.5,))
    with pytest.raises(ValueError, match="group_size"):
        GridSettings(group_size=0)
