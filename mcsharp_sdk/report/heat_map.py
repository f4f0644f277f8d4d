"""Heat maps of layers and experts as SVG text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from xml.sax.saxutils import escape

from mcsharp_sdk.report.plot import svg_head, svg_text
from mcsharp_sdk.report.shading import Shading, ink_on

WIDEST_MAP, HIGHEST_MAP = 500, 640
CELL_WIDTH = (2.5, 36.0)
CELL_HEIGHT = (6.0, 22.0)
MARGIN_LEFT, MARGIN_TOP, MARGIN_RIGHT = 42, 62, 4
LEGEND_HEIGHT, LEGEND_WIDTH = 62, 240
LEAST_LABEL = (26.0, 13.0)
"""Width and height of a cell or legend box from which text fits into it or beside it."""

MOST_DESCRIBED = 6000
"""Cells of a larger map do not say their value under the pointer: the table has it."""

Values = Mapping[int, Sequence[float]]


def heat_map(
    values: Values,
    shading: Shading,
    *,
    title: str,
    unit: str,
    shown: Callable[[float], str],
    description: str = "",
) -> str:
    """Draw a cell per layer and expert.

    Parameters
    ----------
    values : decoder layer -> a value for each of its experts; layers may differ in how many.
    shading : their colours.
    title, unit : heading, and what the legend counts.
    shown : a value as text; it is written into cells that have room for it.
    description : what the map shows, for readers who do not see it.

    Returns
    -------
    A whole SVG document.
    """
    experts = max(map(len, values.values()))
    width = _within(WIDEST_MAP / experts, CELL_WIDTH)
    height = _within(HIGHEST_MAP / len(values), CELL_HEIGHT)
    bottom = MARGIN_TOP + height * len(values)
    page_width = MARGIN_LEFT + MARGIN_RIGHT + max(width * experts, LEGEND_WIDTH)
    parts = [svg_head(page_width, bottom + LEGEND_HEIGHT, title, description)]
    parts.append(svg_text(4, 18, title, 'font-size="14" font-weight="bold"'))
    parts += _labels(list(values), experts, width, height)
    described = experts * len(values) <= MOST_DESCRIBED
    for row, (layer, of_layer) in enumerate(values.items()):
        y = MARGIN_TOP + row * height
        for expert, value in enumerate(of_layer):
            tip = f"layer {layer}, expert {expert}: {shown(value)}" if described else ""
            x = MARGIN_LEFT + expert * width
            parts += _cell(x, y, width, height, shading.colour(value), shown(value), tip)
    return "\n".join([*parts, *_legend(shading, unit, bottom), "</svg>", ""])


def _within(size: float, limits: tuple[float, float]) -> float:
    return min(limits[1], max(limits[0], size))


def _labels(layers: Sequence[int], experts: int, width: float, height: float) -> Iterator[str]:
    yield svg_text(4, MARGIN_TOP - 8, "layer")
    yield svg_text(MARGIN_LEFT, MARGIN_TOP - 24, "expert")
    every = max(1, math.ceil(LEAST_LABEL[1] / height))
    for row in range(0, len(layers), every):
        y = MARGIN_TOP + (row + 0.5) * height + 4
        yield svg_text(MARGIN_LEFT - 6, y, str(layers[row]), 'text-anchor="end"')
    every = max(1, math.ceil(LEAST_LABEL[0] / width))
    for expert in range(0, experts, every):
        x = MARGIN_LEFT + (expert + 0.5) * width
        yield svg_text(x, MARGIN_TOP - 8, str(expert), 'text-anchor="middle"')


def _cell(
    x: float, y: float, width: float, height: float, colour: str, text: str, tip: str
) -> Iterator[str]:
    about = f"<title>{escape(tip)}</title>" if tip else ""
    size = f'width="{width:.2f}" height="{height:.2f}"'
    yield f'<rect class="cell" x="{x:.2f}" y="{y:.2f}" {size} fill="{colour}">{about}</rect>'
    if width >= LEAST_LABEL[0] + 6 and height >= LEAST_LABEL[1]:
        fill = f'text-anchor="middle" font-size="10" pointer-events="none" fill="{ink_on(colour)}"'
        yield svg_text(x + width / 2, y + height / 2 + 3.5, text, fill, "value")


def _legend(shading: Shading, unit: str, bottom: float) -> Iterator[str]:
    boxes = shading.legend()
    width = min(32.0, LEGEND_WIDTH * 0.9 / len(boxes))
    yield svg_text(MARGIN_LEFT, bottom + 20, unit)
    for index, (colour, label) in enumerate(boxes):
        x = MARGIN_LEFT + index * width
        if colour:
            yield (
                f'<rect class="box" x="{x:.2f}" y="{bottom + 28:.2f}" width="{width + 0.3:.2f}" '
                f'height="12" fill="{colour}"/>'
            )
        if label:
            yield svg_text(x + width / 2, bottom + 54, label, 'text-anchor="middle"')
