"""The report of a run as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import DictLoader, Environment, StrictUndefined

from mcsharp_sdk._version import __version__
from mcsharp_sdk.arguments import path_to_make
from mcsharp_sdk.artifact_file import write_text_atomically
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.folders import PAGE_FILE, check_file_to_write
from mcsharp_sdk.report.elements import Page, Section, Table, Tile, bytes_text, percent_text
from mcsharp_sdk.report.measured import coverage_section, experts_section
from mcsharp_sdk.report.outcome import (
    before_and_after,
    bits_section,
    error_section,
    pruning_section,
    size_section,
)
from mcsharp_sdk.report.run_folder import RunFolder

_PAGE = b"<!DOCTYPE html>"
"""How a page begins."""


def write_report(directory: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a compressed model.

    Parameters
    ----------
    directory : folder that ``compress`` wrote; no weight is loaded.
    output : file to write; by default ``mcsharp_report.html`` in the folder.

    Returns
    -------
    The file's path. It is one HTML file without scripts, and refers to nothing outside it.

    Raises
    ------
    InputError
        If the folder is no model, or not one that mcsharp made, or one of its files cannot be read;
        or if another file than a page is at ``output``.
    """
    run = RunFolder.read(directory)
    target = page_to_write(run.path / PAGE_FILE if output is None else output)
    if not run.is_result:
        raise InputError(
            f"{directory} is not a result of mcsharp, so there is nothing to report; "
            f"`mcsharp inspect {directory}` shows what it holds"
        )
    write_text_atomically(target, render(report_page(run)))
    return target


def page_to_write(output: str | Path) -> Path:
    """Where a page, or a picture, is to be written.

    Raises
    ------
    InputError
        If no file can be written there, or one is there that is neither.
    """
    target = path_to_make(output, "output")
    check_file_to_write(target)
    if target.exists() and not _may_be_replaced(target):
        raise InputError(f"{target} is there and is no page of a report: give another file")
    return target


def _may_be_replaced(file: Path) -> bool:
    with file.open("rb") as opened:
        start = opened.read(len(_PAGE))
    return not start or start == _PAGE or start.startswith(b"<svg ")


def report_page(run: RunFolder) -> Page:
    """The page of a run."""
    return Page(
        title=f"{run.name}, compressed",
        summary=_summary(run),
        tiles=list(_tiles(run)),
        sections=list(_sections(run)),
        footer=f"Written by mcsharp_sdk {run.report.get('sdk_version', __version__)}.",
    )


def render(page: Page) -> str:
    """HTML text; everything but the figures, which escape their own texts, is escaped."""
    return _environment().get_template("page").render(page=page, style=_resource("page.css"))


@cache
def _environment() -> Environment:
    return Environment(
        loader=DictLoader({"page": _resource("page.html.jinja")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _resource(name: str) -> str:
    return (files("mcsharp_sdk.report") / name).read_text(encoding="utf-8")


def _sections(run: RunFolder) -> Iterator[Section]:
    yield from _done(run)
    yield from before_and_after(run)
    yield from size_section(run)
    yield from bits_section(run)
    yield from experts_section(run)
    yield from coverage_section(run)
    yield from error_section(run)
    yield from pruning_section(run)
    yield from _warnings(run)
    yield from _recipe(run)


def _summary(run: RunFolder) -> str:
    before, after = run.before.get("bytes"), run.after["bytes"]
    kind = f"A {run.model_type} model" if run.model_type else "A model"
    if before is None:
        return f"{kind} of {bytes_text(after)}."
    size = f"{kind} of {bytes_text(before)} became one of {bytes_text(after)}"
    return f"{size}, {before / after:.1f} times smaller."


def _tiles(run: RunFolder) -> Iterator[Tile]:
    before, after = run.before.get("bytes"), run.after
    yield Tile(
        "weights on disk", bytes_text(after["bytes"]), f"of {bytes_text(before)}" if before else ""
    )
    if after["compressed"]:
        stored = f"{after['stored_bits']:.2f}"
        yield Tile("bits per quantised weight", stored, f"{after['nominal_bits']:.2f} nominal")
    if run.evaluations:
        yield _quality_tile(run.evaluations[-1])
    kept = _kept(run)
    if kept is not None:
        yield Tile("experts kept at run time", percent_text(kept), "of those the router chooses")
    count = len(run.warnings)
    yield Tile("warnings", str(count), "named below" if count else "nothing was noticed")


def _quality_tile(evaluation: Mapping[str, Any]) -> Tile:
    value = evaluation["perplexity"]
    before = (evaluation.get("reference") or {}).get("perplexity")
    note = f"of the original {before:.4g}" if before else "see before and after"
    return Tile("perplexity", "infinite" if value is None else f"{value:.4g}", note)


def _kept(run: RunFolder) -> float | None:
    """Share of the chosen experts kept, by what prunes last: the networks, else the rule."""
    for stage in ("TopAnyRouter", "TokenProtection"):
        found = run.stage_report(stage).get("keep_ratio")
        if isinstance(found, int | float):
            return float(found)
    return None


def _done(run: RunFolder) -> Iterator[Section]:
    if not run.stages:
        return
    rows = [
        [str(stage.get("type", "?")), _PURPOSE.get(str(stage.get("type")), ""), _settings(stage)]
        for stage in run.stages
    ]
    table = Table("Stages in order", ["stage", "what it does", "settings given"], rows)
    yield Section("done", "What was done", tables=[table])


_PURPOSE = {
    "ExpertStats": "measures how experts are used and what quantising each would cost",
    "BitAllocation": "chooses a bit width for each expert within the budget",
    "GPTQQuantize": "quantises layer by layer, correcting what rounding changes",
    "RouterCalibration": "fits the routers to the quantised experts",
    "TokenProtection": "finds the rule by which tokens drop experts, and which tokens keep all",
    "TopAnyRouter": "trains small networks that say how many experts a token needs",
}
"""Stage -> what it does, in a few words; stages of others have none."""


def _settings(stage: Mapping[str, Any]) -> str:
    given = (f"{name}: {_plain(value)}" for name, value in stage.items() if name != "type")
    return ", ".join(given) or "defaults"


def _plain(value: Any) -> str:
    """A setting as YAML would have it on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _warnings(run: RunFolder) -> Iterator[Section]:
    told = [] if run.warnings else ["Nothing was noticed on the way."]
    yield Section("warnings", "Warnings", told, items=run.warnings)


def _recipe(run: RunFolder) -> Iterator[Section]:
    if run.recipe:
        yield Section("recipe", "The recipe as run", code=run.recipe.rstrip())
