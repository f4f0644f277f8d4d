"""Compiled versions of quantising's inner loops, on devices that have them.

Kernels stand above this package, so that they are imported when they are first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor

ColumnLoop = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]
"""Codes of columns; arguments as of ``kernels.gptq_rows.quantise_columns``."""

GroupSearch = Callable[
    [
        Tensor,
        Tensor,
        tuple[int, float],
        tuple[float, float],
        tuple[Sequence[float], Sequence[float], int],
    ],
    tuple[Tensor, Tensor],
]
"""Scale and offset of rows; arguments as of ``kernels.gptq_rows.search_groups``."""

ZeroPointSearch = Callable[
    [Tensor, int, float, tuple[float, float], Sequence[float]], tuple[Tensor, Tensor]
]
"""Scale and zero point of rows; arguments as of ``kernels.half_quadratic.fit_zero_points``."""

FEWEST_ROWS = 16
"""Rows of a matrix that a loop over columns needs."""


@cache
def column_loop(device: str) -> ColumnLoop | None:
    """The loop over columns for a kind of device, if there is one."""
    from mcsharp_sdk.kernels import gpu_support, support

    if device == "cuda" and not gpu_support.missing_support(device):
        from mcsharp_sdk.kernels import triton_gptq

        return triton_gptq.quantise_columns
    if device == "cpu" and not support.missing_support():
        from mcsharp_sdk.kernels import gptq_rows

        return gptq_rows.quantise_columns
    return None


@cache
def group_search(device: str, columns: int) -> GroupSearch | None:
    """The search for a kind of device and groups of so many columns, if there is one."""
    from mcsharp_sdk.kernels import gpu_support, support

    if device == "cuda" and not gpu_support.missing_support(device):
        from mcsharp_sdk.kernels import triton_search

        return triton_search.search_groups if columns <= triton_search.LONGEST_GROUP else None
    if device == "cpu" and not support.missing_support():
        from mcsharp_sdk.kernels import gptq_rows

        return gptq_rows.search_groups
    return None


@cache
def zero_point_search(device: str) -> ZeroPointSearch | None:
    """The half-quadratic search for a kind of device, if there is one."""
    from mcsharp_sdk.kernels import support

    if device == "cpu" and not support.missing_support():
        from mcsharp_sdk.kernels import half_quadratic

        return half_quadratic.fit_zero_points
    return None
