"""The kernel for few tokens: products of integers, on the codes as they are stored.

Activations are rounded to integers of 16 bits with one scale per token and 128 columns (or per
group, if groups are shorter). That is an error of about 3e-5 of an output's size: a hundredth of
what bf16 rounds off. Everything else is exact, zero points included.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

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
    memory, ends = stack.memory(), accumulate(counts)
    spans = [
        (*memory.addresses(slot), stack.bits, end - count, end)
        for slot, count, end in zip(slots, counts, ends, strict=True)
    ]
    form = (stack.rows, stack.columns, stack.group_size)
    order = np.arange(len(x), dtype=np.int64).repeat(2).reshape(-1, 2)
    return products(x, spans, order, form, len(x)).to(x.dtype)


def products(
    x: Tensor,
    spans: Sequence[tuple[int, int, int, int, int, int]],
    order: np.ndarray,
    form: tuple[int, int, int],
    results: int,
) -> Tensor:
    """Products of matrices of one shape, of any widths, each with its own rows of x.

    Parameters
    ----------
    x : [T, K] floating point.
    spans : of each matrix in use the addresses of its codes, scales and zero points, its width, and
        first and last+1 place in ``order``.
    order : int64 [N, 2], by matrix: a row of the results, and the row of x that it comes from.
    form : rows R, columns K and group size of the matrices.
    results : how many rows there are.

    Returns
    -------
    fp32 [results, R]; rows that are not in ``order`` are not written.
    """
    from mcsharp_sdk.kernels import integer_products

    rows, columns, group_size = form
    unit = min(group_size, BLOCK)
    units = -(-columns // BLOCK) * BLOCK // unit
    activations = x.detach().float().contiguous().numpy()
    values: np.ndarray = np.empty((len(x), 2 * units * unit), np.int8)
    grid: np.ndarray = np.empty((2, len(x), units), np.float32)
    integer_products.quantise_activations(
        activations, activations.view(np.int32), unit, values, grid[0], grid[1]
    )
    out = torch.empty(results, rows, dtype=torch.float32, device="cpu")
    table, target = np.array(spans, np.int64), out.numpy()

    def job(share: int, shares: int) -> None:
        integer_products.integer_dot(values, grid, table, order, form, target, share, shares)

    in_shares(job, rows * columns * (len(order) + len(spans)))
    return out
