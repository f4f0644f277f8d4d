"""The training of top-any networks as a figure."""

from __future__ import annotations

from collections.abc import Sequence

from mcsharp_sdk.artifacts import WHOLE_MODEL, TopAnyTraining, TrainingCurve
from mcsharp_sdk.report.plot import HEIGHT, line_plot

MOST_POINTS = 200
"""A longer curve is drawn as the means of so many stretches."""


def training_plot(training: TopAnyTraining) -> str:
    """SVG text: the share of kept experts over the steps, and the distillation loss below it."""
    return _stacked([kept_plot(training), loss_plot(training)])


def kept_plot(training: TopAnyTraining) -> str:
    """SVG text: the share of kept experts over the steps."""
    return line_plot(
        {name: _points(c, c.keep_ratio) for name, c in named_curves(training).items()},
        title=f"Training of the top-any networks, scope {training.scope}",
        x_label="step",
        y_label="share of kept experts",
        description="Mean share of the chosen experts that the sampled masks kept, per step.",
    )


def loss_plot(training: TopAnyTraining) -> str:
    """SVG text: the distillation loss over the steps."""
    return line_plot(
        {name: _points(c, c.error) for name, c in named_curves(training).items()},
        title="Distillation loss",
        x_label="step",
        y_label="loss without penalty",
        log_y=True,
        description="Distance to the unpruned model without the penalty, per step, logarithmic.",
    )


def named_curves(training: TopAnyTraining) -> dict[str, TrainingCurve]:
    """Name for people -> curve."""
    return {n if n == WHOLE_MODEL else f"layer {n}": c for n, c in training.curves.items()}


def _points(curve: TrainingCurve, values: Sequence[float]) -> list[tuple[float, float]]:
    """(step, mean) of the stretches that a curve is drawn with."""
    length = -(-max(1, curve.steps) // MOST_POINTS)
    starts = range(0, curve.steps, length)
    parts = [values[start : start + length] for start in starts]
    return [(s + (len(p) - 1) / 2, sum(p) / len(p)) for s, p in zip(starts, parts, strict=True)]


def _stacked(figures: Sequence[str]) -> str:
    """Figures of one width below one another."""
    head, _, _ = figures[0].partition(">")
    opening = head.replace(f'height="{HEIGHT}"', f'height="{HEIGHT * len(figures)}"')
    opening = opening.replace(f' {HEIGHT}"', f' {HEIGHT * len(figures)}"')
    placed = [f'<g transform="translate(0 {HEIGHT * n})">\n{f}</g>' for n, f in enumerate(figures)]
    return "\n".join([f"{opening}>", *placed, "</svg>", ""])
