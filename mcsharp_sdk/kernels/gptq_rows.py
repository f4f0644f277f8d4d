"""Grids and codes of many rows at once, on the CPU.

The arithmetic is that of :mod:`mcsharp_sdk.quantization.search` and
:mod:`mcsharp_sdk.quantization.gptq`, in fp32, with sums in another order.

Imported only where numba is installed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mcsharp_sdk.kernels.gptq_loops import code_tiles, search_tiles
from mcsharp_sdk.kernels.threads import in_shares


def search_groups(
    weights: Tensor,
    importance: Tensor,
    codes: tuple[int, float],
    limits: tuple[float, float],
    search: tuple[Sequence[float], Sequence[float], int],
) -> tuple[Tensor, Tensor]:
    """Scale and offset of the zero point from the grid's middle of each row, fp32 [n, R] both.

    Parameters
    ----------
    weights : fp32 [n, g, R], the group's columns, transposed.
    importance : fp32 [n or 1, g].
    codes : the largest code, and the distance of zero points.
    limits : smallest and largest scale, positive fp16 numbers.
    search : ``clip_ratios``, ``neighbours`` and ``refinements`` of the settings.
    """
    if weights.stride(-1) != 1:
        weights = weights.contiguous()
    n, _, rows = weights.shape
    found = np.empty((2, n, rows), np.float32)
    ratios, neighbours, rounds = search
    arguments = (
        flat_memory(weights),
        weights.stride()[:2],
        importance.expand(n, -1).contiguous().numpy(),
        tuple(map(np.float32, codes)),
        tuple(map(np.float32, limits)),
        np.array(ratios, np.float32),
        np.array(neighbours, np.float32),
        rounds,
        found,
    )

    def work(share: int, shares: int) -> None:
        search_tiles(*arguments, (share, shares))

    in_shares(work, weights.numel() * (len(ratios) + rounds * (len(neighbours) + 2)))
    scales, offsets = torch.from_numpy(found)
    return scales, offsets


def quantise_columns(exact: Tensor, updates: Tensor | None, top: Tensor, error: Tensor) -> Tensor:
    """Codes of columns given in units of the scale; their errors go to ``error``.

    Parameters
    ----------
    exact : fp32 [B, n, R], its columns side by side; not changed.
    updates : fp32 [B, n, n], U_ij/U_ii; None leaves errors where they arise.
    top : fp32 [B, R], the largest codes, at most 255.
    error : fp32 [B, n, R], its columns side by side, written.

    Returns
    -------
    uint8 [B, n, R]

    Raises
    ------
    ValueError
        If columns do not lie side by side: they are read and written by address.
    """
    if any(tensor.stride()[1:] != (exact.shape[2], 1) for tensor in (exact, error)):
        raise ValueError("columns of the weights and of their errors must lie side by side")
    codes = torch.empty(exact.shape, dtype=torch.uint8)
    compensate = updates is not None
    top = top.contiguous()
    arguments = (
        exact.data_ptr(),
        4 * exact.stride(0),
        (exact.new_empty(1, 1, 1) if updates is None else updates.contiguous()).numpy(),
        compensate,
        top.data_ptr(),
        error.data_ptr(),
        4 * error.stride(0),
        codes.data_ptr(),
        tuple(exact.shape),
    )

    def work(share: int, shares: int) -> None:
        code_tiles(*arguments, (share, shares))

    in_shares(work, exact.numel() * (exact.shape[1] / 2 if compensate else 1))
    return codes


def flat_memory(tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The memory from a tensor's first element to its last."""
    span = 1 + sum((size - 1) * by for size, by in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).numpy()
