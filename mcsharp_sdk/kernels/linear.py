"""The interface that kernels join, and the choice of one of them.

A kernel is a row of ``KERNELS``. Which one a product gets is a row of ``PREFERENCES``: the one that
was measured to be fastest on this machine, or else the first that fits the case and whose kernel
does not refuse it. ``MCSHARP_KERNEL`` names one that takes everything instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.kernels import chunked, crossovers, dequantise, gpu_linear, integer_dot, support
from mcsharp_sdk.kernels.case import BUILT_IN, MEASURED, Case, Choice
from mcsharp_sdk.kernels.gpu_support import HALF_PRECISION
from mcsharp_sdk.kernels.matrix import PackedMatrix, PackedStack
from mcsharp_sdk.kernels.tilings import MATRIX_TILINGS

VARIABLE = "MCSHARP_KERNEL"
"""Environment variable that names the kernel to use for everything."""

WHOLE_LAYERS = ("triton", "triton_dp4a")
"""Names that stand for a GPU's kernels of whole layers too, the default first."""


@dataclass(frozen=True)
class Kernel:
    """One way to multiply by packed matrices.

    Attributes
    ----------
    refuses : why the kernel cannot do a case; empty if it can.
    run : x [N, K], stack, slots, counts -> [N, R] in x's dtype. The first ``counts[0]`` rows of x
        are multiplied by the matrix ``slots[0]`` of the stack, the next by ``slots[1]``, and so
        on; counts are positive, and no gradient is asked for.
    """

    refuses: Callable[[Case], str]
    run: Callable[[Tensor, PackedStack, Sequence[int], Sequence[int]], Tensor]


KERNELS: dict[str, Kernel] = {
    "triton": Kernel(gpu_linear.refuses, gpu_linear.run),
    "triton_dp4a": Kernel(gpu_linear.refuses_dp4a, partial(gpu_linear.run, dp4a=True)),
    "integer_dot": Kernel(
        integer_dot.refuses, partial(integer_dot.run, halves=integer_dot.BYTES["integer_dot"])
    ),
    "int8_dot": Kernel(
        integer_dot.refuses_8_bits, partial(integer_dot.run, halves=integer_dot.BYTES["int8_dot"])
    ),
    "dequantise": Kernel(dequantise.refuses, dequantise.dequantise_and_multiply),
    "chunked": Kernel(lambda case: "", chunked.chunked),
    **{
        f"triton_{name}": Kernel(
            partial(gpu_linear.refuses_tiling, tiling=tiling),
            partial(gpu_linear.run, tiling=tiling),
        )
        for name, tiling in MATRIX_TILINGS.items()
    },
}
"""Name -> kernel."""

EVERY_DTYPE = (*HALF_PRECISION, torch.float32, torch.float64)
ANY_NUMBER = 2**62


def _anywhere() -> bool:
    return True


@dataclass(frozen=True)
class Preference:
    """A kernel for all cases of these dtypes with at most so many tokens.

    Where it was measured, it is used for as many tokens as it is fastest for; with 0, only there.
    ``here`` says whether this processor is one that the number of tokens is meant for.
    """

    kernel: str
    tokens: int
    dtypes: tuple[torch.dtype, ...]
    here: Callable[[], bool] = _anywhere


PREFERENCES: tuple[Preference, ...] = (
    Preference("triton", ANY_NUMBER, HALF_PRECISION),
    Preference("integer_dot", 128, HALF_PRECISION, lambda: support.has_wide_vnni()),
    Preference("integer_dot", 24, HALF_PRECISION),
    Preference("dequantise", ANY_NUMBER, EVERY_DTYPE),
    Preference("chunked", ANY_NUMBER, EVERY_DTYPE),
    *(Preference(f"triton_{name}", 0, HALF_PRECISION) for name in MATRIX_TILINGS),
)
"""Tried in order. ``integer_dot`` rounds activations to 16 bits, which float32 would notice; where
it stops is where ``benchmarks/cpu_kernels.py`` finds it overtaken. ``triton_dp4a`` and ``int8_dot``
round to 8 bits, so that they run only where ``MCSHARP_KERNEL`` asks for them."""


def choose_kernel(case: Case) -> str:
    """Name of the kernel that does a case; see :func:`explain_choice`."""
    return explain_choice(case).kernel


def explain_choice(case: Case) -> Choice:
    """The kernel that does a case: the forced one, that measured to be fastest, or the built-in.

    Raises
    ------
    InputError
        If ``MCSHARP_KERNEL`` names no kernel, or one that cannot do the case, or if activations
        are of another dtype than ``EVERY_DTYPE``.
    """
    _check_dtype(case.dtype)
    forced = os.environ.get(VARIABLE)
    if forced:
        return Choice(_forced(forced, case), VARIABLE)
    if name := crossovers.fastest(case, case.tokens):
        if _is_candidate(name, case):
            return Choice(name, MEASURED)
        crossovers.warn_unfit(case, name)
    return next(
        Choice(preferred.kernel, BUILT_IN)
        for preferred in PREFERENCES
        if case.tokens <= preferred.tokens
        and _is_candidate(preferred.kernel, case)
        and preferred.here()
    )


