"""GPTQ with the Triton column loop, in the interpreter; run by ``tests/kernels/test_triton.py``."""

from __future__ import annotations

import pytest
import torch

from mcsharp_sdk.kernels.triton_gptq import quantise_columns
from mcsharp_sdk.quantization import GridSettings, QuantizedBatch, factorise, gptq, quantise_gptq


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
