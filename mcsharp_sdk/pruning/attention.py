"""How much attention each token receives, without keeping an attention map.

The map of a sequence of n tokens has n² entries per head. Here its columns are summed a few rows
(queries) at a time, so that n·chunk entries per head are held at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64


@torch.no_grad()
def received_attention(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    causal: bool,
    valid: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Column sums of softmax(QKᵀ), over the valid queries, mean over the heads.

    Parameters
    ----------
    query : [B, heads, Lq, D].
    key : [B, key heads, Lk, D]; each serves heads / key heads neighbouring query heads.
    mask : [B or 1, heads or 1, Lq, >= Lk], bool (true = attends) or added to the scores; None for
        no mask but ``causal``. A query that attends to nothing gives nothing.
    scaling : factor of the scores; None for 1/√D.
    causal : without a mask, query i attends to the keys up to i; Lk must be Lq then.
    valid : bool [B, Lq], queries that count; None for all.
    chunk : queries at once.

    Returns
    -------
    float32 [B, Lk]. Scores are computed in the dtype of ``query``, the softmax in float32.
    """
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    key = key.transpose(2, 3)
    factor = width**-0.5 if scaling is None else scaling
    causal = causal and mask is None
    counts = query.new_ones(batch, queries, dtype=torch.float32) if valid is None else valid.float()
    total = query.new_zeros(batch, keys, dtype=torch.float32)
    for start in range(0, queries, chunk):
        stop = min(start + chunk, queries)
        seen = stop if causal else keys  # later keys get nothing from these queries
        scores = _scores(query[:, :, start:stop], key[..., :seen]).float() * factor
        if mask is not None:
            shares = _masked(scores, mask[:, :, start:stop, :seen]).softmax(-1).nan_to_num_(0.0)
        elif causal:
            scores[..., start:].masked_fill_(_future(stop - start, query.device), float("-inf"))
            shares = scores.softmax(-1)
        else:
            shares = scores.softmax(-1)
        total[:, :seen] += (counts[:, None, None, start:stop] @ shares).sum(1).squeeze(1)
    return total / heads


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """[B, heads, c, n] from query [B, heads, c, D] and key [B, key heads, D, n]."""
    batch, heads, rows, width = query.shape
    # The query heads of a key head stand one below the other, so that no key is copied.
    grouped = query.reshape(batch, key.shape[1], -1, width)
    return (grouped @ key).view(batch, heads, rows, -1)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask.float()


def _future(rows: int, device: torch.device) -> Tensor:
    """bool [rows, rows]: of keys that begin with the queries, those behind each query."""
    return torch.ones(rows, rows, dtype=torch.bool, device=device).triu(1)
