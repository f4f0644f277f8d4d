"""HQQ and learned clipping, against the errors that they are there to lower."""

from __future__ import annotations

import pytest
import torch
from test_gptq import layer, output_error

from mcsharp_sdk.quantization import GridSettings, dequantise, pack_weight, quantise_rtn
from mcsharp_sdk.quantization.grid import QuantizedBatch, unpack_weight
from mcsharp_sdk.quantization.hqq import NORM, quantise_hqq, shrunk
from mcsharp_sdk.quantization.lwc import _Clipping, _errors, quantise_lwc

FULL_RANGE = GridSettings(group_size=64, clip_ratios=(1.0,), refinements=0)


def heavy_tailed(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 24, 150, generator=generator).pow(3) * 0.05 + 0.01


def distance(weights: torch.Tensor, quantised: QuantizedBatch, power: float) -> float:
    return float((weights - quantised.dequantise()).abs().pow(power).mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_lowers_the_norm_that_it_is_about(bits: int) -> None:
    weights = heavy_tailed()
    found = quantise_hqq(weights, [bits] * 2, GridSettings(group_size=64))
    rounded = quantise_rtn(weights, [bits] * 2, FULL_RANGE)
    assert distance(weights, found, NORM) < distance(weights, rounded, NORM)


@pytest.mark.parametrize("change", [0.0, 0.02, 0.2, -0.5, 3.0])
def test_shrinkage_is_near_the_minimum_of_its_problem(change: float) -> None:
    """|x|^p + price/2 · (x − change)²: the shrinkage linearises |x|^p at the change itself."""
    price = 10.0

    def value(x: float) -> float:
        return abs(x) ** NORM / NORM + price / 2 * (x - change) ** 2

    error = torch.tensor(abs(change)).clamp_min(1e-8)
    found = float(shrunk(torch.tensor(change), error, error.pow(NORM), price))
    exact = min((change * step / 1000 for step in range(1001)), key=value)
    assert found == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learned_clipping_is_better_than_the_range_it_starts_from(bits: int) -> None:
    weights, hessians = layer(2, 12, 150)
    found = quantise_lwc(weights, hessians, [bits] * 2, GridSettings(group_size=64))
    rounded = quantise_rtn(weights, [bits] * 2, FULL_RANGE)
    better = output_error(weights, found, hessians) / output_error(weights, rounded, hessians)
    assert (better < (0.9 if bits < 4 else 1.0)).all()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_slopes_of_learned_clipping_are_those_of_autograd(bits: int) -> None:
    """Straight through the rounding, and not through the clipping; the last group is short."""
    weights, hessians = (part[0] for part in layer(1, 6, 150))
    clipping = _Clipping(weights, bits, 64)
    strength = torch.linspace(-2, 4, 2 * clipping.low.numel()).view(2, *clipping.low.shape)
    scale, zero = (part.detach().requires_grad_() for part in clipping.range(strength))
    exact = clipping.groups / scale.unsqueeze(-1) + zero.unsqueeze(-1)
    codes = (exact + (exact.round() - exact).detach()).clamp(0, clipping.top)
    quantised = ((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)[:, :150]
    expected = ((quantised - weights) @ hessians * (quantised - weights)).sum(-1)
    expected.sum().backward()
    with torch.no_grad():
        errors, slopes = _errors(clipping, scale, zero, hessians)
    torch.testing.assert_close(errors, expected.detach(), rtol=1e-4, atol=1e-4)
    for slope, of in zip(slopes, (scale, zero), strict=True):
        assert of.grad is not None
        assert of.grad.abs().max() > 0
        close = 1e-4 * float(of.grad.abs().max())
        torch.testing.assert_close(slope, of.grad, rtol=1e-3, atol=close)


def test_learned_clipping_sees_which_inputs_matter() -> None:
    """With inputs in one column only, that column is all that counts."""
    weights, _ = layer(1, 12, 64)
    hessian = torch.zeros(1, 64, 64)
    hessian[0, 5, 5] = 1.0
    found = quantise_lwc(weights, hessian, [2], GridSettings(group_size=64))
    rounded = quantise_rtn(weights, [2], FULL_RANGE)
    errors = [(weights - q.dequantise())[0, :, 5].square().sum() for q in (found, rounded)]
    assert errors[0] < 0.2 * errors[1]


@pytest.mark.parametrize("name", ["hqq", "lwc"])
def test_experts_do_not_touch_each_other_and_can_be_stored(name: str) -> None:
    weights, hessians = layer(3, 10, 100)
    grid, widths = GridSettings(group_size=32), [3, 1, 2]

    def quantise(chosen: slice) -> QuantizedBatch:
        if name == "hqq":
            return quantise_hqq(weights[chosen], widths[chosen], grid)
        return quantise_lwc(weights[chosen], hessians[chosen], widths[chosen], grid)

    batch = quantise(slice(None))
    for expert, width in enumerate(widths):
        alone = dequantise(quantise(slice(expert, expert + 1)).expert(0))
        one = batch.expert(expert)
        torch.testing.assert_close(dequantise(one), alone, rtol=0, atol=0)
        packed = unpack_weight(pack_weight(one), bits=width, group_size=32, columns=100)
        assert torch.equal(dequantise(packed), alone)


def test_learned_clipping_refuses_hessians_of_another_shape() -> None:
    weights, hessians = layer(2, 4, 20)
    with pytest.raises(ValueError, match=r"hessians must be \[2, 20, 20\]"):
        quantise_lwc(weights, hessians[:1], [2, 2], GridSettings(group_size=8))
