"""SDPA attention that also tells how much attention each token of the batch received.

transformers calls it under the name ``mcsharp_sdpa``; it computes what ``sdpa`` does, bit for bit.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.pruning.attention import received_attention

NAME = "mcsharp_sdpa"
PLAIN = "sdpa"
_TAP = "received_attention_tap"


class TokenBatch(threading.local):
    """The tokens of a thread's present forward: bool [B, L], false for padding."""

    valid: Tensor | None = None

    def __reduce__(self) -> tuple[type[TokenBatch], tuple[()]]:
        """A copy is of no forward yet."""
        return TokenBatch, ()


class Sums(threading.local):
    """What the tokens of a thread's present forward received, float32 [B, L]."""

    received: Tensor | None = None

    def __reduce__(self) -> tuple[type[Sums], tuple[()]]:
        """A copy is of no forward yet."""
        return Sums, ()


@dataclass(eq=False)
class AttentionTap:
    """Carries one layer's sums from its attention to its pruner, within one forward.

    Attributes
    ----------
    batch : the model's present tokens.
    wanted : whether the sums are needed; they are not computed otherwise.
    sums : of the present forward.
    """

    batch: TokenBatch
    wanted: bool = False
    sums: Sums = field(default_factory=Sums)

    def take(self) -> Tensor | None:
        """The sums, once."""
        received, self.sums.received = self.sums.received, None
        return received


def attach_tap(layer: nn.Module, tap: AttentionTap) -> None:
    """Let the attention of a decoder layer fill ``tap``."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):  # every attention has one, for its part of the cache
            setattr(module, _TAP, tap)


def use_received_attention(decoder: Any, needed: bool) -> None:
    """Switch a decoder's attention to the one with sums, or back to plain SDPA.

    Raises
    ------
    InputError
        If the sums are needed, but the decoder runs another implementation than SDPA.
    """
    present = decoder.config._attn_implementation
    if needed == (present == NAME):
        return
    if needed and present != PLAIN:
        raise InputError(
            f"this expert pruning ranks tokens by the attention that they receive, which needs "
            f"attn_implementation={PLAIN!r}; the model runs {present!r}. Load it with {PLAIN!r} "
            f"or call model.set_attn_implementation({PLAIN!r}) first"
        )
    decoder.set_attn_implementation(NAME if needed else PLAIN)
    if needed != (decoder.config._attn_implementation == NAME):
        raise InputError(
            f"{type(decoder).__name__} cannot change its attention implementation, so its experts "
            "cannot be pruned by received attention"
        )


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As :func:`transformers.integrations.sdpa_attention.sdpa_attention_forward`."""
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
    )
    tap: AttentionTap | None = getattr(module, _TAP, None)
    if tap is not None and tap.wanted and query.shape[2] > 1:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        tap.sums.received = _received(query, key, attention_mask, scaling, causal, tap.batch.valid)
    return output, None


def _received(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    causal: bool,
    valid: Tensor | None,
) -> Tensor:
    """Sums of the columns that belong to the tokens of this forward, [B, L]."""
    length = query.shape[2]
    if mask is None:
        # SDPA's own rule: without a mask the keys of this forward stand first, in an empty cache.
        key, start = key[:, :, :length], 0
    else:
        start = first_own_key(mask, key.shape[2])
    valid = None if valid is None else valid.to(query.device)
    sums = received_attention(query, key, mask, scaling=scaling, causal=causal, valid=valid)
    return sums[:, start : start + length]


def first_own_key(mask: Tensor, keys: int) -> int:
    """Column of an attention mask [B, 1, Lq, keys] at which the queries' own keys begin.

    They stand behind those of a cache, and before the empty places of a static one; a token that
    is no padding sees its own key and none behind it.
    """
    queries = mask.shape[2]
    if keys == queries:
        return 0
    seen = attended(mask).flatten(0, 1).any(0)
    last = keys - 1 - seen.flip(-1).to(torch.uint8).argmax(-1)
    own = torch.where(seen.any(-1), last, 0) - torch.arange(queries, device=mask.device)
    return int(own.max().clamp(0, keys - queries))


def attended(mask: Tensor) -> Tensor:
    """An attention mask as bool, from bool or from what is added to the scores."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


AttentionInterface.register(NAME, _forward)
# Without a mask function of the same name transformers makes no mask at all.
AttentionMaskInterface.register(NAME, sdpa_mask)
