"""A sweep's results as a table and as a plot of quality against cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mcsharp_sdk.report.plot import Point, line_plot

FIGURES = (
    "perplexity",
    "nll",
    "bytes",
    "activated_bytes_per_token",
    "activated_expert_ratio",
    "nominal_bits",
    "stored_bits",
    "expert_nominal_bits",
    "expert_stored_bits",
    "tokens",
    "window",
    "seconds",
)
"""Columns of the table behind the varied settings: keys of an evaluation."""

LEAST_CHANGE = 1e-3
"""A cost that changes by less than this share of it is taken to be the same for all variants."""


@dataclass(frozen=True)
class CostAxis:
    """What stands on the x axis: its label, and how a row's value is read and scaled."""

    key: str
    label: str
    scale: float = 1.0


BYTES = CostAxis("bytes", "weights on disk, MB", 1e-6)
RATIO = CostAxis("activated_expert_ratio", "activated experts, % of top-k", 100.0)
READ = CostAxis("activated_bytes_per_token", "weights read per token, MB", 1e-6)


@dataclass(frozen=True)
class Row:
    """One variant: target -> value and shown value, and its evaluation; empty if it failed."""

    settings: Mapping[str, Any]
    shown: Mapping[str, str]
    evaluation: Mapping[str, Any]
    error: str = ""


def csv_table(rows: Sequence[Row]) -> str:
    """CSV text: the varied settings, the figures of the evaluation, and why a variant failed."""
    targets = list(rows[0].settings) if rows else []
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*targets, *FIGURES, "error"])
    for row in rows:
        figures = [row.evaluation.get(key) for key in FIGURES]
        table.writerow([*(row.shown[target] for target in targets), *figures, row.error])
    return text.getvalue()


def cost_axis(evaluations: Sequence[Mapping[str, Any]]) -> CostAxis | None:
    """The cost that differs between the variants; None if none does.

    Where both the size and the share of activated experts differ, it is what both change: the
    weights that a token reads.
    """
    size, ratio, read = (differs(evaluations, axis.key) for axis in (BYTES, RATIO, READ))
    if size and ratio:
        return READ
    for axis, varies in ((RATIO, ratio), (BYTES, size), (READ, read)):
        if varies:
            return axis
    return None


def differs(evaluations: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether a cost is not the same for all evaluations."""
    values = [float(evaluation[key]) for evaluation in evaluations]
    return bool(values) and max(values) - min(values) > LEAST_CHANGE * max(values)


def sweep_plot(rows: Sequence[Row], title: str) -> str:
    """SVG: perplexity against the cost that differs, a line for the last varied setting.

    The other settings name the lines. Where no cost differs and the last setting is a number, its
    value takes the cost's place.
    """
    shown = [row for row in rows if row.evaluation]
    axis = cost_axis([row.evaluation for row in shown])
    last = list(rows[0].settings)[-1] if rows else ""
    if axis is None and not all(_is_number(row.settings[last]) for row in shown):
        axis = BYTES
    lines: dict[str, list[tuple[Point, str]]] = {}
    for row in shown:
        x = axis.scale * row.evaluation[axis.key] if axis else float(row.settings[last])
        y = row.evaluation["perplexity"]
        point = (x, float("nan") if y is None else y)
        lines.setdefault(_line_name(row, last), []).append((point, row.shown[last]))
    ordered = {name: sorted(line) for name, line in lines.items()}
    finite = [p[1] for line in ordered.values() for p, _ in line if p[1] > 0]
    return line_plot(
        {name: [point for point, _ in line] for name, line in ordered.items()},
        title=title,
        x_label=axis.label if axis else last,
        y_label="perplexity",
        log_y=bool(finite) and max(finite) > 20 * min(finite),
        point_labels={name: [label for _, label in line] for name, line in ordered.items()},
    )


def _line_name(row: Row, last: str) -> str:
    others = [f"{t.rpartition('.')[2]} {row.shown[t]}" for t in row.settings if t != last]
    return ", ".join(others) or last


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
