"""Colours that all readers can tell apart and read on, by the formulas of WCAG and CIE."""

from __future__ import annotations

import itertools
import re
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcsharp_sdk.report.shading import (
    CIVIDIS,
    NOTHING,
    Gradual,
    Stepped,
    cividis,
    contrast,
    ink_on,
    luminance,
)

STYLE = (files("mcsharp_sdk.report") / "page.css").read_text()


def themes() -> list[dict[str, str]]:
    """Colours of the light and of the dark page."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in blocks]


def lightness(colour: str) -> float:
    """L* of CIE 1976, 0 to 100."""
    return 116 * luminance(colour) ** (1 / 3) - 16


def test_lightness_rises_evenly_along_the_scale() -> None:
    steps = [lightness(cividis(i / 20)) for i in range(21)]
    rises = [b - a for a, b in itertools.pairwise(steps)]
    mean = (steps[-1] - steps[0]) / 20
    assert all(0.5 * mean < rise < 1.6 * mean for rise in rises)


def test_known_contrasts() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@given(st.floats(0, 1))
def test_text_can_be_read_on_every_shade(share: float) -> None:
    colour = cividis(share)
    assert contrast(ink_on(colour), colour) >= 4.5


def test_both_themes_have_the_same_colours_and_enough_contrast() -> None:
    light, dark = themes()
    assert light.keys() == dark.keys()
    for theme in (light, dark):
        for paper in (theme["paper"], theme["panel"]):
            for name in ("ink", "soft", "link", "alarm"):
                assert contrast(theme[name], paper) >= 4.5, name
            for series in range(8):
                assert contrast(theme[f"s{series}"], paper) >= 3, series


def test_values_are_shaded_in_order_and_ends_have_the_end_colours() -> None:
    shades = Gradual.over([1.0, 2.0, 4.0])
    assert not shades.log
    assert shades.colour(4.0) == CIVIDIS[-1]
    assert [luminance(shades.colour(v)) for v in (0, 1, 2, 4)] == sorted(
        luminance(shades.colour(v)) for v in (0, 1, 2, 4)
    )


def test_values_of_many_magnitudes_are_shaded_by_their_logarithm_and_zero_apart() -> None:
    shades = Gradual.over([0.0, 1e-3, 1.0, 1e3])
    assert shades.log
    assert shades.colour(1.0) == cividis(0.5)
    assert shades.colour(0.0) == NOTHING
    assert shades.legend()[0] == (NOTHING, "0")
    assert [label for _, label in shades.legend() if label] == ["0", "0.001", "1", "1000"]


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0], [3.0, 3.0], [float("nan")]])
def test_few_or_equal_values_have_a_colour(values: list[float]) -> None:
    shades = Gradual.over(values)
    for value in [*values, 0.0]:
        assert re.fullmatch("#[0-9a-f]{6}", shades.colour(value))
    assert shades.legend()


def test_widths_get_a_shade_each() -> None:
    shades = Stepped([1, 2, 3])
    assert [label for _, label in shades.legend()] == ["1", "2", "3"]
    assert len({shades.colour(v) for v in (1, 2, 3)}) == 3
    assert shades.colour(4) == NOTHING
