"""Colours of heat maps: even to the eye, and the same ladder with any colour vision.

The colours are those of cividis (Nuñez, Anderton, Renslow 2018, arXiv 1712.01662), which was made
for readers with red-green blindness: lightness alone, which rises evenly, carries the value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mcsharp_sdk.report.elements import short_text

CIVIDIS = (
    "#00224e",
    "#123570",
    "#3b496c",
    "#575d6d",
    "#707173",
    "#8a8678",
    "#a59c74",
    "#c3b369",
    "#e1cc55",
    "#fee838",
)
"""Samples at equal distances; between them colours are mixed."""

DARK_INK, LIGHT_INK = "#000000", "#ffffff"
NOTHING = "#9aa3ad"
"""Of values that have no place on a logarithmic scale, or are not known."""

LOGARITHMIC_FROM = 30.0
"""Values that differ by more than this factor are shaded by their logarithm."""

LEGEND_STEPS = 20


class Shading(Protocol):
    """Value -> colour, and the legend for it."""

    def colour(self, value: float) -> str:
        """``#rrggbb`` of a value."""

    def legend(self) -> list[tuple[str, str]]:
        """Colours in order of value, each with a label, which may be empty; no colour is a gap."""


@dataclass(frozen=True)
class Gradual:
    """Shades that go with the value, or with its logarithm.

    Attributes
    ----------
    low, high : values at the ends, ``low <= high``; positive if ``log``.
    log : equal ratios get equal steps of colour.
    zeros : there are zeros, which a logarithmic scale has no place for.
    """

    low: float
    high: float
    log: bool = False
    zeros: bool = False

    @classmethod
    def over(cls, values: Iterable[float]) -> Gradual:
        """Shades for these values: linear from 0, or logarithmic where they differ very much."""
        finite = [v for v in values if math.isfinite(v)]
        positive = [v for v in finite if v > 0]
        if positive and max(positive) / min(positive) > LOGARITHMIC_FROM:
            return cls(min(positive), max(positive), log=True, zeros=min(finite) <= 0)
        return cls(min(0.0, *finite), max(finite)) if len(finite) > 1 else cls(0.0, 1.0)

    def share(self, value: float) -> float | None:
        """Place of a value between the ends, 0 to 1; None if it has none."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return None
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return min(1.0, max(0.0, (at - low) / (high - low))) if high > low else 0.5

    def colour(self, value: float) -> str:
        share = self.share(value)
        return NOTHING if share is None else cividis(share)

    def legend(self) -> list[tuple[str, str]]:
        named = {0, LEGEND_STEPS // 2, LEGEND_STEPS}
        steps = [(i, self._at(i / LEGEND_STEPS)) for i in range(LEGEND_STEPS + 1)]
        zero = [(NOTHING, "0"), *[("", "")] * 3] if self.zeros else []
        return zero + [(self.colour(v), short_text(v) if i in named else "") for i, v in steps]

    def _at(self, share: float) -> float:
        if self.log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + share * (self.high - self.low)


@dataclass(frozen=True)
class Stepped:
    """A shade for each of a few whole numbers, such as bit widths; ``values`` ascend."""

    values: Sequence[int]

    def colour(self, value: float) -> str:
        if value not in self.values:
            return NOTHING
        last = len(self.values) - 1
        return cividis(self.values.index(int(value)) / last if last else 0.5)

    def legend(self) -> list[tuple[str, str]]:
        return [(self.colour(value), str(value)) for value in self.values]


def cividis(share: float) -> str:
    """Colour at ``share`` (0 to 1) of the scale."""
    place = share * (len(CIVIDIS) - 1)
    first = min(int(place), len(CIVIDIS) - 2)
    pairs = zip(channels(CIVIDIS[first]), channels(CIVIDIS[first + 1]), strict=True)
    return "#" + "".join(f"{round(a + (place - first) * (b - a)):02x}" for a, b in pairs)


def channels(colour: str) -> tuple[int, int, int]:
    """Red, green and blue of ``#rrggbb``, 0 to 255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it, 0 for black to 1 for white."""
    linear = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (value / 255 for value in channels(colour))
    )
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """Contrast ratio as WCAG 2.2 defines it, 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    return max((DARK_INK, LIGHT_INK), key=lambda ink: contrast(ink, colour))
