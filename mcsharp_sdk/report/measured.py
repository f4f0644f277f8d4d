"""Sections about what calibration measured: the experts' use, errors and coverage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from mcsharp_sdk.artifact_file import FloatArray
from mcsharp_sdk.artifacts import (
    DomainShift,
    ExpertStatistics,
    LayerStatistics,
    SourceStatistics,
)
from mcsharp_sdk.report.elements import Figure, Section, Table, short_text
from mcsharp_sdk.report.heat_map import Values, heat_map
from mcsharp_sdk.report.plot import line_plot
from mcsharp_sdk.report.run_folder import RunFolder
from mcsharp_sdk.report.shading import Gradual, Shading

COVERAGE = 128
"""Tokens below which an expert counts as starved where the recipe does not say."""


def experts_section(run: RunFolder) -> Iterator[Section]:
    """Heat maps of frequency and routing weight, and of errors."""
    statistics = run.statistics
    if statistics is None:
        return
    used = (
        "A row is a decoder layer, a column one of its experts. Frequency is the share of tokens "
        "that select the expert; the routing weight is its router probability, summed over those "
        "tokens and divided by all tokens."
    )
    measured = [f"Measured on {statistics.source}."] if statistics.source else []
    shifts = statistics.domain_shift()
    tables = [_shift_table(shifts)] if shifts else []
    maps = list(_use_maps(statistics))
    yield Section("experts", "How the experts are used", [*measured, used], tables, figures=maps)
    errors = list(_error_maps(statistics))
    if errors:
        told = (
            "The change of the output when this one expert is quantised, or dropped, and all else "
            "stays as it is. All maps have one scale."
        )
        yield Section("cost", "What quantising each expert costs", [told], figures=[errors])


def _use_maps(statistics: ExpertStatistics) -> Iterator[list[Figure]]:
    """Frequency and routing weight; where there are several sources, a row for each of both."""
    rows = _use_rows(statistics)
    several = any(layer.sources for layer in statistics.layers)
    yield from rows if several else [[figure for row in rows for figure in row]]


def _use_rows(statistics: ExpertStatistics) -> list[list[Figure]]:
    rows = []
    kinds: tuple[tuple[str, str, Callable[[ExpertStatistics], dict[str, Values]]], ...] = (
        ("Frequency", "% of tokens", _frequencies),
        ("Routing weight", "mean router probability, %", _routing_weights),
    )
    for name, unit, read in kinds:
        maps = read(statistics)
        shading = Gradual.over(_every(maps))
        titles = {source: f"{name}, {source}" if source else name for source in maps}
        rows.append(
            [
                map_figure(values, shading, title=titles[source], unit=unit, shown=short_text)
                for source, values in maps.items()
            ]
        )
    return rows


def _frequencies(statistics: ExpertStatistics) -> dict[str, Values]:
    return _by_source(statistics, lambda part: part.activation_count)


def _routing_weights(statistics: ExpertStatistics) -> dict[str, Values]:
    return _by_source(statistics, lambda part: part.routing_weight_sum)


def _by_source(
    statistics: ExpertStatistics, read: Callable[[LayerStatistics | SourceStatistics], FloatArray]
) -> dict[str, Values]:
    """Source -> layer -> values per 100 tokens; all sources together are called ""."""
    maps: dict[str, dict[int, list[float]]] = {}
    for layer in statistics.layers:
        parts: dict[str, LayerStatistics | SourceStatistics] = {s.source: s for s in layer.sources}
        parts = parts or {"": layer}
        for name, part in parts.items():
            tokens = part.tokens or _tokens(layer, statistics.top_k)
            maps.setdefault(name, {})[layer.layer] = (100 * read(part) / max(tokens, 1)).tolist()
    return dict(maps)


def _tokens(layer: LayerStatistics, top_k: int | None) -> float:
    """Tokens of the calibration; if nothing says how many, the selections take their place."""
    return float(layer.tokens or layer.activation_count.sum() / (top_k or 1))


def _error_maps(statistics: ExpertStatistics) -> Iterator[Figure]:
    """Error at each width, on one scale, and of dropping the expert."""
    widths = sorted({width for layer in statistics.layers for width in layer.widths})
    maps = {
        f"Error at {width} bit{'' if width == 1 else 's'}": {
            s.layer: s.quant_error[width].tolist() for s in statistics.layers if width in s.widths
        }
        for width in widths
    }
    dropped = {
        s.layer: s.drop_error.tolist() for s in statistics.layers if s.drop_error is not None
    }
    if dropped:
        maps["Error if the expert is dropped"] = dropped
    shading = Gradual.over(_every(maps))
    for title, values in maps.items():
        yield map_figure(values, shading, title=title, unit=_ERROR, shown=short_text)


_ERROR = "norm of the output's change"


def map_figure(
    values: Values,
    shading: Shading,
    *,
    title: str,
    unit: str,
    shown: Callable[[float], str],
    caption: str = "",
) -> Figure:
    """A heat map with its numbers as table; without a caption, its extremes are named."""
    caption = caption or _extremes(values, unit, shown)
    svg = heat_map(values, shading, title=title, unit=unit, shown=shown, description=caption)
    experts = max(map(len, values.values()))
    rows = [[f"layer {n}", *row, *[None] * (experts - len(row))] for n, row in values.items()]
    columns = ["", *(f"expert {e}" for e in range(experts))]
    return Figure(svg, caption, Table(f"{title}, {unit}", columns, rows))


def _extremes(values: Values, unit: str, shown: Callable[[float], str]) -> str:
    cells = [(v, layer, expert) for layer, row in values.items() for expert, v in enumerate(row)]
    (least, low_layer, low_expert), (most, top_layer, top_expert) = min(cells), max(cells)
    return (
        f"{unit[0].upper()}{unit[1:]}: "
        f"most {shown(most)} (layer {top_layer}, expert {top_expert}), "
        f"least {shown(least)} (layer {low_layer}, expert {low_expert})."
    )


def _every(maps: Mapping[str, Values]) -> list[float]:
    return [value for values in maps.values() for row in values.values() for value in row]


def _shift_table(shifts: Sequence[DomainShift]) -> Table:
    rows = [
        [f"layer {s.layer}", f"{s.first} and {s.second}", s.rank_correlation, s.describe()]
        for s in shifts
    ]
    columns = ["", "sources", "rank correlation", "shares that change most"]
    return Table("How differently the sources use the experts", columns, rows)


def coverage_section(run: RunFolder) -> Iterator[Section]:
    """Tokens per expert, and the experts that too few reached."""
    statistics = run.statistics
    if statistics is None:
        return
    limit = int(run.settings("ExpertStats").get("coverage", COVERAGE))
    starved = [
        [
            f"layer {s.layer}, expert {e}",
            int(count),
            float(count / max(_tokens(s, statistics.top_k), 1)),
        ]
        for s in statistics.layers
        for e, count in enumerate(s.activation_count)
        if count < limit
    ]
    total = sum(s.num_experts for s in statistics.layers)
    told = (
        f"Fewer than {limit} calibration tokens reached {len(starved)} of {total} experts, so what "
        "is known of them is weak. More calibration text, or text closer to the model's use, helps."
        if starved
        else f"Each of the {total} experts was reached by {limit} calibration tokens or more."
    )
    tables = (
        [Table("Starved experts", ["", "tokens", "share of tokens"], starved)] if starved else []
    )
    yield Section(
        "coverage", "Coverage", [told], tables, (), [[_coverage_figure(statistics, limit)]]
    )


def _coverage_figure(statistics: ExpertStatistics, limit: int) -> Figure:
    counts = {s.layer: [int(n) for n in s.activation_count] for s in statistics.layers}
    kinds: dict[str, Callable[[Sequence[int]], float]] = {
        "most": max,
        "median": median,
        "least": min,
    }
    series = {name: [(n, of(row)) for n, row in counts.items()] for name, of in kinds.items()}
    limit_name = f"starved below {limit}"
    series[limit_name] = [(min(counts), limit), (max(counts), limit)]
    svg = line_plot(
        {name: [(float(x), max(1.0, y)) for x, y in points] for name, points in series.items()},
        title="Calibration tokens per expert",
        x_label="decoder layer",
        y_label="tokens (none is drawn as 1)",
        log_y=True,
        unmarked=[limit_name],
        description="Tokens of the expert with most, the median and the least, in each layer.",
    )
    rows = [[f"layer {n}", *(float(of(row)) for of in kinds.values())] for n, row in counts.items()]
    caption = "Tokens that reach the experts of a layer: the most, the median and the least."
    return Figure(svg, caption, Table("Calibration tokens per expert", ["", *kinds], rows))
