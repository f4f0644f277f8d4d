"""What must fit between the parts of a recipe: each stage finds what it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from mcsharp_exporters.base import Exporter

from mcsharp_sdk.errors import Problem
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.recipe.document import Finding, Location
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
            if stage.writes in chain.made:
                findings.append(Finding(location, _made_twice(stage)))
            findings += [
                Finding(location, _too_early(stage, later))
                for later in stages[index + 1 :]
                if later is not None and later.writes in stage.uses
            ]
            earlier = [s for s in stages[:index] if isinstance(s, Modifier)]
            findings += [
                Finding(place(location, problem), problem.message)
                for problem in stage.check_earlier(earlier)
            ]
        chain.pass_stage(stage)
    for index, exporter in enumerate(exports):
        if not isinstance(exporter, Exporter) or chain.anything:
            continue
        for artifacts in chain.missing_export(exporter):
            findings.append(
                Finding(("exports", index), chain.lacks_export(exporter, artifacts))
                if exports_given
                else Finding(("exports",), chain.lacks_default(exporter, artifacts))
            )
        known = [stage for stage in stages if isinstance(stage, Modifier)]
        findings += [
            Finding(place(("exports", index), problem), problem.message)
            for problem in exporter.check_stages(known)
        ]
    return findings + _shared_folders(exports)


def _shared_folders(exports: Sequence[Exporter | type[Exporter] | None]) -> list[Finding]:
    """Exporters that write into the folder of an earlier one, or the model itself again."""
    takers: dict[str, str] = {}
    findings = []
    for index, exporter in enumerate(exports):
        if not isinstance(exporter, Exporter):
            continue
        folder = getattr(exporter, "folder", None)
        if not isinstance(folder, str):
            if any(type(exporter) is type(other) for other in exports[:index]):
                again = "writes the same as one before it: leave one of them out"
                findings.append(Finding(("exports", index), f"{exporter.type} {again}"))
            continue
        if folder in takers:
            message = (
                f"{takers[folder]} before it writes into '{folder}' too: give each a "
                "'folder: NAME' of its own"
            )
            findings.append(Finding(("exports", index, "folder"), message))
        takers[folder] = exporter.type
    return findings


def place(part: Location, problem: Problem) -> Location:
    """Of a problem of a part of the recipe: at its setting, if it is about one."""
    return (*part, problem.where) if problem.where else part


def _uncalibrated(stage: Modifier) -> str:
    return (
        f"{stage.type} needs calibration text: add 'calibration: {{source: text, path: FILE}}', "
        "or '{source: embedded}' for a first try"
    )


def _made_twice(stage: Modifier) -> str:
    # It would overwrite what belongs to the first one, or take its layers for its own.
    what = stage.writes.replace("_", " ")
    return f"an earlier stage makes the {what} already: leave one of them out"


def _too_early(stage: Modifier, later: Modifier | type[Modifier]) -> str:
    name = later.type if isinstance(later, Modifier) else later.__name__
    what = later.writes.replace("_", " ")
    return f"{stage.type} goes by the {what} of {name}, which comes after it: move it behind {name}"


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

    def missing_export(self, exporter: Exporter) -> list[tuple[str, ...]]:
        """Groups of artifacts that lack; one of each group would do."""
        groups = [*((artifact,) for artifact in exporter.needs()), exporter.reads_any]
        return [group for group in groups if group and self.made.isdisjoint(group)]

    def lacks(self, stage: Modifier, artifact: str) -> str:
        remedies = [self._remedy((artifact,)), *_files_instead(stage, artifact)]
        return _needs(stage.type, (artifact,), remedies)

    def lacks_export(self, exporter: Exporter, artifacts: Sequence[str]) -> str:
        return _needs(exporter.type, artifacts, [self._remedy(artifacts)])

    def lacks_default(self, exporter: Exporter, artifacts: Sequence[str]) -> str:
        keep = "write 'exports: []' to end with the run directory"
        return _needs(f"{exporter.type}, the default,", artifacts, [self._remedy(artifacts), keep])

    def _remedy(self, artifacts: Sequence[str]) -> str:
        for later in self.stages[self.passed :]:
            if isinstance(later, Modifier) and later.writes in artifacts:
                return f"move {later.type} before it"
        makers = [n for n, kind in MODIFIERS.usable() if kind and kind.writes in artifacts]
        if makers:
            return f"add {_one_of(makers)} stage before it"
        return "add a stage that makes it"


def _one_of(names: Sequence[str]) -> str:
    article = "an" if names[0][:1].lower() in "aeio" else "a"
    return f"{article} {_alternatives(names)}"


def _alternatives(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _needs(name: str, artifacts: Sequence[str], remedies: Sequence[str]) -> str:
    what = _alternatives([artifact.replace("_", " ") for artifact in artifacts])
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
