"""Plots are SVG that says what the points say."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcsharp_sdk.report.plot import (
    HEIGHT,
    WIDTH,
    Point,
    decade_ticks,
    line_plot,
    make_axis,
    round_ticks,
)

SVG = "{http://www.w3.org/2000/svg}"


def plot_of(series: Mapping[str, Sequence[Point]], *, log_y: bool = False) -> str:
    return line_plot(series, title="t", x_label="x", y_label="y", log_y=log_y)


def drawn(text: str, tag: str) -> list[ET.Element]:
    return list(ET.fromstring(text).iter(SVG + tag))


def texts(text: str) -> list[str]:
    return [element.text or "" for element in drawn(text, "text")]


def corners(line: ET.Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in line.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def test_a_plot_has_lines_ticks_labels_and_a_legend() -> None:
    plot = line_plot(
        {"first": [(0, 1), (1, 2), (2, 4)], "second": [(0, 4), (2, 1)]},
        title="Curves",
        x_label="cost",
        y_label="perplexity",
    )
    assert [len(corners(line)) for line in drawn(plot, "polyline")] == [3, 2]
    assert {"Curves", "cost", "perplexity", "first", "second"} <= set(texts(plot))
    assert {"0.0", "0.5", "1.0", "1.5", "2.0"} <= set(texts(plot))
    one_line = plot_of({"only": [(0, 1), (1, 2)]})
    assert "only" not in texts(one_line), "one line needs no legend"


def test_positions_go_with_the_values_or_their_logarithms() -> None:
    points = [(0.0, 1.0), (1.0, 10.0), (2.0, 100.0)]
    straight, bent = (
        corners(drawn(plot_of({"a": points}, log_y=log), "polyline")[0]) for log in (True, False)
    )
    xs, ys = zip(*straight, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.02)
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.02)
    assert ys[0] > ys[1] > ys[2], "larger values stand higher"
    ys = tuple(y for _, y in bent)
    assert (ys[2] - ys[0]) / (ys[1] - ys[0]) == pytest.approx(99 / 9, rel=0.01)


def test_text_is_escaped_and_points_are_labelled() -> None:
    plot = line_plot(
        {"a<b": [(0, 1), (1, 2)], "c&d": [(0, 2)]},
        title='"<&>',
        x_label="x<y",
        y_label="é & ü",
        point_labels={"a<b": ["<one>", "two"]},
    )
    assert {"a<b", "c&d", '"<&>', "x<y", "é & ü", "<one>", "two"} <= set(texts(plot))


def test_what_cannot_be_shown_breaks_the_line_and_is_counted() -> None:
    points = [(0, 1), (1, 2), (2, math.inf), (3, 4), (4, math.nan)]
    plot = plot_of({"a": points})
    assert [len(corners(line)) for line in drawn(plot, "polyline")] == [2, 1]
    assert "2 points cannot be shown" in texts(plot)
    assert "1 point cannot be shown" in texts(plot_of({"a": [(0, 0), (1, 1)]}, log_y=True))
    assert not any("cannot" in text for text in texts(plot_of({"a": [(0, 0)]})))


def test_nothing_to_show_is_an_empty_plot() -> None:
    empty: list[dict[str, list[Point]]] = [{}, {"a": []}, {"a": [(math.nan, 1.0)]}]
    for series in empty:
        assert drawn(plot_of(series), "polyline") == []


def test_many_points_have_no_markers_and_many_lines_differ() -> None:
    long = plot_of({"a": [(i, i * i) for i in range(500)]})
    assert drawn(long, "circle") == []
    many = plot_of({str(i): [(0, i), (1, i)] for i in range(20)})
    looks = {
        (group.attrib["stroke"], line.attrib.get("stroke-dasharray"))
        for group in drawn(many, "g")
        for line in group.iter(SVG + "polyline")
    }
    assert len(looks) == 20


numbers = st.floats(-1e12, 1e12, allow_subnormal=False)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20))
def test_all_points_lie_on_the_page(points: list[tuple[float, float]]) -> None:
    for line in drawn(plot_of({"a": points}), "polyline"):
        for x, y in corners(line):
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=9))
def test_logarithmic_axes_span_their_values_with_a_few_ticks(values: list[float]) -> None:
    axis = make_axis(values, 0, 100, log=True)
    assert axis.low < min(values)
    assert axis.high > max(values)
    assert 1 <= len(axis.ticks) <= 20
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_few_and_within(low: float, span: float) -> None:
    ticks = round_ticks(low, low + span)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)


def test_ticks_of_a_wide_range_are_powers_of_ten() -> None:
    assert decade_ticks(1, 100) == [1, 2, 5, 10, 20, 50, 100]
    assert decade_ticks(1e-3, 1e3) == pytest.approx([1e-3, 1e-2, 0.1, 1, 10, 100, 1000])
