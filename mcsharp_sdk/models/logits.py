"""How many logits are held at once: vocabularies are large."""

from __future__ import annotations

LOGITS_AT_ONCE = 2**24
"""In elements: 64 MiB of float32, and as much again for each gradient."""


def positions_at_once(vocabulary: int, sequences: int = 1) -> int:
    """Positions of so many sequences whose logits may be held at once."""
    return max(1, LOGITS_AT_ONCE // (vocabulary * sequences))
