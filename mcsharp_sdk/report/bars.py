"""Stacked bars as SVG text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from xml.sax.saxutils import escape

from mcsharp_sdk.report.plot import CHARACTER_WIDTH, COLOURS, FONT_SIZE, svg_head, svg_text

WIDTH, MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP = 640, 96, 84, 40
BAR_HEIGHT, BAR_STEP = 34, 50
LEGEND_STEP, SWATCH = 22, 12


def stacked_bars(
    bars: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    shown: Callable[[float], str],
    description: str = "",
) -> str:
    """Draw horizontal bars of parts, all on one scale from 0.

    Parameters
    ----------
    bars : name of a bar -> name of a part -> its size, >= 0. A part has one colour in all bars.
    title : heading.
    shown : a size as text.
    description : what the bars show, for readers who do not see them.

    Returns
    -------
    A whole SVG document.
    """
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    longest = max((sum(bar.values()) for bar in bars.values()), default=0.0) or 1.0
    scale = (WIDTH - MARGIN_LEFT - MARGIN_RIGHT) / longest
    legend_top = MARGIN_TOP + BAR_STEP * len(bars)
    legend = list(_legend(parts, legend_top))
    height = legend_top + LEGEND_STEP * (1 + _rows(parts))
    drawn = [svg_head(WIDTH, height, title, description)]
    drawn.append(svg_text(4, 20, title, 'font-size="14" font-weight="bold"'))
    for row, (name, bar) in enumerate(bars.items()):
        drawn += _bar(name, bar, parts, MARGIN_TOP + row * BAR_STEP, scale, shown)
    return "\n".join([*drawn, *legend, "</svg>", ""])


def _bar(
    name: str,
    bar: Mapping[str, float],
    parts: list[str],
    y: float,
    scale: float,
    shown: Callable[[float], str],
) -> Iterator[str]:
    middle = y + BAR_HEIGHT / 2 + 4
    yield svg_text(MARGIN_LEFT - 10, middle, name, 'text-anchor="end"')
    x = float(MARGIN_LEFT)
    for part, size in bar.items():
        number = parts.index(part) % len(COLOURS)
        tip = escape(f"{name}, {part}: {shown(size)}")
        yield (
            f'<rect class="f{number}" x="{x:.2f}" y="{y}" width="{size * scale:.2f}" '
            f'height="{BAR_HEIGHT}" fill="{COLOURS[number]}"><title>{tip}</title></rect>'
        )
        x += size * scale
    yield svg_text(x + 8, middle, shown(sum(bar.values())))


def _legend(parts: list[str], top: float) -> Iterator[str]:
    for number, (part, column, row) in enumerate(_places(parts)):
        x, y = MARGIN_LEFT + column, top + (row + 0.5) * LEGEND_STEP
        yield (
            f'<rect class="f{number % len(COLOURS)}" x="{x:.2f}" y="{y:.2f}" width="{SWATCH}" '
            f'height="{SWATCH}" fill="{COLOURS[number % len(COLOURS)]}"/>'
        )
        yield svg_text(x + SWATCH + 6, y + 10, part)


def _places(parts: list[str]) -> Iterator[tuple[str, float, int]]:
    """Part, x and row of its entry in the legend, wrapped at the right margin."""
    x, row = 0.0, 0
    for part in parts:
        width = SWATCH + 24 + len(part) * FONT_SIZE * CHARACTER_WIDTH
        if x and x + width > WIDTH - MARGIN_LEFT:
            x, row = 0.0, row + 1
        yield part, x, row
        x += width


def _rows(parts: list[str]) -> int:
    return max((row for _, _, row in _places(parts)), default=0) + 1
