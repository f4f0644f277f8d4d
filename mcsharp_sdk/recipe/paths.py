"""Files named by a recipe's settings: where a relative path starts, and whether the file is there.

A setting of type :data:`RecipePath` needs nothing else. The recipe loader passes its folder as the
validation context; the path then becomes absolute and must name a file. A setting that is built
directly, without a recipe, keeps the path as given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo
from pydantic_core import PydanticCustomError

BASE = "base"
"""Key of the validation context: the folder that relative paths start from."""


def _locate(path: Path, info: ValidationInfo) -> Path:
    context: Mapping[str, Any] = info.context or {}
    base: Path | None = context.get(BASE)
    if base is None:
        return path
    try:
        full = base / path.expanduser()
        if full.is_file():
            return full
        fault = "is a folder, a file is needed" if full.is_dir() else "there is no such file"
    except (OSError, RuntimeError, ValueError) as error:
        fault = f"cannot be read ({error})"
    raise PydanticCustomError(
        "recipe_path",
        "'{path}': {fault} (looked in {base})",
        {"path": str(path), "fault": fault, "base": str(base)},
    )


RecipePath = Annotated[Path, AfterValidator(_locate)]
"""A file named in a recipe: relative to the recipe's folder, and there when a recipe is loaded."""
