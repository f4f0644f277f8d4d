"""How important a token is, by several measures, and the most or least important tokens.

The measures are computed from the hidden states as the experts get them. ``attention`` is Eq. 6 of
MC (arXiv 2410.06270); the others are those that the paper compares it with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mcsharp_sdk.errors import InputError

ATTENTION = "attention"

LARGEST = float(torch.finfo(torch.float32).max)


def token_importance(metric: str, hidden: Tensor, received: Tensor | None, valid: Tensor) -> Tensor:
    """Importance of every token.

    Parameters
    ----------
    metric : a name of ``METRICS``.
    hidden : floating [B, L, H].
    received : [B, L], attention that each token receives
        (:func:`mcsharp_sdk.pruning.attention.received_attention`); only ``attention`` needs it.
    valid : bool [B, L], false for padding.

    Returns
    -------
    float32 [B, L], finite for finite input: what is too large for float32 is its largest number;
    0 for padding.

    Raises
    ------
    InputError
        If there is no such metric, or ``attention`` is asked for without ``received``.
    """
    if metric not in METRICS:
        raise InputError(f"no token metric {metric!r}; there are {', '.join(METRICS)}")
    if metric == ATTENTION and received is None:
        raise InputError("the metric 'attention' needs the attention that each token receives")
    importance = METRICS[metric](hidden.float(), received, valid)
    return importance.clamp(max=LARGEST).masked_fill(~valid, 0.0)


def most_important(importance: Tensor, valid: Tensor, share: float) -> Tensor:
    """The ⌈share·n⌉ most important of each sequence's n valid tokens.

    Parameters
    ----------
    importance : float [B, L].
    valid : bool [B, L], false for padding.
    share : from 0 to 1.

    Returns
    -------
    bool [B, L]. Of equally important tokens the earlier one counts as more important.
    """
    return _first(importance, valid, share, descending=True)


def least_important(importance: Tensor, valid: Tensor, share: float) -> Tensor:
    """The ⌈share·n⌉ least important tokens; ties: the earlier one. See :func:`most_important`."""
    return _first(importance, valid, share, descending=False)


def _first(importance: Tensor, valid: Tensor, share: float, *, descending: bool) -> Tensor:
    if not 0 <= share <= 1:
        raise InputError(f"a share of {share} of the tokens is not from 0 to 1")
    last = float("-inf") if descending else float("inf")
    sortable = importance.float().masked_fill(~valid, last)
    order = sortable.argsort(dim=-1, descending=descending, stable=True)
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    tokens = valid.sum(-1, keepdim=True).double()
    # Rounded first, so that 0.07 of 100 tokens are 7 and not 8.
    count = (share * tokens - 1e-9).ceil()
    return (place < count) & valid


def _attention(hidden: Tensor, received: Tensor | None, valid: Tensor) -> Tensor:
    """I_j = ‖x_j‖₁ · (attention received by j) / (n - j + 1), j from 1 among the valid tokens.

    The divisor is the number of tokens that can attend to j, itself among them.
    """
    assert received is not None
    later = valid.flip(-1).cumsum(-1).flip(-1).clamp(min=1)
    return hidden.abs().sum(-1).clamp(max=LARGEST) * received.float() / later


def _kurtosis(hidden: Tensor, received: Tensor | None, valid: Tensor) -> Tensor:
    """Fourth central moment over the squared variance; 0 for a constant vector."""
    shape, _ = _shape_and_size(hidden)
    centred = shape - shape.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    fourth = centred.square().square().mean(-1)
    return torch.where(variance > 0, fourth / variance.square(), torch.zeros_like(variance))


def _variance(hidden: Tensor, received: Tensor | None, valid: Tensor) -> Tensor:
    """Of the vector's elements, divided by their number."""
    shape, size = _shape_and_size(hidden)
    return shape.var(-1, correction=0) * size * size


def _shape_and_size(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors over their largest magnitude, so that powers neither overflow nor vanish, and that.

    [B, L, H] and [B, L]; the magnitude of zeros is given as 1.
    """
    size = hidden.abs().amax(-1)
    size = torch.where(size > 0, size, torch.ones_like(size))
    return hidden / size.unsqueeze(-1), size


def _mean(hidden: Tensor, received: Tensor | None, valid: Tensor) -> Tensor:
    """Mean magnitude of the vector's elements."""
    shape, size = _shape_and_size(hidden)
    return shape.abs().mean(-1) * size


METRICS: Mapping[str, Callable[[Tensor, Tensor | None, Tensor], Tensor]] = {
    ATTENTION: _attention,
    "kurtosis": _kurtosis,
    "variance": _variance,
    "mean": _mean,
}
"""Name -> measure of (hidden [B, L, H] float32, received [B, L], valid [B, L]): [B, L]."""
