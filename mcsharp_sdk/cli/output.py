"""What the verbs print: tables for people, one JSON document for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def console(*, stderr: bool = False) -> Console:
    """A console on the present standard output; plain and unwrapped where that is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    # Without emoji, or ":100:" of a recipe's line and names of files would become pictures.
    return Console(file=stream, highlight=False, emoji=False, soft_wrap=not stream.isatty())


def print_text(text: str) -> None:
    """Print for people, as it is, on standard output."""
    console().print(text, markup=False)


def print_note(text: str) -> None:
    """Print what is not the result, e.g. a warning, on standard error."""
    console(stderr=True).print(text, markup=False)


def print_error(text: str) -> None:
    """Print an error message on standard error."""
    console(stderr=True).print(f"[bold red]error:[/] {escape(text)}")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; numbers are set to the right, floats with four digits, ``None`` as a dash."""
    rows = [list(row) for row in rows]
    table = Table(
        title=escape(title) or None,
        title_justify="left",
        title_style="bold",
        show_header=any(columns),
    )
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], (int, float, type(None))) for row in rows)
        table.add_column(escape(column), justify="right" if rows and numeric else "left")
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row))
    screen = console()
    if not screen.is_terminal:
        screen.width = max(_width(columns, rows), len(title))
    screen.print(table)


def _width(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> int:
    """Characters that the table takes with nothing cut off."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    return sum(max(map(len, column)) + 3 for column in zip(*cells, strict=True)) + 1


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else str(value)


def print_json(document: Any) -> None:
    """Print one JSON document on standard output; numbers that JSON cannot say become ``null``.

    Takes plain data, and dataclasses, pydantic models, paths and numpy values inside it.
    """
    text = json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, BaseModel):
        return _plain(value.model_dump())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")
