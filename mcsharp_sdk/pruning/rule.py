"""Dropping experts by their routing weights alone.

MC (arXiv 2410.06270, §3.3) drops a token's second expert if its weight is small beside that of the
first. Here the same is done for any number of experts per token: that for more than two, each rank
has a threshold of its own, is our choice.

Everywhere, ``weights`` are the routing weights as the experts get them, positive, in any order of
slots; the *rank* of a slot is its place by descending weight within the token, from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcsharp_sdk.errors import InputError


def ranked(weights: Tensor) -> Tensor:
    """Slots of each token by descending weight, ties by slot: int64 [T, k] from [T, k]."""
    return weights.float().argsort(dim=-1, descending=True, stable=True)


def in_slot_order(by_rank: Tensor, order: Tensor) -> Tensor:
    """``by_rank`` [T, k], given for each rank, moved to the slots that have these ranks.

    Parameters
    ----------
    by_rank : any dtype [T, k].
    order : int64 [T, k], see :func:`ranked`.
    """
    return torch.empty_like(by_rank).scatter_(-1, order, by_rank)


def weight_rule(weights: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Which slots are kept: that of rank i >= 1 is dropped iff w_i / w_0 < thresholds[i-1].

    Quotients, not products, are compared, as :func:`slot_thresholds` takes quantiles of quotients:
    a slot that is at the quantile itself is kept.

    Parameters
    ----------
    weights : floating [T, k]; divided and compared in float32.
    thresholds : k - 1 numbers, for the ranks from 1. Zeros drop nothing.

    Returns
    -------
    bool [T, k], by slot. The largest weight is always kept.

    Raises
    ------
    InputError
        If there are not k - 1 thresholds.
    """
    k = weights.shape[-1]
    if len(thresholds) != k - 1:
        raise InputError(f"{k} experts per token need {k - 1} thresholds, not {len(thresholds)}")
    order = ranked(weights)
    by_rank = weights.float().gather(-1, order)
    # A first threshold of 0 keeps rank 0 by the same comparison.
    least = by_rank.new_tensor([0.0, *thresholds])
    return in_slot_order(~(_ratios(by_rank) < least), order)


def slot_thresholds(weights: Tensor, quantile: float) -> list[float]:
    """Thresholds by which, of these tokens, about the share ``quantile`` drops each rank.

    Parameters
    ----------
    weights : floating [T, k] of calibration tokens, T >= 1.
    quantile : from 0 to 1; 0.5 gives the median, as MC takes it.

    Returns
    -------
    k - 1 numbers: for each rank i >= 1 the quantile over tokens of w_i / w_0, between neighbours
    by linear interpolation.

    Raises
    ------
    InputError
        If there is no token, or ``quantile`` is not from 0 to 1.
    """
    if not weights.shape[0]:
        raise InputError("thresholds need the routing weights of one token at least")
    if not 0 <= quantile <= 1:
        raise InputError(f"a quantile of {quantile} is not from 0 to 1")
    by_rank = weights.float().sort(dim=-1, descending=True).values
    ratios = _ratios(by_rank)[:, 1:].double()
    return [_quantile(column, quantile) for column in ratios.unbind(1)]


def _ratios(by_rank: Tensor) -> Tensor:
    """w_i / w_0, float32 [T, k]; 1 where w_0 is 0."""
    first = by_rank[:, :1]
    return torch.where(first > 0, by_rank / first, torch.ones_like(first))


def _quantile(values: Tensor, quantile: float) -> float:
    """Quantile of (n,), like ``torch.quantile`` but for any n."""
    ascending = values.sort().values
    place = quantile * (len(ascending) - 1)
    below = int(place)
    above = min(below + 1, len(ascending) - 1)
    return torch.lerp(ascending[below], ascending[above], place - below).item()


def renormalise(weights: Tensor, keep: Tensor) -> Tensor:
    """Set dropped weights to 0 and scale the kept ones so that each token's sum stays.

    Parameters
    ----------
    weights : floating [T, k].
    keep : bool [T, k].

    Returns
    -------
    [T, k] in the dtype of ``weights``, computed in float32. A token that keeps everything keeps
    its weights bit for bit; one that keeps nothing gets zeros.
    """
    exact = weights.float()
    kept = torch.where(keep, exact, torch.zeros_like(exact))
    before, after = exact.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
    scale = torch.where(after > 0, before / after, torch.zeros_like(after))
    whole = keep.all(-1, keepdim=True)
    return torch.where(whole, weights, (kept * scale).to(weights.dtype))
