"""The table and the plot of a sweep."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from mcsharp_sdk.report.sweep import (
    BYTES,
    FIGURES,
    RATIO,
    READ,
    CostAxis,
    Row,
    cost_axis,
    csv_table,
    sweep_plot,
)

SVG = "{http://www.w3.org/2000/svg}"


def evaluation(perplexity: float | None, size: float, ratio: float = 1.0) -> dict[str, Any]:
    return {
        "perplexity": perplexity,
        "bytes": size,
        "activated_expert_ratio": ratio,
        "activated_bytes_per_token": size * ratio,
    }


def row(settings: dict[str, Any], found: dict[str, Any], error: str = "") -> Row:
    return Row(settings, {k: str(v) for k, v in settings.items()}, found, error)


def texts(plot: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(plot).iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("costs", "axis"),
    [
        ([(100, 1.0), (200, 1.0)], BYTES),
        ([(100, 1.0), (100, 0.8)], RATIO),
        ([(100, 1.0), (200, 0.8)], READ),
        ([(100_000, 1.0), (100_001, 0.8)], RATIO),
        ([(100, 1.0), (100, 1.0)], None),
        ([], None),
    ],
)
def test_the_cost_that_differs_is_shown(
    costs: list[tuple[float, float]], axis: CostAxis | None
) -> None:
    assert cost_axis([evaluation(10.0, *cost) for cost in costs]) == axis


def test_the_table_has_settings_figures_and_failures() -> None:
    rows = [
        row({"stages.A.x": 2, "stages.B.y": "a,b"}, evaluation(10.5, 100)),
        row({"stages.A.x": 3, "stages.B.y": "c"}, {}, "it failed,\nbadly"),
    ]
    read = list(csv.DictReader(io.StringIO(csv_table(rows))))
    assert list(read[0]) == ["stages.A.x", "stages.B.y", *FIGURES, "error"]
    assert (read[0]["stages.B.y"], float(read[0]["perplexity"])) == ("a,b", 10.5)
    assert (read[1]["perplexity"], read[1]["error"]) == ("", "it failed,\nbadly")


def test_the_last_setting_runs_along_the_lines_that_the_others_name() -> None:
    rows = [
        row({"s.A.metric": metric, "s.A.threshold": t}, evaluation(10 + t, 100, 1 - t))
        for metric in ("attention", "mean")
        for t in (0.0, 0.2, 0.4)
    ]
    plot = sweep_plot(rows, "title")
    lines = [len(p.attrib["points"].split()) for p in ET.fromstring(plot).iter(f"{SVG}polyline")]
    assert lines == [3, 3]
    assert {"title", RATIO.label, "metric attention", "metric mean", "0.4"} <= set(texts(plot))


def test_without_a_cost_that_differs_a_number_takes_its_place() -> None:
    numbers = [row({"s.A.damping": d}, evaluation(10 + d, 100)) for d in (0.01, 0.1)]
    assert "s.A.damping" in texts(sweep_plot(numbers, "t"))
    names = [row({"s.A.mode": m}, evaluation(10, 100)) for m in ("best", "paper")]
    assert BYTES.label in texts(sweep_plot(names, "t"))


def test_failed_and_infinite_variants_do_not_spoil_the_plot() -> None:
    rows = [
        row({"x": 1}, evaluation(None, 100)),
        row({"x": 2}, {}, "failed"),
        row({"x": 3}, evaluation(12.0, 200)),
    ]
    assert "1 point cannot be shown" in texts(sweep_plot(rows, "t"))
    assert texts(sweep_plot([], "t"))
