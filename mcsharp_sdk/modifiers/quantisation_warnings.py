"""What to tell about layers whose quantisation needed help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mcsharp_sdk.errors import MOST_NAMED, some_of

_MEANINGS = {
    "starved": "few tokens reached these experts, so their Hessians lean on those of all tokens, "
    "and more 'sequences' would serve them",
    "raised_damping": "the Hessians of these matrices needed more damping",
    "fallbacks": "these matrices were rounded to nearest, since no damping helped",
}
"""Kind of note about a layer -> what it means."""


def quantisation_warnings(notes: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
    """One warning for each kind of note that some layer has.

    Parameters
    ----------
    notes : decoder layer -> what :meth:`LayerNotes.to_json` gave.
    """
    for what, meaning in _MEANINGS.items():
        noted = [f"layer {i}: {n}" for i, note in notes.items() for n in _names(note[what])]
        if noted:
            yield f"{meaning}: {_listed(noted)}"


def _names(noted: Mapping[str, int] | Sequence[str]) -> Sequence[str]:
    """Of matrices, or of experts with their tokens."""
    if isinstance(noted, Mapping):
        return [f"expert {expert} ({count} tokens)" for expert, count in noted.items()]
    return noted


def _listed(noted: Sequence[str]) -> str:
    rest = ", all named in the report's JSON" if len(noted) > MOST_NAMED else ""
    return some_of(noted, "; ") + rest
