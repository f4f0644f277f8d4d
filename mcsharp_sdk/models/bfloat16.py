"""Products of bfloat16 matrices on a CPU, fast and without leaving memory behind.

Without bfloat16 arithmetic torch multiplies them several times slower than float32 ones: 8 times
with AVX2. Converting to float32 first costs little beside the product, and like hardware with
bfloat16 arithmetic sums in float32 and rounds once.

With bfloat16 arithmetic the library behind torch keeps, for each number of rows it has met, code
and memory of its own, 0.7 MB a product, and an expert gets another number of tokens each time. So
rows are multiplied in blocks of few sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

FEW_ROWS = 32
"""Up to so many rows the product waits for the weight anyway: converting it gains nothing."""

CHUNK_WEIGHTS = 2**22
"""Weights that are held in float32 at a time: 16 MiB."""

BLOCK_ROWS = (2048, 512, 128, 64, FEW_ROWS)
"""Numbers of rows that are multiplied at once; what is left over is filled up to the last."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, computed in the way that is fast on this processor.

    Parameters
    ----------
    x : [..., K]
    weight : [R, K]
    bias : [R], or None.

    Returns
    -------
    [..., R] in x's dtype.
    """
    if not _is_bfloat16_on_cpu(x, weight) or x.numel() <= FEW_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    multiply = _in_blocks if _has_bfloat16_arithmetic() else _in_float32
    return multiply(rows, weight, bias).view(*x.shape[:-1], -1)


def _in_float32(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product by way of float32, some of the weight at a time."""
    rows, dtype = rows.float(), rows.dtype
    out = torch.empty(len(rows), len(weight), dtype=dtype)
    step = max(1, CHUNK_WEIGHTS // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        product = rows @ weight[part].float().t()
        out[:, part] = product if bias is None else product.add_(bias[part].float())
    return out


def _in_blocks(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product, some of the rows at a time."""
    if len(rows) in BLOCK_ROWS:
        return F.linear(rows, weight, bias)
    out = rows.new_empty(len(rows), len(weight))
    start = 0
    for size in BLOCK_ROWS:
        while start + size <= len(rows):
            out[start : start + size] = F.linear(rows[start : start + size], weight, bias)
            start += size
    if rest := len(rows) - start:
        filled = F.pad(rows[start:], (0, 0, 0, BLOCK_ROWS[-1] - rest))
        out[start:] = F.linear(filled, weight, bias)[:rest]
    return out


def fast_linears() -> AbstractContextManager[object]:
    """While it lasts, every ``F.linear`` without gradients is :func:`linear`."""
    return nullcontext() if _has_bfloat16_arithmetic() else _FastLinears()


class _FastLinears(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        chosen = linear if func is F.linear and not torch.is_grad_enabled() else func
        return chosen(*args, **(kwargs or {}))


def _is_bfloat16_on_cpu(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16


@cache
def _has_bfloat16_arithmetic() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
