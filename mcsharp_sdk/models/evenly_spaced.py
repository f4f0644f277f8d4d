"""Some of many tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def evenly_spaced(count: int, most: int) -> Tensor:
    """At most ``most`` of the numbers below ``count``, the first and the last among them.

    In whole numbers: float32 knows no odd ones above 2**24.

    Returns
    -------
    int64 [min(count, most)], ascending; the first alone if ``most`` is 1.
    """
    chosen = min(count, most)
    return torch.arange(chosen) * (count - 1) // max(1, chosen - 1)
