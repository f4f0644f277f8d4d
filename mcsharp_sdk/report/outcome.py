"""Sections about what came out: sizes, bit widths, errors and pruning."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mcsharp_sdk.report.bars import stacked_bars
from mcsharp_sdk.report.elements import (
    Figure,
    Section,
    Table,
    bytes_text,
    cell_text,
    count_text,
    percent_text,
)
from mcsharp_sdk.report.measured import map_figure
from mcsharp_sdk.report.plot import line_plot
from mcsharp_sdk.report.run_folder import RunFolder
from mcsharp_sdk.report.shading import Stepped
from mcsharp_sdk.report.training import kept_plot, loss_plot, named_curves

_FIGURES = (
    ("weights on disk", "bytes", bytes_text),
    ("parameters", "parameters", count_text),
    ("nominal bits of quantised weights", "nominal_bits", cell_text),
    ("stored bits of quantised weights", "stored_bits", cell_text),
    ("nominal bits of experts", "expert_nominal_bits", cell_text),
    ("stored bits of experts", "expert_stored_bits", cell_text),
    ("weights read per token, all chosen experts", "activated_bytes_per_token", bytes_text),
    ("parameters used per token, all chosen experts", "activated_parameters_per_token", count_text),
)
"""Rows of the table before and after: what it says, key of the costs, how it is written."""

_QUALITY = (
    ("perplexity", "perplexity", cell_text),
    ("KL divergence from the original, nats", "kl_divergence", cell_text),
    ("top-1 agreement with the original", "top1_agreement", percent_text),
    ("activated experts", "activated_expert_ratio", percent_text),
    ("weights read per token, measured", "activated_bytes_per_token", bytes_text),
    ("parameters used per token, measured", "activated_parameters_per_token", count_text),
)
"""The same of an evaluation."""


def before_and_after(run: RunFolder) -> Iterator[Section]:
    """Costs of the original and of the compressed model, and saved evaluations."""
    rows = [
        [name, _written(run.before.get(key), shown), _written(run.after.get(key), shown)]
        for name, key, shown in _FIGURES
    ]
    tables = [Table("Cost", ["", "original", "compressed"], rows)]
    tables += [_quality_table(evaluation) for evaluation in run.evaluations]
    told = (
        "Nominal bits are the mean width, as papers count; stored bits count scales, zero points "
        "and padding too. Of the original, they are those of the weights that could be quantised."
    )
    code = "" if run.evaluations else _HOW_TO_EVALUATE
    yield Section("before-after", "Before and after", [told], tables, code=code)


_HOW_TO_EVALUATE = """# Adds perplexity and the distance to the original to this page:
mcsharp evaluate DIR --reference ORIGINAL --save"""


def _quality_table(evaluation: Mapping[str, Any]) -> Table:
    reference = evaluation.get("reference") or {}
    rows = [
        [name, _written(reference.get(key), shown), _written(evaluation.get(key), shown)]
        for name, key, shown in _QUALITY
    ]
    rows = [row for row in rows if row[1:] != ["–", "–"]]
    amount = f"{evaluation['tokens']:,} tokens in windows of {evaluation['window']}"
    return Table(
        f"Quality on {Path(evaluation['text']).name}, {amount}",
        ["", "original", "compressed"],
        rows,
    )


def _written(value: Any, shown: Any) -> str:
    return "–" if value is None else str(shown(float(value)))


def size_section(run: RunFolder) -> Iterator[Section]:
    """Bytes by role, before and after."""
    named = {"original": run.before.get("roles"), "compressed": run.after["roles"]}
    shares = {name: roles for name, roles in named.items() if roles}
    order = sorted(run.after["roles"], key=lambda role: -_bytes(shares, role))
    bars = {
        name: {role: float(roles[role]["bytes"]) for role in order if role in roles}
        for name, roles in shares.items()
    }
    svg = stacked_bars(
        bars,
        title="Weights on disk by role",
        shown=bytes_text,
        description="; ".join(
            f"{name}: " + ", ".join(f"{role} {bytes_text(size)}" for role, size in bar.items())
            for name, bar in bars.items()
        ),
    )
    rows = [
        [role, *(_written(bar.get(role), bytes_text) for bar in bars.values())] for role in order
    ]
    total = ["all", *(bytes_text(sum(bar.values())) for bar in bars.values())]
    table = Table("Weights on disk by role", ["", *bars], [*rows, total])
    caption = "What the weights on disk are for, on one scale."
    yield Section("size", "Size by role", figures=[[Figure(svg, caption, table)]])


def _bytes(shares: Mapping[str, Any], role: str) -> float:
    return max(
        (float(roles[role]["bytes"]) for roles in shares.values() if role in roles), default=0
    )


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def bits_section(run: RunFolder) -> Iterator[Section]:
    """The bit map."""
    widths = run.widths
    if not widths:
        return
    counts = Counter(width for row in widths.values() for width in row)
    told = ", ".join(
        f"{_number(counts[width], 'expert')} "
        + (f"at {_number(width, 'bit')}" if width else "removed")
        for width in sorted(counts)
    )
    linears = run.layout.linears if run.layout else {}
    others = ", ".join(f"{name} at {width}" for name, width in sorted(linears.items()))
    paragraphs = [f"{told}." + (f" Other linear layers: {others} bits." if others else "")]
    values = {layer: [float(w) for w in row] for layer, row in widths.items()}
    figure = map_figure(
        values,
        Stepped(sorted(counts)),
        title="Bits per expert",
        unit="bits",
        shown=lambda v: f"{v:.0f}",
        caption="The width of each expert, in bits: the darker, the narrower; 0 if removed.",
    )
    yield Section("bits", "Bit map", paragraphs, figures=[[figure]])


def error_section(run: RunFolder) -> Iterator[Section]:
    """Relative error of the quantised matrices' outputs, per layer."""
    layers = run.stage_report("GPTQQuantize").get("layers", {})
    series: dict[str, list[tuple[float, float]]] = {}
    for layer, notes in layers.items():
        for part, output in notes.get("squared_output", {}).items():
            error = notes["squared_error"][part]
            if error is None or output is None:
                series.setdefault(part, []).append((float(layer), math.nan))
            elif output > 0:
                series.setdefault(part, []).append((float(layer), math.sqrt(error / output)))
    if not series:
        return
    svg = line_plot(
        {part: sorted(points) for part, points in series.items()},
        title="Relative output error of quantised matrices",
        x_label="decoder layer",
        y_label="‖Δ·X‖ / ‖W·X‖",
        description="Root of the summed squared output errors over that of the outputs, per layer.",
    )
    numbers = sorted({int(x) for points in series.values() for x, _ in points})
    found = {part: {int(x): y for x, y in points} for part, points in series.items()}
    rows = [[f"layer {n}", *(found[part].get(n) for part in found)] for n in numbers]
    table = Table("Relative output error", ["", *found], rows)
    caption = "What quantising changed of the outputs, on the calibration inputs of each matrix."
    told = (
        "GPTQ keeps the outputs of each matrix as they were, on inputs that come from what is "
        "already quantised. This is how far it got: 0 is exact, 1 is as far off as zeros."
    )
    yield Section(
        "error", "Quantisation error per layer", [told], figures=[[Figure(svg, caption, table)]]
    )


