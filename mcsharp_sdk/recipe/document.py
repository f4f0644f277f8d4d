"""A recipe's plain data together with where each piece of it was written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from mcsharp_sdk.errors import InputProblems, Problem

Location = tuple[str | int, ...]
"""Keys and list indices from the top of the recipe, e.g. ``("stages", 2, "group_size")``."""


@dataclass(frozen=True)
class Place:
    """Where an entry was written.

    ``line`` is that of the value where the value is a scalar, else that of the key; ``override``
    is the text of the override that set the entry, empty for the file's own entries.
    """

    line: int
    key_line: int
    override: str = ""


@dataclass(frozen=True)
class Finding:
    """Something wrong with the entry at ``location``, or with the text of an override.

    ``line`` is given where it is not that of the entry's place.
    """

    location: Location
    message: str
    of_key: bool = False
    line: int | None = None
    override: str = ""


@dataclass
class Document:
    """Plain data (dict, list, scalars), the places of its entries and what is wrong so far.

    Attributes
    ----------
    name : how the file is called in front of a line number.
    subject : how the file is called in the heading of an error.
    text : the source; empty if there was none.
    changed : the data differ from the text, by an override or by the environment.
    """

    name: str
    subject: str
    text: str = ""
    data: Any = None
    places: dict[Location, Place] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    changed: bool = False

    def add(self, location: Location, message: str, *, line: int | None = None) -> None:
        self.findings.append(Finding(location, message, line=line))

    def forget(self, location: Location) -> None:
        """Drop the places and findings of an entry and of all below it."""
        depth = len(location)
        self.places = {k: v for k, v in self.places.items() if k[:depth] != location}
        self.findings = [f for f in self.findings if f.location[:depth] != location]

    def error(self, findings: Iterable[Finding]) -> InputProblems:
        """All findings as one error, in the order in which they stand in the file."""
        ordered = sorted(findings, key=self._line)
        return InputProblems(self.subject, [Problem(self._where(f), _text(f)) for f in ordered])

    def _place(self, location: Location) -> Place | None:
        for depth in range(len(location), -1, -1):
            if place := self.places.get(location[:depth]):
                return place
        return None

    def _line(self, finding: Finding) -> float:
        if finding.line is not None:
            return finding.line
        place = self._place(finding.location)
        if place is None or place.override or finding.override:
            return math.inf
        return place.key_line if finding.of_key else place.line

    def _where(self, finding: Finding) -> str:
        place = self._place(finding.location)
        override = finding.override or (place.override if place and finding.line is None else "")
        if override:
            return f"--set {override if len(override) <= 80 else override[:77] + '...'}"
        line = self._line(finding)
        return f"{self.name}:{int(line)}" if line != math.inf else ""


def _text(finding: Finding) -> str:
    path = path_text(finding.location)
    return f"{path}: {finding.message}" if path else finding.message


def path_text(location: Location) -> str:
    """``("stages", 2, "group_size")`` as ``stages[2].group_size``."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")


def suggestion(wrong: str, valid: Iterable[str], *, otherwise: str = "") -> str:
    """``; did you mean 'x'?`` with the nearest valid name, or what there is to choose from."""
    names = sorted(valid)
    lower = {name.lower(): name for name in names}
    near = get_close_matches(wrong.lower(), lower, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{lower[near[0]]}'?"
    return f"; {otherwise}{', '.join(names)}" if otherwise and names else ""
