"""Several runs on one page: quality against cost, and which of them no other beats in both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcsharp_sdk._version import __version__
from mcsharp_sdk.artifact_file import read_json_object, write_text_atomically
from mcsharp_sdk.errors import InputError, Problem, raise_problems
from mcsharp_sdk.evaluation.saved import SavedEvaluation, read_evaluations
from mcsharp_sdk.folders import EVALUATION_FILE, SWEEP_FILE
from mcsharp_sdk.report.elements import (
    Figure,
    Page,
    Section,
    Table,
    bytes_text,
    cell_text,
    count_text,
    percent_text,
)
from mcsharp_sdk.report.page import page_to_write, render
from mcsharp_sdk.report.plot import Point, line_plot
from mcsharp_sdk.report.sweep import BYTES, READ, CostAxis, differs

FRONT = "no other is better in both"
ORIGINAL = "original"

STORED = CostAxis("stored_bits", "stored bits per quantised weight")
COSTS = (STORED, BYTES, READ)
QUALITIES = {"perplexity": "perplexity", "kl_divergence": "KL divergence (nats)"}
"""Key of an evaluation -> label. Less is better in each."""

_COLUMNS = (
    ("perplexity", "perplexity", cell_text),
    ("KL divergence, nats", "kl_divergence", cell_text),
    ("top-1 agreement", "top1_agreement", percent_text),
    ("nominal bits", "nominal_bits", cell_text),
    ("stored bits", "stored_bits", cell_text),
    ("weights on disk", "bytes", bytes_text),
    ("read per token", "activated_bytes_per_token", bytes_text),
    ("parameters used per token", "activated_parameters_per_token", count_text),
    ("activated experts", "activated_expert_ratio", percent_text),
)


@dataclass(frozen=True)
class Run:
    """A run of the plot: its name, and its evaluation under the conditions that all share."""

    name: str
    evaluation: SavedEvaluation


def write_comparison(directories: Sequence[str | Path], output: str | Path) -> Path:
    """Draw quality against cost of several runs from the evaluations that are saved with them.

    Parameters
    ----------
    directories : folders of models that ``evaluate --save`` has been in, and outputs of sweeps.
    output : file to write: a page, or only the first picture if its name ends in ``.svg``.

    Returns
    -------
    The file's path.

    Raises
    ------
    InputError
        If a folder has no evaluation, or there is no text, window and number of tokens on which
        all of them were evaluated; or if another file than a page or picture is at ``output``.
    """
    target = page_to_write(output)
    runs = read_runs(directories)
    figures = list(pareto_figures(runs))
    text = figures[0].svg if target.suffix == ".svg" else render(_page(runs, figures))
    write_text_atomically(target, text)
    return target


def read_runs(directories: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, each with its latest evaluation of the conditions all share."""
    if not directories:
        raise InputError("there is nothing to compare: give folders of models or sweeps")
    found: dict[str, list[SavedEvaluation]] = {}
    problems: list[Problem] = []
    for folder in map(Path, directories):
        evaluations = _sweep(folder) if (folder / SWEEP_FILE).is_file() else _saved(folder)
        if not any(evaluations.values()):
            problems.append(Problem(str(folder), _NOTHING.format(folder=folder)))
        found |= evaluations
    raise_problems("the comparison", problems)
    shared = set.intersection(*({_conditions(e) for e in es} for es in found.values()))
    if not shared:
        told = "; ".join(f"{name}: {_told(es[-1])}" for name, es in found.items())
        raise InputError(
            f"no text, window and number of tokens is the same for all ({told}): evaluate them "
            "together with: mcsharp evaluate --compare DIR DIR --save"
        )
    chosen = next(c for c in map(_conditions, reversed(next(iter(found.values())))) if c in shared)
    return [
        Run(name, next(e for e in reversed(evaluations) if _conditions(e) == chosen))
        for name, evaluations in found.items()
    ]


_NOTHING = f"has no {EVALUATION_FILE}: mcsharp evaluate --compare {{folder}} --save makes one"


def _saved(folder: Path) -> dict[str, list[SavedEvaluation]]:
    return {str(folder): read_evaluations(folder)}