def pruning_section(run: RunFolder) -> Iterator[Section]:
    """Share of experts kept per layer, and the training that led to it."""
    kept: dict[str, dict[int, float]] = {}
    if run.protection is not None:
        kept["TokenProtection"] = {
            found.layer: found.keep_ratio if found.pruned else 1.0
            for found in run.protection.layers
        }
    if run.training is not None:
        kept["TopAnyRouter"] = dict(run.training.keep_ratio)
    if not kept:
        return
    figures = [[_kept_figure(kept)]]
    if run.training is not None:
        figures.append(list(_training_figures(run)))
    told = "; ".join(f"{k} keeps {sum(v.values()) / len(v):.1%}" for k, v in kept.items())
    paragraphs = [f"Of the experts that the router chooses, on the calibration text: {told}."]
    yield Section("pruning", "Experts kept at run time", paragraphs, figures=figures)


def _kept_figure(kept: Mapping[str, Mapping[int, float]]) -> Figure:
    svg = line_plot(
        {k: [(float(n), 100 * ratio) for n, ratio in v.items()] for k, v in kept.items()},
        title="Experts kept per layer",
        x_label="decoder layer",
        y_label="kept, % of chosen",
        description="Share of the chosen experts that a token keeps, per layer.",
    )
    layers = sorted({n for found in kept.values() for n in found})
    rows = [
        [f"layer {n}", *(_written(v.get(n), percent_text) for v in kept.values())] for n in layers
    ]
    caption = "Share of the experts chosen by the router that is computed."
    return Figure(svg, caption, Table("Experts kept", ["", *kept], rows))


def _training_figures(run: RunFolder) -> Iterator[Figure]:
    assert run.training is not None
    curves = named_curves(run.training)
    for svg, caption, name in (
        (
            kept_plot(run.training),
            "Share of kept experts while the networks are trained.",
            "keep_ratio",
        ),
        (
            loss_plot(run.training),
            "Distance to the unpruned model while they are trained.",
            "error",
        ),
    ):
        rows = [[key, c.steps, *_ends(getattr(c, name))] for key, c in curves.items() if c.steps]
        columns = ["", "steps", "mean of the first tenth", "mean of the last tenth"]
        yield Figure(svg, caption, Table(caption.rstrip("."), columns, rows))


def _ends(values: Any) -> tuple[float, float]:
    length = max(1, len(values) // 10)
    return sum(values[:length]) / length, sum(values[-length:]) / length
