"""What a page is made of, before it is HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TALL, LONG = 24, 30
"""Rows and characters of a cell from which a table needs care on a small screen."""


@dataclass(frozen=True)
class Table:
    """Rows of text or numbers; the first column names the row.

    Attributes
    ----------
    caption : what the table shows.
    columns : a heading for each column.
    rows : cells in order of the columns.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [[cell_text(value) for value in row] for row in self.rows]

    @property
    def tall(self) -> bool:
        """Whether there are too many rows to show all at once."""
        return len(self.rows) > TALL

    def kinds(self) -> list[str]:
        """What each column holds: ``number``, ``long`` text, or nothing special."""
        longest = (max(map(len, column), default=0) for column in zip(*self.cells(), strict=True))
        return [
            "number" if numeric else "long" if length > LONG else ""
            for numeric, length in zip(self.numeric(), longest, strict=True)
        ]

    def numeric(self) -> list[bool]:
        """Whether a column holds numbers, so that it is set to the right."""
        columns = zip(*self.rows, strict=True) if self.rows else ()
        return [all(isinstance(v, int | float | None) for v in column) for column in columns]


@dataclass(frozen=True)
class Figure:
    """A picture and the numbers that it is drawn from.

    Attributes
    ----------
    svg : a whole SVG document, with its texts escaped.
    caption : what to see in it.
    table : its numbers.
    """

    svg: str
    caption: str
    table: Table


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes
    ----------
    key : its anchor.
    title : its heading.
    paragraphs, tables, items, figures, code : its content, in this order; items are a list,
        figures stand in rows.
    """

    key: str
    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    items: Sequence[str] = ()
    figures: Sequence[Sequence[Figure]] = ()
    code: str = ""


@dataclass(frozen=True)
class Tile:
    """A figure that stands out: what it counts, the number, and a word beside it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    summary: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    footer: str


def cell_text(value: Any) -> str:
    """A cell for people: four digits, a dash for what is not known."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "infinite" if value > 0 else "–"
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def short_text(value: float) -> str:
    """Two digits for the cells of a map, without an exponent where that is short."""
    if value == 0 or not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2g}"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    text = f"{float(f'{value:.2g}'):.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def bytes_text(size: float) -> str:
    """Bytes for people, in powers of ten: ``34.9 MB``."""
    return f"{_three_digits(size, _BYTE_UNITS)}B"


def count_text(count: float) -> str:
    """A number of parameters for people: ``17.4 M``."""
    return _three_digits(count, _COUNT_UNITS).rstrip()


def percent_text(share: float) -> str:
    return f"{share:.1%}"


_BYTE_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_COUNT_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
"""Factors from the largest, and what stands for them."""


def _three_digits(value: float, units: Sequence[tuple[float, str]]) -> str:
    factor, unit = next((u for u in units if value >= u[0]), units[-1])
    number = float(f"{value / factor:.3g}")
    digits = 0 if factor == 1.0 else 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:,.{digits}f} {unit}"
