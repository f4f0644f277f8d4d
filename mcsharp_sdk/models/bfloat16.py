"""Products of bfloat16 matrices on processors that have no bfloat16 arithmetic.

There torch multiplies them several times slower than float32 ones: 8 times with AVX2. Converting to
float32 first costs little beside the product, and like hardware with bfloat16 arithmetic sums in
float32 and rounds once.
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
    if not _is_emulated(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).float()
    out = torch.empty(len(rows), len(weight), dtype=x.dtype)
    step = max(1, CHUNK_WEIGHTS // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        product = rows @ weight[part].float().t()
        out[:, part] = product if bias is None else product.add_(bias[part].float())
    return out.view(*x.shape[:-1], -1)


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


def _is_emulated(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.bfloat16
        and x.numel() > FEW_ROWS * x.shape[-1]
        and not _has_bfloat16_arithmetic()
    )


@cache
def _has_bfloat16_arithmetic() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
