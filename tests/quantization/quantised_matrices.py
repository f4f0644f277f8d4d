"""Random matrices quantised by GPTQ, and their errors in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from mcsharp_sdk.quantization import GridSettings, factorise, quantise_gptq
from mcsharp_sdk.quantization.grid import QuantizedBatch, QuantizedWeight, dequantise
from mcsharp_sdk.quantization.inverse_factor import damped


def quantised_by_gptq(
    columns: int, group_size: int, bits: list[int], rows: int = 17
) -> tuple[Tensor, Tensor, QuantizedBatch]:
    """Weights, damped Hessians, and the weights quantised by GPTQ."""
    generator = torch.Generator().manual_seed(columns)
    weights = torch.randn(len(bits), rows, columns, generator=generator)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(len(bits), 3 * columns, columns, generator=generator) @ mix
    hessians = 2 * inputs.transpose(1, 2) @ inputs
    factor = factorise(hessians)
    batch = quantise_gptq(weights, factor, bits, GridSettings(group_size=group_size))
    ridged = torch.stack([damped(hessians, factor, expert) for expert in range(len(bits))])
    return weights, ridged, batch


def row_errors(weight: Tensor, quantised: QuantizedWeight, hessian: Tensor) -> Tensor:
    """Δ H Δᵀ of each row, [R] float64."""
    change = (weight - dequantise(quantised)).double()
    return ((change @ hessian.double()) * change).sum(1)
