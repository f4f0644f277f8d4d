"""Matrices of one width on a GPU: the kernels for whole layers, as rows of the kernel table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from mcsharp_sdk.kernels.case import Case
from mcsharp_sdk.kernels.expert_layer import MatrixStack, expert_table, in_parts
from mcsharp_sdk.kernels.gpu_experts import GEMV_AT_ONCE, takes_gemv
from mcsharp_sdk.kernels.gpu_support import HALF_PRECISION, missing_support
from mcsharp_sdk.kernels.matrix import PackedStack
from mcsharp_sdk.kernels.tilings import Kind, Tiling

GEMV_TOKENS = 2
"""Tokens up to which each reads the weights by itself, where nothing was measured. An estimate
from measurements of layers."""


def refuses(case: Case) -> str:
    """Why a case cannot be done with 16-bit activations; empty if it can."""
    if reason := missing_support(case.device):
        return reason
    return "" if case.dtype in HALF_PRECISION else f"it takes 16-bit floats, not {case.dtype}"


def refuses_dp4a(case: Case) -> str:
    """Why a case cannot be done with 8-bit activations; empty if it can."""
    if reason := refuses(case):
        return reason
    if not takes_gemv(case.columns, [case.bits], case.group_size):
        return "rows are not whole 32-bit words in groups of whole words"
    return ""


def refuses_tiling(case: Case, tiling: Tiling) -> str:
    """Why a case cannot be done with 16-bit activations in one way; empty if it can."""
    return refuses_dp4a(case) if tiling.kind == "gemv" else refuses(case)


def run(
    x: Tensor,
    stack: PackedStack,
    slots: Sequence[int],
    counts: Sequence[int],
    *,
    dp4a: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """See :class:`~mcsharp_sdk.kernels.linear.Kernel`; 16-bit activations.

    Parameters
    ----------
    dp4a : where there are at most ``GEMV_TOKENS``, round them to 8 bits.
    tiling : the way, for any number of tokens; by default what is built in.
    """
    from mcsharp_sdk.kernels.triton_launch import gemm, sort_slots
    from mcsharp_sdk.kernels.triton_launch_few import gemv

    matrices = len(stack.weight.scales)
    single = MatrixStack({stack.bits: stack.weight}, stack.group_size, stack.columns)
    table = _table(stack.bits, matrices, x.device)
    chosen = _chosen(x.device, slots, counts)
    kind, size = tiling or Tiling(_built_in_kind(stack, len(x)))
    if kind == "gemv":
        product = partial(gemv, single, table, gated=False, dp4a=dp4a, step=size)
        return in_parts(product, GEMV_AT_ONCE, x.contiguous(), chosen)
    tiles = sort_slots(chosen, matrices, size)
    return gemm(single, table, x.contiguous(), tiles, gated=False, to_slots=False)


def _built_in_kind(stack: PackedStack, tokens: int) -> Kind:
    fits = takes_gemv(stack.columns, [stack.bits], stack.group_size)
    return "gemv" if fits and tokens <= GEMV_TOKENS else "gemm"


def _chosen(device: torch.device, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The matrix of each row, ascending; made on the device where there is only the first."""
    if list(slots) == [0]:
        return torch.zeros(counts[0], dtype=torch.int64, device=device)
    return torch.repeat_interleave(torch.tensor(slots), torch.tensor(counts)).to(device)


@lru_cache(maxsize=64)
def _table(bits: int, matrices: int, device: torch.device) -> Tensor:
    return expert_table([bits] * matrices).to(device)
