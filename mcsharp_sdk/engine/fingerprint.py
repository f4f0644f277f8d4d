"""What results depend on, as hashes: to resume a run, and to share stages between runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcsharp_sdk._version import __version__
from mcsharp_sdk.checked_files import file_hash, hash_of
from mcsharp_sdk.data.fingerprint import data_fingerprint
from mcsharp_sdk.data.tokenise import tokenizer_files
from mcsharp_sdk.folders import CONFIG_FILE
from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.recipe.schema import Recipe

RECIPE = "recipe"
CALIBRATION = "calibration"
TOKENIZER = "tokenizer"
COMMON = ("mcsharp_sdk version", "model config", "model weights")
"""Parts that the result of every stage depends on."""


def fingerprint(recipe: Recipe, source: SourceModel) -> dict[str, str]:
    """Part -> hash of everything that the result of a run depends on."""
    config = (source.path / CONFIG_FILE).read_text()
    common = (__version__, config, _weight_identity(source.checkpoint))
    parts = {RECIPE: hash_of(recipe.settings()["stages"])}
    parts.update(zip(COMMON, map(hash_of, common), strict=True))
    if recipe.calibration is not None:
        data = [data_fingerprint(source) for source in recipe.sources]
        parts[CALIBRATION] = hash_of([recipe.settings()["calibration"], data])
        parts[TOKENIZER] = hash_of(_tokenizer_hashes(source.path))
    for position, stage in enumerate(recipe.stages):
        for setting, path in stage.files().items():
            parts[_file_part(position, setting)] = file_hash(path)
        code = _own_code(type(stage))
        if code is not None:
            parts[_code_part(position)] = hash_of(code)
    return parts


def stage_keys(recipe: Recipe, parts: Mapping[str, str]) -> list[str]:
    """A key for each stage, equal for two stages if what their results depend on is equal.

    That is the stage's settings and the files they name, the model, the version, the calibration if
    the stage measures with it, and in the same way the earlier stages that made what it reads or
    uses, or what it writes again.

    Parameters
    ----------
    parts : the fingerprint of the run.
    """
    keys: list[str] = []
    makers: dict[str, str] = {}
    for position, stage in enumerate(recipe.stages):
        names = [*COMMON, *(_file_part(position, setting) for setting in stage.files())]
        names.append(_code_part(position))
        if stage.measures(calibrated=recipe.calibration is not None):
            names += [CALIBRATION, TOKENIZER]
        inputs = {*stage.needs(), *stage.uses, stage.writes}
        depends_on = [
            stage.model_dump(mode="json"),
            [parts.get(name) for name in names],
            {artifact: makers[artifact] for artifact in inputs & makers.keys()},
        ]
        makers[stage.writes] = hash_of(depends_on)
        keys.append(makers[stage.writes])
    return keys


def _file_part(position: int, setting: str) -> str:
    return f"stages[{position}].{setting}"


def _code_part(position: int) -> str:
    return f"code of stages[{position}]"


def _own_code(stage: type[Modifier]) -> str | None:
    """Source of the file that a stage of another package is in; None for stages of this one.

    Of a class without a file, such as one that was typed into an interpreter, as much as is known.
    """
    if stage.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return None
    try:
        return Path(inspect.getfile(stage)).read_text()
    except (OSError, TypeError):
        return f"{stage.__module__}.{stage.__qualname__}"


def _weight_identity(checkpoint: Checkpoint) -> list[Any]:
    """Headers, sizes and times of the weight files; their bytes are too many to hash."""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.files]
    tensors = [(n, str(i.dtype), list(i.shape)) for n, i in checkpoint.tensors.items()]
    return [files, tensors]


def _tokenizer_hashes(folder: Path) -> dict[str, str]:
    """Name -> hash of each file that makes tokens of text, or inputs of images."""
    return {file.name: file_hash(file) for file in tokenizer_files(folder)}
