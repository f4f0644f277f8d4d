"""Whether there is room for a run's results, told before it begins."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from pathlib import Path

from rich.filesize import decimal

from mcsharp_sdk.data.tokenise import tokenizer_files
from mcsharp_sdk.engine.plan import Plan
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.folders import folder_bytes
from mcsharp_sdk.models.source import SourceModel


def check_disk_space(plan: Plan, source: SourceModel, run_directory: Path, output: Path) -> None:
    """Check that what a run will write has room, by the sizes of its plan.

    What an earlier run left in the run directory counts as written already. An output that will be
    replaced stays until the new one is complete, so its room counts as taken.

    Raises
    ------
    InputError
        If a file system has too little room; the message says what needs how much.
    """
    kept = min(folder_bytes(run_directory), plan.run_bytes)
    needs = {
        "the run directory": (run_directory, plan.run_bytes - kept),
        "the result": (output, plan.output_bytes + _copied_bytes(source.path)),
    }
    if not plan.output_bytes:
        del needs["the result"]
    shared: dict[int, list[tuple[str, Path, int]]] = defaultdict(list)
    for what, (folder, size) in needs.items():
        place = _existing(folder)
        shared[place.stat().st_dev].append((what, place, size))
    for parts in shared.values():
        free, needed = shutil.disk_usage(parts[0][1]).free, sum(size for *_, size in parts)
        if needed > free:
            listed = " and ".join(f"{decimal(size)} for {what}" for what, _, size in parts)
            raise InputError(
                f"too little disk space: the run needs {listed} on the file system of "
                f"{parts[0][1]}, where {decimal(free)} are free; make room, or give another "
                "output or run directory"
            )


def _copied_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in tokenizer_files(model))


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    absolute = Path(os.path.abspath(folder))
    return next(place for place in (absolute, *absolute.parents) if place.is_dir())
