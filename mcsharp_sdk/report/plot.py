"""Line plots as SVG text, without a plotting library.

Colours are attributes, so that a figure stands on its own; parts also carry a class (``paper``,
``ink``, ``grid``, ``axis``, ``s0`` to ``s7``), by which a page gives them colours of its theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

Point = tuple[float, float]

WIDTH, HEIGHT = 640, 420
MARGIN_LEFT, MARGIN_TOP, MARGIN_RIGHT, MARGIN_BOTTOM = 78, 44, 24, 58
FONT_SIZE = 12
CHARACTER_WIDTH = 0.58
"""Mean width of a character, in font sizes: text cannot be measured without its font."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#6a3d9a", "#56b4e9", "#8c6d00", "#444444")
"""Told apart with any colour vision (after Okabe and Ito); later lines repeat them dashed."""

DASHES = ("", "7 4", "2 3", "9 3 2 3")
MOST_MARKED_POINTS = 60
"""A longer line is drawn without a marker per point."""


@dataclass(frozen=True)
class Axis:
    """Values of one direction and where they lie on the page.

    Attributes
    ----------
    low, high : values at the two ends, ``low < high``.
    start, end : their positions in pixels.
    ticks : values that are written beside the axis, ascending.
    log : positions go with the logarithm of the value.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def position(self, value: float) -> float:
        """Pixel of a value."""
        scale: Callable[[float], float] = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return self.start + (scale(value) - low) / (high - low) * (self.end - self.start)

    def label(self, tick: float) -> str:
        """A tick as text, with as many digits as tell it from its neighbours."""
        steps = [b - a for a, b in zip(self.ticks, self.ticks[1:], strict=False)]
        if self.log or abs(tick) >= 1e6 or 0 < abs(tick) < 1e-4:
            return f"{tick:,.6g}"
        digits = max(0, -math.floor(math.log10(min(steps)) + 1e-9)) if steps else 3
        return f"{tick:,.{digits}f}"


def line_plot(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    point_labels: Mapping[str, Sequence[str]] | None = None,
    description: str = "",
    unmarked: Collection[str] = (),
) -> str:
    """Draw lines through points.

    Parameters
    ----------
    series : name of a line -> its points (x, y), joined in the order given. A point that is not
        finite, or not positive where ``log_y``, breaks its line; how many there are is written
        under the title.
    title, x_label, y_label : text of the figure and of its axes.
    log_y : the y axis is logarithmic.
    point_labels : name of a line -> a short text beside each of its points.
    description : what the figure shows, for readers who do not see it.
    unmarked : names of lines without a marker at each point, such as limits.

    Returns
    -------
    A whole SVG document.
    """
    shown = {name: [p for p in points if _can_show(p, log_y)] for name, points in series.items()}
    left_out = sum(len(points) for points in series.values()) - sum(map(len, shown.values()))
    every = [point for points in shown.values() for point in points]
    bottom, right = HEIGHT - MARGIN_BOTTOM, WIDTH - MARGIN_RIGHT
    x_axis = make_axis([x for x, _ in every], MARGIN_LEFT, right)
    y_axis = make_axis([y for _, y in every], bottom, MARGIN_TOP, log=log_y)
    legend = list(series) if len(series) > 1 else []
    width = WIDTH + _legend_width(legend)
    parts = [svg_head(width, HEIGHT, title, description), *_heading(title, left_out)]
    parts += _axes(x_axis, y_axis, x_label, y_label)
    for number, (name, points) in enumerate(series.items()):
        labels = (point_labels or {}).get(name, ())
        marked = name not in unmarked and len(points) <= MOST_MARKED_POINTS
        parts += _line(number, name, points, labels, x_axis, y_axis, marked)
    parts += _legend(legend)
    return "\n".join([*parts, "</svg>", ""])


def make_axis(values: Sequence[float], start: float, end: float, *, log: bool = False) -> Axis:
    """An axis with round ticks that spans the values, which are finite (positive if ``log``)."""
    low, high = (min(values), max(values)) if values else (1.0, 2.0)
    if log:
        low, high = (low, high) if high > low * (1 + 1e-9) else (low / 2, high * 2)
        low, high = low / (high / low) ** 0.05, high * (high / low) ** 0.05
        ticks = round_ticks(low, high) if high / low < 20 else decade_ticks(low, high)
        return Axis(low, high, start, end, tuple(t for t in ticks if t > 0), log=True)
    spread = high - low
    if spread <= abs(high) * 1e-9:
        spread = abs(high) or 1.0
    low, high = low - 0.05 * spread, high + 0.05 * spread
    return Axis(low, high, start, end, tuple(round_ticks(low, high)))


def round_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within ``low`` to ``high``, some ``about``."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def decade_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within ``low`` to ``high``, and 2 and 5 times them if there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [m * 10.0**d for d in decades for m in factors if low <= m * 10.0**d <= high]
    return ticks[:: max(1, len(ticks) // 10)]


def _can_show(point: Point, log_y: bool) -> bool:
    x, y = point
    return math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)


def svg_head(width: float, height: float, title: str, description: str = "") -> str:
    """Opening of an SVG document with what a screen reader says of it."""
    about = f"<desc>{escape(description)}</desc>" if description else ""
    label = quoteattr(f"{title}. {description}" if description else title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" font-size="{FONT_SIZE}" '
        f'role="img" aria-label={label}>\n<title>{escape(title)}</title>{about}\n'
        '<rect class="paper" width="100%" height="100%" fill="#ffffff"/>'
    )


def _heading(title: str, left_out: int) -> Iterator[str]:
    middle = (MARGIN_LEFT + WIDTH - MARGIN_RIGHT) / 2
    yield svg_text(middle, 20, title, 'text-anchor="middle" font-size="15" font-weight="bold"')
    if left_out:
        plural = "" if left_out == 1 else "s"
        note = f"{left_out} point{plural} cannot be shown"
        yield svg_text(middle, 36, note, 'text-anchor="middle" fill="#b00000"', "alarm")


def _axes(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> Iterator[str]:
    left, right = x_axis.start, x_axis.end
    bottom, top = y_axis.start, y_axis.end
    for tick in y_axis.ticks:
        y = y_axis.position(tick)
        yield _stroke(left, y, right, y, "#e4e4e4", "grid")
        yield svg_text(left - 8, y + 4, y_axis.label(tick), 'text-anchor="end" fill="#333333"')
    for tick in x_axis.ticks:
        x = x_axis.position(tick)
        yield _stroke(x, top, x, bottom, "#e4e4e4", "grid")
        yield svg_text(x, bottom + 18, x_axis.label(tick), 'text-anchor="middle" fill="#333333"')
    yield _stroke(left, bottom, right, bottom, "#333333", "axis")
    yield _stroke(left, top, left, bottom, "#333333", "axis")
    yield svg_text((left + right) / 2, HEIGHT - 16, x_label, 'text-anchor="middle"')
    middle = (top + bottom) / 2
    yield svg_text(
        18, middle, y_label, f'text-anchor="middle" transform="rotate(-90 18 {middle:g})"'
    )


def _line(
    number: int,
    name: str,
    points: Sequence[Point],
    labels: Sequence[str],
    x_axis: Axis,
    y_axis: Axis,
    marked: bool,
) -> Iterator[str]:
    colour = COLOURS[number % len(COLOURS)]
    yield (
        f'<g class="{_series(number)}" stroke="{colour}" fill="{colour}">'
        f"<title>{escape(name)}</title>"
    )
    for piece in _unbroken(points, y_axis.log):
        corners = " ".join(f"{x_axis.position(x):.2f},{y_axis.position(y):.2f}" for x, y in piece)
        yield f'<polyline points="{corners}" fill="none" stroke-width="2"{_dash(number)}/>'
    if marked:
        for index, (x, y) in enumerate(points):
            if _can_show((x, y), y_axis.log):
                label = labels[index] if index < len(labels) else ""
                yield from _marker(x_axis.position(x), y_axis.position(y), label, f"{x:g}, {y:g}")
    yield "</g>"


def _unbroken(points: Sequence[Point], log_y: bool) -> Iterator[list[Point]]:
    """The stretches of a line between points that cannot be shown."""
    piece: list[Point] = []
    for point in points:
        if _can_show(point, log_y):
            piece.append(point)
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def _marker(x: float, y: float, label: str, values: str) -> Iterator[str]:
    yield f'<circle cx="{x:.2f}" cy="{y:.2f}" r="3.5"><title>{escape(values)}</title></circle>'
    if label:
        inwards = (6, "start") if x < 0.75 * WIDTH else (-6, "end")
        more = f'text-anchor="{inwards[1]}" stroke="none" font-size="10"'
        yield svg_text(x + inwards[0], y - 6, label, more, "label")


def _legend_width(names: Sequence[str]) -> float:
    longest = max(map(len, names), default=0)
    return math.ceil(52 + longest * FONT_SIZE * CHARACTER_WIDTH) if names else 0


def _legend(names: Sequence[str]) -> Iterator[str]:
    room = HEIGHT - MARGIN_TOP - 10
    height = min(20.0, room / max(1, len(names)))
    for number, name in enumerate(names):
        y = MARGIN_TOP + 8 + number * height
        colour, series = COLOURS[number % len(COLOURS)], _series(number)
        line = f' stroke-width="2"{_dash(number)}'
        yield _stroke(WIDTH, y, WIDTH + 26, y, colour, series, line)
        yield f'<circle class="{series}" cx="{WIDTH + 13}" cy="{y:g}" r="3.5" fill="{colour}"/>'
        yield svg_text(WIDTH + 33, y + 4, name)


def _series(number: int) -> str:
    return f"s{number % len(COLOURS)}"


def _dash(number: int) -> str:
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _stroke(
    x1: float, y1: float, x2: float, y2: float, colour: str, kind: str, more: str = ""
) -> str:
    ends = f'x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"'
    return f'<line class="{kind}" {ends} stroke="{colour}"{more}/>'


def svg_text(x: float, y: float, text: str, more: str = "", kind: str = "ink") -> str:
    """A text element; ``more`` are further attributes, ``kind`` is its class."""
    attributes = f" {more}" if more else ""
    return f'<text class="{kind}" x="{x:.2f}" y="{y:.2f}"{attributes}>{escape(text)}</text>'