def _sweep(folder: Path) -> dict[str, list[SavedEvaluation]]:
    """Variant -> its evaluation; variants that failed are left out."""
    path = folder / SWEEP_FILE
    try:
        results = read_json_object(path)["variants"]
        return {f"{folder}: {r['name']}": [r["evaluation"]] for r in results if r["evaluation"]}
    except (InputError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not what a sweep writes ({error}): run the sweep again with --overwrite"
        ) from None


def _conditions(evaluation: SavedEvaluation) -> tuple[str, int, int]:
    text = Path(str(evaluation["text"])).name
    return text, evaluation["tokens"], evaluation["window"]


def _told(evaluation: SavedEvaluation) -> str:
    text, tokens, window = _conditions(evaluation)
    return f"{tokens:,} tokens of {text} in windows of {window}"


def pareto_figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """Each quality that all runs have against each cost that differs between them."""
    evaluations = [run.evaluation for run in runs]
    for quality, label in QUALITIES.items():
        if any(_quality(evaluation, quality) is None for evaluation in evaluations):
            continue
        varied = [axis for axis in COSTS if differs(evaluations, axis.key)]
        for axis in varied or COSTS[:1]:
            yield _pareto_figure(runs, quality, label, axis)


def _quality(evaluation: SavedEvaluation, key: str) -> float | None:
    """None if it was not measured. Every evaluation has a perplexity: null is an infinite one."""
    value = evaluation.get(key)
    if value is None:
        return math.inf if key == "perplexity" else None
    return float(value)


def pareto_front(points: Mapping[str, Point]) -> list[str]:
    """Names of points that no other one is below and left of, from the left.

    A point is beaten by another that is as good in both and better in one.
    """
    front: list[str] = []
    lowest = float("inf")
    for name, (_, y) in sorted(points.items(), key=lambda item: item[1]):
        if y < lowest or (front and points[front[-1]] == points[name]):
            front.append(name)
            lowest = y
    return front


def _pareto_figure(runs: Sequence[Run], quality: str, label: str, axis: CostAxis) -> Figure:
    points = {
        run.name: (axis.scale * float(run.evaluation[axis.key]), value)
        for run in runs
        if (value := _quality(run.evaluation, quality)) is not None
    }
    front = pareto_front(points)
    series: dict[str, Sequence[Point]] = {FRONT: [points[name] for name in front]}
    series |= {name: [point] for name, point in points.items()}
    original = _original(runs) if quality == "perplexity" else None
    if original is not None:
        costs = [x for x, _ in points.values()]
        series[ORIGINAL] = [(min(costs), original), (max(costs), original)]
    values = [y for line in series.values() for _, y in line if 0 < y < math.inf]
    caption = f"Below and left is better. {FRONT.capitalize()}: {', '.join(front)}."
    svg = line_plot(
        series,
        title=f"{label.capitalize() if quality == 'perplexity' else label} against {axis.label}",
        x_label=axis.label,
        y_label=label,
        log_y=bool(values) and max(values) > 20 * min(values),
        description=caption,
        unmarked=[FRONT, ORIGINAL],
    )
    rows = [[name, *point, "yes" if name in front else "no"] for name, point in points.items()]
    table = Table(f"{label} against {axis.label}", ["", axis.label, label, "on the front"], rows)
    return Figure(svg, caption, table)


def _original(runs: Sequence[Run]) -> float | None:
    """Perplexity of the original, if the runs know one and agree."""
    found = {(run.evaluation.get("reference") or {}).get("perplexity") for run in runs}
    value = found.pop() if len(found) == 1 else None
    return float(value) if value is not None else None


def _page(runs: Sequence[Run], figures: Sequence[Figure]) -> Page:
    rows = [
        [
            run.name,
            *(
                "–" if (v := run.evaluation.get(key)) is None else shown(float(v))
                for _, key, shown in _COLUMNS
            ),
        ]
        for run in runs
    ]
    table = Table("Quality and cost", ["", *(name for name, _, _ in _COLUMNS)], rows)
    return Page(
        title=f"{len(runs)} run{'' if len(runs) == 1 else 's'} compared",
        summary=f"Evaluated on {_told(runs[0].evaluation)}.",
        tiles=(),
        sections=[
            Section("pareto", "Quality against cost", figures=[[figure] for figure in figures]),
            Section("numbers", "All figures", tables=[table]),
        ],
        footer=f"Written by mcsharp_sdk {__version__}.",
    )
