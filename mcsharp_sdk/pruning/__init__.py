"""Which experts of a token can be left out: tensors in, tensors out."""

from mcsharp_sdk.pruning.attention import received_attention
from mcsharp_sdk.pruning.importance import (
    METRICS,
    least_important,
    most_important,
    token_importance,
)
from mcsharp_sdk.pruning.rule import ranked, renormalise, slot_thresholds, weight_rule
from mcsharp_sdk.pruning.top_any import (
    KEEP_ALL_BIAS,
    TopAnyNetwork,
    keep_mask,
    kept_counts,
    soft_keep,
)

__all__ = [
    "KEEP_ALL_BIAS",
    "METRICS",
    "TopAnyNetwork",
    "keep_mask",
    "kept_counts",
    "least_important",
    "most_important",
    "ranked",
    "received_attention",
    "renormalise",
    "slot_thresholds",
    "soft_keep",
    "token_importance",
    "weight_rule",
]
