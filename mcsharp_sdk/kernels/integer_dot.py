"""The kernels that multiply integers, on the codes as they are stored.

Activations are rounded to integers of 16 bits with one scale per token and 128 columns (or per
group, if groups are shorter). That is an error of about 3e-5 of an output's size: a hundredth of
what bf16 rounds off. Everything else is exact, zero points included. ``int8_dot`` rounds them to 8
bits where a matrix gets several tokens, an error of 5e-3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from mcsharp_sdk.kernels.case import Case
from mcsharp_sdk.kernels.matrix import PackedStack
from mcsharp_sdk.kernels.support import VECTOR, has_vnni, has_wide_vnni, unfit_shape
from mcsharp_sdk.kernels.threads import in_shares
from mcsharp_sdk.quantization.packing import BLOCK

BYTES = {"integer_dot": 2, "int8_dot": 1}
"""Name of a kernel -> bytes of an activation that it multiplies."""

MOST_TOKENS = 128
"""Tokens that are multiplied together: those of more would leave the cache between rows."""

QUANTISING = 20
"""Multiplications that take as long as it takes to quantise a number."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Span = tuple[int, int, int, int, int, int]
"""Addresses of a matrix's codes, scales and zero points, its width, and first and last+1 place of
its slots in an order of slots."""


def refuses(case: Case) -> str:
    """Why ``integer_dot`` cannot do a case; empty if it can."""
    if reason := unfit_shape(case):
        return reason
    if case.dtype not in DTYPES:
        return f"activations are {case.dtype}"
    if case.bits == 8 and not has_vnni():
        return "8 bits need a processor with VNNI"
    return ""


def refuses_8_bits(case: Case) -> str:
    """Why ``int8_dot`` cannot do a case; empty if it can."""
    if reason := refuses(case):
        return reason
    return "" if has_wide_vnni() else "8-bit activations need a processor with AVX-512 VNNI"


def run(
    x: Tensor, stack: PackedStack, slots: Sequence[int], counts: Sequence[int], *, halves: int
) -> Tensor:
    """As :class:`mcsharp_sdk.kernels.linear.Kernel` says, with so many bytes of an activation."""
    memory, ends = stack.memory(), accumulate(counts)
    spans = [
        (*memory.addresses(slot), stack.bits, end - count, end)
        for slot, count, end in zip(slots, counts, ends, strict=True)
    ]
    form = (stack.rows, stack.columns, stack.group_size)
    order = np.arange(len(x), dtype=np.int64).repeat(2).reshape(-1, 2)
    return products(x, spans, order, form, len(x), halves).to(x.dtype)


def products(
    x: Tensor,
    spans: Sequence[Span],
    order: np.ndarray,
    form: tuple[int, int, int],
    results: int,
    halves: int,
) -> Tensor:
    """Products of matrices of one shape, of any widths, each with its own rows of x.

    Parameters
    ----------
    x : [T, K] floating point.
    spans : of each matrix in use.
    order : int64 [N, 2], by matrix: a row of the results, and the row of x that it comes from.
    form : rows R, columns K and group size of the matrices.
    results : how many rows there are.
    halves : bytes of an activation that are multiplied, 2 or 1.

    Returns
    -------
    fp32 [results, R]; rows that are not in ``order`` are not written.
    """
    from mcsharp_sdk.kernels import integer_products
    from mcsharp_sdk.kernels.integer_activations import quantise_activations

    rows, columns, group_size = form
    unit = min(group_size, BLOCK)
    blocks = -(-columns // BLOCK)
    activations = x.detach().float()
    if columns % VECTOR:
        activations = torch.nn.functional.pad(activations, (0, -columns % VECTOR))
    units = blocks * BLOCK // unit
    # numpy's arrays are sooner made than torch's, which counts for a single token.
    values: np.ndarray = np.empty((len(x), blocks, 2, BLOCK), np.int8)
    grid: np.ndarray = np.empty((3, len(x), units), np.float32)
    numbers = activations.contiguous().numpy()
    in_shares(partial(quantise_activations, numbers, unit, values, grid), QUANTISING * x.numel())
    out = torch.empty(results, rows, dtype=torch.float32, device="cpu")
    parts = spans if len(order) <= MOST_TOKENS else [*_in_parts(spans)]
    table, target = np.array(parts, np.int64), out.numpy()

    def job(share: int, shares: int) -> None:
        integer_products.integer_dot(
            values, grid, table, order, form, halves, target, share, shares
        )

    in_shares(job, rows * columns * (len(order) + len(spans)))
    return out


def _in_parts(spans: Sequence[Span]) -> Iterator[Span]:
    """The same spans, cut evenly so that none has more slots than are multiplied together."""
    for codes, scales, zeros, bits, first, last in spans:
        count = last - first
        parts = -(-count // MOST_TOKENS)
        ends = [first + count * part // parts for part in range(parts + 1)]
        for begin, end in pairwise(ends):
            yield codes, scales, zeros, bits, begin, end
