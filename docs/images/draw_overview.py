"""Draw overview.svg: recipe, stages, model, with the costs and widths of a real allocation.

python docs/images/draw_overview.py FACTORS.json BITS.json docs/images/overview.svg

FACTORS.json holds expert statistics, BITS.json the map that follows from them:
``mcsharp allocate FACTORS.json --target-bits 2.0 --set mode=released --output BITS.json``.
The picture brings its own background, so it is readable whatever the page's colours are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from mcsharp_sdk.allocation import Exponents, Factors, allocation_cost
from mcsharp_sdk.artifacts import BitMap, ExpertStatistics, LayerStatistics

WIDTH, HEIGHT = 980, 440
CELL, GAP = 11, 1.5
LEFT, MIDDLE, RIGHT = 28, 284, 742
GROUP = 128
CONTRAST = 0.7  # below 1, small costs stay visible
ORIGINAL_BITS = 16
EXPONENTS = Exponents(1.0, 1.5, 1.0)  # of mode released

# class -> (property, colour on light, colour on dark)
COLOURS = {
    "page": ("fill", "#ffffff", "#0d1117"),
    "card": ("fill", "#f6f8fa", "#161b22"),
    "edge": ("stroke", "#d0d7de", "#30363d"),
    "text": ("fill", "#1f2328", "#e6edf3"),
    "soft": ("fill", "#59636e", "#9198a1"),
    "line": ("stroke", "#818b98", "#656c76"),
    "head": ("fill", "#818b98", "#656c76"),
    "cost": ("fill", "#bc4c00", "#f0883e"),
    "rest": ("fill", "#e3e7ec", "#2a313c"),
    "b1": ("fill", "#b6dcf5", "#173a5e"),
    "b2": ("fill", "#4a9ede", "#2f7cc4"),
    "b3": ("fill", "#0a4b8f", "#9fd3ff"),
}
SANS = "system-ui,-apple-system,'Segoe UI','Noto Sans','DejaVu Sans',sans-serif"
MONO = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"

RECIPE = (
    "version: 1",
    "calibration:",
    "  source: text",
    "  path: corpus.txt",
    "stages:",
    "  - type: ExpertStats",
    "  - type: BitAllocation",
    "    target_bits: {target:.1f}",
    "  - type: GPTQQuantize",
    "exports:",
    "  - type: safetensors",
    "  - type: onnx_routers",
)
FOLDER = (
    "config.json",
    "mcsharp-….safetensors",
    "tokenizer.json",
    "recipe.yaml",
    "mcsharp_report.json",
    "README.md",
    "onnx_routers/",
)


def main() -> None:
    """Read the two files and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("factors", "bits", "output"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    picture = draw(ExpertStatistics.load(given.factors), BitMap.load(given.bits))
    given.output.write_text(picture, encoding="utf-8")


def draw(statistics: ExpertStatistics, bit_map: BitMap) -> str:
    """The picture as SVG text."""
    bits = bit_map.bits
    costs = [cost_of_one_bit(layer) for layer in statistics.layers]
    widths = [bits[layer.layer] for layer in statistics.layers]
    nominal = bit_map.nominal_bits
    size = f"{len(widths)} layers × {len(widths[0])} experts"
    parts = [
        f'<rect class="page edge" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" '
        'rx="10"/>',
        *_recipe_card(nominal),
        *_arrow(LEFT + 204, MIDDLE - 12, 212),
        *_heading(MIDDLE, 42, "1  ExpertStats", "what would fewer bits cost each expert?"),
        *_map(MIDDLE, 54, costs, _shade),
        *_heading(MIDDLE, 184, "2  BitAllocation", "the least cost within the budget"),
        *_map(MIDDLE, 196, widths, lambda width: f'class="b{width}"'),
        *_legend(MIDDLE, 308, f"{statistics.model}, {size}, {nominal:.1f} bits on average"),
        *_heading(MIDDLE, 370, "3  GPTQQuantize", "weights packed at these widths"),
        *_bars(MIDDLE, 382, nominal),
        *_arrow(MIDDLE + 396, RIGHT - 12, 212),
        *_model_card(),
    ]
    return "\n".join([*_opening(), *parts, "</svg>", ""])


def cost_of_one_bit(layer: LayerStatistics) -> list[float]:
    """Each expert's cost at 1 bit, as a share of the highest in its layer."""
    factors = Factors((1,), layer.activation_count, layer.routing_weight_sum, layer.errors_at((1,)))
    cost = allocation_cost(factors, EXPONENTS)[:, 0]
    return list(np.power(cost / cost.max(), CONTRAST))


def _opening() -> list[str]:
    light = "".join(f".{n}{{{p}:{c}}}" for n, (p, c, _) in COLOURS.items())
    dark = "".join(f".{n}{{{p}:{c}}}" for n, (p, _, c) in COLOURS.items())
    fonts = f"text{{font:13px {SANS}}}.mono{{font:12px {MONO}}}.bold{{font-weight:600}}"
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-labelledby="title">',
        '<title id="title">A recipe is run in three stages, measure the experts, allocate bits, '
        "quantise, and gives a model folder that transformers loads</title>",
        f"<style>{fonts}{light}@media (prefers-color-scheme:dark){{{dark}}}</style>",
    ]


