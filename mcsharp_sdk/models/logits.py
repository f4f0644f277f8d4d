"""How many logits are held at once: vocabularies are large."""

from __future__ import annotations

from typing import Any

LOGITS_AT_ONCE = 2**24
"""In elements: 64 MiB of float32, and as much again for each gradient."""


def positions_at_once(config: Any, sequences: int) -> int:
    """Positions of so many sequences whose logits a model with this config may hold at once."""
    return max(1, LOGITS_AT_ONCE // (int(config.get_text_config().vocab_size) * sequences))
