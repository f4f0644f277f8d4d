"""Evaluations that are kept in a model's folder, for its report and for plots of several runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcsharp_sdk.artifact_file import VERSION, check_version, read_json_object, write_json
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.folders import EVALUATION_FILE

SavedEvaluation = Mapping[str, Any]
"""``Evaluation.to_json`` and, if it was compared, ``kl_divergence``, ``top1_agreement`` and the
evaluation of the original under ``reference``."""

_CONDITIONS = ("text", "tokens", "window", "pruning")
"""An evaluation takes the place of an older one that agrees in these."""

_NEEDED = ("text", "tokens", "window", "perplexity", "stored_bits", "bytes")


def read_evaluations(folder: Path) -> list[SavedEvaluation]:
    """Evaluations saved in a folder, oldest first; none if there is no such file.

    Raises
    ------
    InputError
        If the file is there and is not what ``save_evaluation`` writes.
    """
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return []
    try:
        content = read_json_object(path)
        check_version(content)
        rows = content.get("evaluations")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError("'evaluations' must be a list of objects")
        for row in rows:
            if missing := [name for name in _NEEDED if name not in row]:
                raise InputError(f"an evaluation lacks {', '.join(missing)}")
    except InputError as error:
        raise InputError(f"{path}: {error}; mend it, or delete it to begin a new one") from None
    return rows


def save_evaluation(folder: Path, row: SavedEvaluation) -> Path:
    """Keep an evaluation in a folder; one of the same conditions is replaced. The file's path."""
    others = [kept for kept in read_evaluations(folder) if _conditions(kept) != _conditions(row)]
    path = folder / EVALUATION_FILE
    write_json(path, {"version": VERSION, "evaluations": [*others, dict(row)]})
    return path


def _conditions(row: SavedEvaluation) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _CONDITIONS)
