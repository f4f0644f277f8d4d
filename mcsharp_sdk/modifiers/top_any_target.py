"""Shift what top-any networks ask for until they keep the share of experts that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mcsharp_sdk.pruning.top_any import TopAnyNetwork, kept_counts

HALVINGS = 40
TOLERANCE = 0.005
"""How far the share of kept experts on calibration tokens may be from the target."""


def keep_ratio(logits: Sequence[Tensor], shift: float = 0.0) -> float:
    """Mean share of experts that is kept, over all tokens and layers.

    Parameters
    ----------
    logits : per layer (T, k), of the counts 1 to k.
    shift : added once per expert of the count.
    """
    kept = [int(kept_counts(shifted(found, shift)).sum()) for found in logits]
    return sum(kept) / sum(found.numel() for found in logits)


def shifted(logits: Tensor, shift: float) -> Tensor:
    """Logits (T, k) with ``shift`` added once per expert of the count."""
    return logits + shift * _steps(logits)


def shift_for(logits: Sequence[Tensor], target: float) -> float:
    """The shift at which the keep ratio is nearest to ``target``, found by halving.

    Of all shifts with that ratio it is the middle one, so that rounding changes the choice of as
    few tokens as can be.
    """
    span = 1.0 + max(float(found.max() - found.min()) for found in logits)
    edge = _least_shift(logits, span, lambda ratio: ratio >= target)
    ratios = [keep_ratio(logits, shift) for shift in edge]
    best = min(ratios, key=lambda ratio: abs(ratio - target))
    _, first = _least_shift(logits, span, lambda ratio: ratio >= best)
    last, _ = _least_shift(logits, span, lambda ratio: ratio > best)
    return (first + last) / 2


def _least_shift(
    logits: Sequence[Tensor], span: float, reached: Callable[[float], bool]
) -> tuple[float, float]:
    """Neighbouring shifts up to ``span``, of which the second is the first to reach a keep ratio.

    The count with the largest shifted logit never falls as the shift rises, so neither does the
    keep ratio.
    """
    low, high = -span, span
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if reached(keep_ratio(logits, middle)):
            high = middle
        else:
            low = middle
    return low, high


def apply_shift(networks: Mapping[int, TopAnyNetwork], shift: float) -> None:
    """Add the shift to the networks' last biases, in place."""
    with torch.no_grad():
        for network in networks.values():
            bias = network.second.bias
            bias.add_(shift * _steps(bias))


def _steps(like: Tensor) -> Tensor:
    """0, 1, … along the last dimension of ``like``."""
    return torch.arange(like.shape[-1], dtype=like.dtype, device=like.device)
