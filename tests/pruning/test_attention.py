"""Chunked column sums against the whole attention map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcsharp_sdk.pruning import received_attention

BATCH, HEADS, KEY_HEADS, LENGTH, WIDTH = 2, 4, 2, 11, 8


def heads(count: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, count, length, WIDTH, generator=generator)


def whole_map(query: Tensor, key: Tensor, attends: Tensor, scaling: float) -> Tensor:
    """Column sums of the full maps; ``attends`` bool [B, Lq, Lk]; rows without any are zero."""
    total = torch.zeros(BATCH, key.shape[2])
    for b in range(BATCH):
        for h in range(HEADS):
            scores = query[b, h] @ key[b, h * key.shape[1] // HEADS].T * scaling
            chances = scores.masked_fill(~attends[b], -torch.inf).softmax(-1).nan_to_num(0.0)
            total[b] += chances.sum(0) / HEADS
    return total


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("key_heads", [1, KEY_HEADS, HEADS])
def test_causal_sums_without_a_mask(chunk: int, key_heads: int) -> None:
    query, key = heads(HEADS, LENGTH, 0), heads(key_heads, LENGTH, 1)
    found = received_attention(query, key, None, scaling=None, causal=True, chunk=chunk)
    causal = torch.ones(LENGTH, LENGTH).tril().bool().expand(BATCH, -1, -1)
    torch.testing.assert_close(found, whole_map(query, key, causal, WIDTH**-0.5))
    assert found.sum(1).tolist() == pytest.approx([LENGTH] * BATCH, rel=1e-5)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("past", [0, 5])
def test_masked_sums_of_padded_batches_and_cached_keys(kind: str, past: int) -> None:
    query, key = heads(HEADS, LENGTH, 0), heads(KEY_HEADS, past + LENGTH, 1)
    attends = torch.ones(LENGTH, past + LENGTH).tril(past).bool().repeat(BATCH, 1, 1)
    attends[1, :, :3] = False  # padding on the left: without a past, three rows see nothing
    mask = attends[:, None]
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    found = received_attention(query, key, mask, scaling=0.3, causal=True, chunk=4)
    torch.testing.assert_close(found, whole_map(query, key, attends, 0.3))
    assert (found[1, :3] == 0).all()


def test_queries_that_are_not_valid_do_not_count() -> None:
    query, key = heads(HEADS, LENGTH, 0), heads(KEY_HEADS, LENGTH, 1)
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid[0, 6:] = False  # padding on the right: its rows attend to real tokens
    causal = torch.ones(LENGTH, LENGTH).tril().bool().repeat(BATCH, 1, 1)
    attends = causal & valid[:, :, None]
    found = received_attention(query, key, None, scaling=1.0, causal=True, valid=valid, chunk=3)
    torch.testing.assert_close(found, whole_map(query, key, attends, 1.0))


def test_half_precision_sums_are_accumulated_in_float32() -> None:
    query = torch.zeros(1, 1, 5000, 4, dtype=torch.bfloat16)
    found = received_attention(query, query, None, scaling=1.0, causal=False)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.ones(1, 5000))
