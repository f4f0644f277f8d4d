"""Lists with one entry for each MoE layer, as artifacts hold them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

from mcsharp_sdk.errors import InputError


class OfLayer(Protocol):
    """Something that is known of one decoder layer."""

    @property
    def layer(self) -> int:
        """Index of the decoder layer."""


Entry = TypeVar("Entry", bound=OfLayer)


def ordered_layers(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries by ascending layer.

    Raises
    ------
    InputError
        If there are none, or two of one layer.
    """
    ordered = tuple(sorted(entries, key=lambda entry: entry.layer))
    if not ordered:
        raise InputError("there are no layers")
    twice = [a.layer for a, b in itertools.pairwise(ordered) if a.layer == b.layer]
    if twice:
        raise InputError(f"layer {twice[0]} stands there twice")
    return ordered


def layer_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of ``layers`` in an artifact's JSON; InputError if they are no objects."""
    rows = content.get("layers")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("'layers' must be a list with one object per MoE layer")
    return rows
