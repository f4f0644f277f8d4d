"""What must fit between the parts of a recipe: each stage finds what it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from mcsharp_exporters.base import Exporter

from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.recipe.document import Finding
from mcsharp_sdk.recipe.registry import MODIFIERS


def misfits(
    stages: Sequence[Modifier | type[Modifier] | None],
    exports: Sequence[Exporter | type[Exporter] | None],
    *,
    calibrated: bool,
    exports_given: bool = True,
) -> list[Finding]:
    """Stages and exporters whose input no earlier stage makes, and a missing calibration.

    Parameters
    ----------
    stages, exports : in the recipe's order. A class stands for a part whose settings are wrong, so
        that only what it writes is known; ``None`` for one that is not known at all, and could make
        anything that comes after it possible.
    calibrated : the recipe has a calibration.
    exports_given : the exports stand in the recipe; else they are the default.
    """
    chain = _Chain(stages)
    findings = []
    for index, stage in enumerate(stages):
        if isinstance(stage, Modifier):
            location = ("stages", index)
            findings += [Finding(location, chain.lacks(stage, a)) for a in chain.missing(stage)]
            if stage.needs_calibration() and not calibrated:
                findings.append(Finding(location, _uncalibrated(stage)))
        chain.pass_stage(stage)
    for index, exporter in enumerate(exports):
        if not isinstance(exporter, Exporter) or chain.anything:
            continue
        for artifact in exporter.reads:
            if artifact not in chain.made:
                findings.append(
                    Finding(("exports", index), chain.lacks_export(exporter, artifact))
                    if exports_given
                    else Finding(("exports",), chain.lacks_default(exporter, artifact))
                )
    return findings


def _uncalibrated(stage: Modifier) -> str:
    return (
        f"{stage.type} needs calibration text: add 'calibration: {{source: text, path: FILE}}', "
        "or '{source: embedded}' for a first try"
    )


@dataclass
class _Chain:
    """What the stages passed so far have made."""

    stages: Sequence[Modifier | type[Modifier] | None]
    made: set[str] = field(default_factory=set)
    anything: bool = False
    passed: int = 0

    def pass_stage(self, stage: Modifier | type[Modifier] | None) -> None:
        self.passed += 1
        if stage is None:
            self.anything = True
        else:
            self.made.add(stage.writes)

    def missing(self, stage: Modifier) -> list[str]:
        return [] if self.anything else [a for a in stage.needs() if a not in self.made]

    def lacks(self, stage: Modifier, artifact: str) -> str:
        remedies = [self._remedy(artifact), *_files_instead(stage, artifact)]
        return _needs(stage.type, artifact, remedies)

    def lacks_export(self, exporter: Exporter, artifact: str) -> str:
        return _needs(exporter.type, artifact, [self._remedy(artifact)])

    def lacks_default(self, exporter: Exporter, artifact: str) -> str:
        keep = "write 'exports: []' to end with the run directory"
        return _needs(f"{exporter.type}, the default,", artifact, [self._remedy(artifact), keep])

    def _remedy(self, artifact: str) -> str:
        for later in self.stages[self.passed :]:
            if isinstance(later, Modifier) and later.writes == artifact:
                return f"move {later.type} before it"
        makers = [n for n, kind in MODIFIERS.usable() if kind and kind.writes == artifact]
        if makers:
            return f"add {_one_of(makers)} stage before it"
        return "add a stage that makes it"


def _one_of(names: Sequence[str]) -> str:
    article = "an" if names[0][:1].lower() in "aeio" else "a"
    return f"{article} {' or '.join(names)}"


def _needs(name: str, artifact: str, remedies: Sequence[str]) -> str:
    what = artifact.replace("_", " ")
    return f"{name} needs the {what} of an earlier stage: {', or '.join(remedies)}"


def _files_instead(stage: Modifier, artifact: str) -> list[str]:
    """Settings of the stage that, given a file, do away with its need for the artifact."""
    return [
        f"give '{name}: FILE'"
        for name, setting in type(stage).model_fields.items()
        if _takes_path(setting.annotation)
        and artifact not in stage.model_copy(update={name: Path("FILE")}).needs()
    ]


def _takes_path(annotation: Any) -> bool:
    parts = get_args(annotation)
    return annotation is Path or any(_takes_path(part) for part in parts)