def candidates(case: Case) -> list[str]:
    """The kernels that may be chosen for a case, whatever its number of tokens, without forcing."""
    found = (p.kernel for p in PREFERENCES if _is_candidate(p.kernel, case))
    return [*dict.fromkeys(found)]


def _is_candidate(name: str, case: Case) -> bool:
    dtypes = next((p.dtypes for p in PREFERENCES if p.kernel == name), ())
    return case.dtype in dtypes and not KERNELS[name].refuses(case)


def _forced(name: str, case: Case) -> str:
    if name not in KERNELS:
        raise InputError(f"{VARIABLE}={name}: no such kernel; there are {', '.join(KERNELS)}")
    if reason := KERNELS[name].refuses(case):
        raise InputError(
            f"{VARIABLE}={name}: it cannot multiply {case.tokens} x {case.columns} activations by "
            f"{case.rows} x {case.columns} weights of {case.bits} bits: {reason}"
        )
    return name


def packed_linear(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """``x @ W.T`` with a packed ``W``.

    Parameters
    ----------
    x : [..., K] floating point.
    matrix : W, [R, K].

    Returns
    -------
    [..., R] in x's dtype.

    Raises
    ------
    InputError
        If x, or the tensors of the matrix, are not as described.
    """
    _check_columns(x, matrix.columns)
    rows = x.reshape(-1, matrix.columns)
    out = packed_linears(rows, matrix.stack(), [len(rows)])
    return out.reshape(*x.shape[:-1], matrix.rows)


def packed_linears(x: Tensor, stack: PackedStack, counts: Sequence[int]) -> Tensor:
    """The product of each matrix of a stack with its own rows of ``x``.

    A gradient by ``x`` is that of the dequantised weights, which it keeps in memory.

    Parameters
    ----------
    x : [N, K] floating point; first the rows of the first matrix, then those of the second, ….
    stack : W, [n, R, K].
    counts : rows of each matrix, length n, any of them 0; their sum is N.

    Returns
    -------
    [N, R] in x's dtype.

    Raises
    ------
    InputError
        If x, counts, or the tensors of the stack, are not as described.
    """
    _check_product(x, stack, counts)
    used = [slot for slot, count in enumerate(counts) if count]
    if not used:
        return x.new_empty(0, stack.rows)
    if x.requires_grad and torch.is_grad_enabled():
        # The others write over what backward needs.
        return chunked.chunked(x, stack, used, [counts[slot] for slot in used])
    chosen = {count: _choose(x, stack, count) for count in {counts[slot] for slot in used}}
    kernels = [chosen[counts[slot]] for slot in used]
    if len(set(kernels)) == 1:
        return KERNELS[kernels[0]].run(x, stack, used, [counts[slot] for slot in used])
    out = x.new_empty(len(x), stack.rows)
    start = 0
    for name, run in groupby(zip(kernels, used, strict=True), key=lambda pair: pair[0]):
        slots = [slot for _, slot in run]
        here = [counts[slot] for slot in slots]
        stop = start + sum(here)
        out[start:stop] = KERNELS[name].run(x[start:stop], stack, slots, here)
        start = stop
    return out


def _check_product(x: Tensor, stack: PackedStack, counts: Sequence[int]) -> None:
    stack.check()
    _check_dtype(x.dtype)
    _check_columns(x, stack.columns)
    scales = stack.weight.scales
    if x.ndim != 2 or x.device != scales.device:
        raise InputError(
            f"activations have shape {list(x.shape)} and are on {x.device}: packed_linears takes "
            f"[tokens, columns] on {scales.device}, where the matrices are"
        )
    if len(counts) != len(scales) or sum(counts) != len(x) or (len(counts) and min(counts) < 0):
        raise InputError(
            f"counts {list(counts)} do not share {len(x)} rows among {len(scales)} matrices: give "
            "one for each matrix, 0 or more, which sum to the rows"
        )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in EVERY_DTYPE:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in EVERY_DTYPE)
        raise InputError(f"activations are {dtype}; products take {allowed}")


def _check_columns(x: Tensor, columns: int) -> None:
    if not x.ndim or x.shape[-1] != columns:
        raise InputError(f"activations have shape {list(x.shape)}, not [..., {columns}] as weights")


def _choose(x: Tensor, stack: PackedStack, tokens: int) -> str:
    case = Case(
        rows=stack.rows,
        columns=stack.columns,
        bits=stack.bits,
        group_size=stack.group_size,
        tokens=tokens,
        dtype=x.dtype,
        device=x.device.type,
    )
    return choose_kernel(case)