def _text(x: float, y: float, content: str, classes: str = "text") -> str:
    return f'<text class="{classes}" x="{x}" y="{y}" xml:space="preserve">{escape(content)}</text>'


def _card(x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="card edge" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'


def _recipe_card(target: float) -> list[str]:
    lines = [line.format(target=target) for line in RECIPE]
    return [
        _text(LEFT, 42, "recipe.yaml", "text bold"),
        _card(LEFT, 54, 206, 18 * len(lines) + 16),
        *(_text(LEFT + 12, 76 + 18 * i, line, "text mono") for i, line in enumerate(lines)),
        _text(LEFT, 322, "checked in full before", "soft"),
        _text(LEFT, 340, "any work begins", "soft"),
    ]


def _model_card() -> list[str]:
    return [
        _text(RIGHT, 42, "the compressed model", "text bold"),
        _card(RIGHT, 54, 210, 18 * len(FOLDER) + 34),
        _text(RIGHT + 12, 76, "DIR/", "text mono"),
        *(
            _text(RIGHT + 12, 96 + 18 * i, f"  {name}", "text mono")
            for i, name in enumerate(FOLDER)
        ),
        _text(RIGHT, 240, "transformers loads it:", "soft"),
        _card(RIGHT, 252, 210, 74),
        _text(RIGHT + 12, 274, "import mcsharp_sdk", "text mono"),
        _text(RIGHT + 12, 294, "AutoModelForCausalLM", "text mono"),
        _text(RIGHT + 12, 312, "  .from_pretrained(DIR)", "text mono"),
    ]


def _arrow(start: float, stop: float, y: float) -> list[str]:
    first = start + 12
    return [
        f'<path class="line" d="M{first} {y}H{stop - 6}" stroke-width="2" fill="none"/>',
        f'<path class="head" d="M{stop} {y}l-9 -5v10z"/>',
    ]


def _heading(x: float, y: float, name: str, does: str) -> list[str]:
    return [_text(x, y, name, "text bold"), _text(x + 138, y, does, "soft")]


def _map(
    x: float, y: float, columns: Sequence[Sequence[float]], look: Callable[[float], str]
) -> list[str]:
    step = CELL + GAP
    return [
        f'<rect {look(value)} x="{x + step * i}" y="{y + step * j}" '
        f'width="{CELL}" height="{CELL}" rx="1.5"/>'
        for i, column in enumerate(columns)
        for j, value in enumerate(column)
    ]


def _shade(cost: float) -> str:
    return f'class="cost" fill-opacity="{0.06 + 0.94 * cost:.2f}"'


def _legend(x: float, y: float, about: str) -> list[str]:
    parts = []
    for place, width in enumerate((1, 2, 3)):
        left = x + 58 * place
        parts.append(f'<rect class="b{width}" x="{left}" y="{y}" width="11" height="11" rx="1.5"/>')
        parts.append(_text(left + 16, y + 10, f"{width} bit{'' if width == 1 else 's'}", "soft"))
    parts.append(_text(x + 205, y + 10, "columns: layers, rows: experts", "soft"))
    parts.append(_text(x, y + 30, about, "soft"))
    return parts


def _bars(x: float, y: float, nominal: float) -> list[str]:
    """The size of a weight before and after, to scale: codes, scales and zero points."""
    full = 32 * (CELL + GAP) - GAP
    stored = nominal + (ORIGINAL_BITS + nominal) / GROUP
    short = full * stored / ORIGINAL_BITS
    label = f"{ORIGINAL_BITS} → {stored:.2f} bits a weight, scales and zero points included"
    return [
        f'<rect class="rest" x="{x}" y="{y}" width="{full}" height="12" rx="2"/>',
        f'<rect class="b2" x="{x}" y="{y}" width="{short:.1f}" height="12" rx="2"/>',
        _text(x, y + 30, label, "soft"),
    ]


if __name__ == "__main__":
    main()
