"""GPTQ one matrix and one column at a time, as the paper's algorithm is usually written."""

from __future__ import annotations

import torch
from torch import Tensor

from mcsharp_sdk.quantization.search import GridSettings, fit_group

BLOCK = 128


def textbook_gptq(
    weight: Tensor, hessian: Tensor, bits: int, grid: GridSettings, damping: float
) -> Tensor:
    """Dequantised result for one matrix [R, K] with its Hessian [K, K]; group_size divides 128."""
    weight = weight.clone()
    damped = hessian.clone()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    importance = upper.diagonal().square().reciprocal()
    result = torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        errors = torch.empty_like(weight[:, start:stop])
        for i in range(start, stop):
            if i % grid.group_size == 0:
                group = slice(i, i + grid.group_size)
                fitted = fit_group(weight[:, group].T[None], bits, importance[None, group], grid)
                scale, zero = fitted.scales[0], fitted.zeros[0]
            code = torch.clamp(torch.round(weight[:, i] / scale + zero), 0, 2**bits - 1)
            result[:, i] = scale * (code - zero)
            error = (weight[:, i] - result[:, i]) / upper[i, i]
            weight[:, i:stop] -= error.unsqueeze(1) * upper[i, i:stop].unsqueeze(0)
            errors[:, i - start] = error
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return result
