"""The interface that kernels join, and the dispatcher that picks one of them.

A kernel is a function of activations and a :class:`PackedMatrix`. To add one, put it into
``KERNELS`` with the test that says which cases it takes; the first that takes a case gets it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mcsharp_sdk.kernels.chunked import chunked_linear
from mcsharp_sdk.kernels.matrix import PackedMatrix


@dataclass(frozen=True)
class Kernel:
    """One way to multiply by a packed matrix.

    Attributes
    ----------
    takes : whether the kernel can serve these activations and this matrix.
    run : x [T, K], matrix -> [T, R] in x's dtype.
    """

    takes: Callable[[Tensor, PackedMatrix], bool]
    run: Callable[[Tensor, PackedMatrix], Tensor]


KERNELS: dict[str, Kernel] = {
    "chunked": Kernel(takes=lambda x, matrix: True, run=chunked_linear),
}
"""Name -> kernel, fastest first; the last one takes everything."""


def packed_linear(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """``x @ W.T`` with a packed ``W``.

    Parameters
    ----------
    x : [..., K] floating point.
    matrix : W, [R, K].

    Returns
    -------
    [..., R] in x's dtype.
    """
    rows = x.reshape(-1, matrix.columns)
    kernel = next(k for k in KERNELS.values() if k.takes(rows, matrix))
    return kernel.run(rows, matrix).reshape(*x.shape[:-1], matrix.rows)
