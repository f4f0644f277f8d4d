"""The kernel for many tokens: compiled dequantisation of some rows, multiply, go on.

Weights are those of :func:`mcsharp_sdk.quantization.grid.dequantise_packed`, bit for bit; so only
the order of sums may differ from the kernel in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcsharp_sdk.kernels.case import Case
from mcsharp_sdk.kernels.chunked import CHUNK_WEIGHTS
from mcsharp_sdk.kernels.matrix import PackedStack
from mcsharp_sdk.kernels.support import VECTOR, unfit_shape
from mcsharp_sdk.kernels.threads import in_shares
from mcsharp_sdk.models.bfloat16 import linear
from mcsharp_sdk.quantization.packing import BLOCK

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refuses(case: Case) -> str:
    """Why it cannot do a case; empty if it can."""
    if reason := unfit_shape(case):
        return reason
    return "" if case.dtype in DTYPES else f"activations are {case.dtype}"


def dequantise_and_multiply(
    x: Tensor, stack: PackedStack, slots: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """As :class:`mcsharp_sdk.kernels.linear.Kernel` says."""
    out = x.new_empty(len(x), stack.rows)
    step = max(BLOCK, CHUNK_WEIGHTS // stack.columns // BLOCK * BLOCK)
    padded = -(-stack.columns // VECTOR) * VECTOR
    scratch = x.new_empty(min(step, stack.rows), padded)
    begin = 0
    for slot, count in zip(slots, counts, strict=True):
        tokens = x[begin : begin + count]
        for start in range(0, stack.rows, step):
            stop = min(start + step, stack.rows)
            dequantise_into(scratch, stack, slot, start, stop)
            weight = scratch[: stop - start, : stack.columns]
            out[begin : begin + count, start:stop] = linear(tokens, weight)
        begin += count
    return out


def dequantise_into(scratch: Tensor, stack: PackedStack, slot: int, start: int, stop: int) -> None:
    """Rows start to stop of one matrix of a stack, to the top of ``scratch``.

    Parameters
    ----------
    scratch : [>= stop - start, K up to the next multiple of 32], contiguous; its dtype is that of
        the weights.
    """
    from mcsharp_sdk.kernels.row_dequantisation import dequantise_rows

    memory = stack.matrix(slot).stack().memory()
    form = (stack.rows, stack.columns, stack.bits, stack.group_size)
    kind = DTYPES.index(scratch.dtype)
    target = scratch.data_ptr()

    def job(share: int, shares: int) -> None:
        dequantise_rows(*memory.addresses(0), form, start, stop, kind, target, share, shares)

    in_shares(job, (stop - start) * stack.columns * 8)
