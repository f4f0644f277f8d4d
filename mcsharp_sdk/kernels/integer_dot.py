"""The kernel for few tokens: products of integers, on the codes as they are stored.

Activations are rounded to integers of 16 bits with one scale per token and 128 columns (or per
group, if groups are shorter). That is an error of about 3e-5 of an output's size: a hundredth of
what bf16 rounds off. Everything else is exact, zero points included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mcsharp_sdk.kernels.case import Case
from mcsharp_sdk.kernels.matrix import PackedStack
from mcsharp_sdk.kernels.support import BLOCK, has_vnni, unfit_shape
from mcsharp_sdk.kernels.threads import in_shares

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refuses(case: Case) -> str:
    """Why it cannot do a case; empty if it can."""
    if reason := unfit_shape(case):
        return reason
    if case.dtype not in DTYPES:
        return f"activations are {case.dtype}"
    if case.bits == 8 and not has_vnni():
        return "8 bits need a processor with VNNI"
    return ""


def integer_dot(
    x: Tensor, stack: PackedStack, slots: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """As :class:`mcsharp_sdk.kernels.linear.Kernel` says."""
    from mcsharp_sdk.kernels import integer_products

    unit = min(stack.group_size, BLOCK)
    blocks = -(-stack.columns // BLOCK)
    units = blocks * BLOCK // unit
    values: np.ndarray = np.empty((len(x), 2 * BLOCK * blocks), np.int8)
    grid: np.ndarray = np.empty((2, len(x), units), np.float32)
    scales, weights = grid
    activations = x.detach().float().contiguous().numpy()
    integer_products.quantise_activations(
        activations, activations.view(np.int32), unit, values, scales, weights
    )
    ends = np.cumsum(counts)
    spans = np.stack([np.asarray(slots), ends - counts, ends], axis=1).astype(np.int64)
    addresses, _kept = stack.addresses()
    form = (stack.rows, stack.columns, stack.bits, stack.group_size)
    out = torch.empty(len(x), stack.rows, dtype=torch.float32)
    target = out.numpy()

    def job(share: int, shares: int) -> None:
        integer_products.integer_dot(
            values, (scales, weights), *addresses, spans, form, target, share, shares
        )

    in_shares(job, stack.rows * stack.columns * (len(x) + len(slots)))
    return out.to(x.dtype)
