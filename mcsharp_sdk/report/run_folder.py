"""What a compressed model's folder tells about the run that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mcsharp_sdk.arguments import path_argument
from mcsharp_sdk.artifact_file import Artifact, read_json_file
from mcsharp_sdk.artifacts import ExpertStatistics, TokenProtectionRule, TopAnyTraining
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.cost import cost_facts, model_cost
from mcsharp_sdk.evaluation.saved import SavedEvaluation, read_evaluations
from mcsharp_sdk.evaluation.stored import read_config_json, read_layout
from mcsharp_sdk.folders import RECIPE_FILE, REPORT_FILE
from mcsharp_sdk.runtime.layout import PackedLayout

AnyArtifact = TypeVar("AnyArtifact", bound=Artifact)


@dataclass(frozen=True)
class RunFolder:
    """A compressed model and what its stages left beside it.

    Attributes
    ----------
    path : the folder.
    model_type : family, as in config.json.
    layout : how it is packed and pruned; None if it is neither.
    report : content of ``mcsharp_report.json``; empty if there is none.
    recipe : as run; empty if there is none.
    after : costs, see :func:`mcsharp_sdk.evaluation.cost.cost_facts`.
    statistics, protection, training : what stages wrote; None if they did not.
    evaluations : that were saved in the folder.
    """

    path: Path
    model_type: str
    layout: PackedLayout | None
    report: Mapping[str, Any]
    recipe: str
    after: Mapping[str, Any]
    statistics: ExpertStatistics | None
    protection: TokenProtectionRule | None
    training: TopAnyTraining | None
    evaluations: Sequence[SavedEvaluation] = ()
    stages: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @classmethod
    def read(cls, directory: str | Path) -> RunFolder:
        """Read a folder; no weight is loaded.

        Raises
        ------
        InputError
            If it is no model folder, or a file in it cannot be read.
        """
        path = path_argument(directory, "directory")
        config = read_config_json(path)
        recipe_file, report_file = path / RECIPE_FILE, path / REPORT_FILE
        recipe = recipe_file.read_text(encoding="utf-8") if recipe_file.is_file() else ""
        return cls(
            path=path,
            model_type=str(config.get("model_type", "")),
            layout=read_layout(config, path),
            report=read_json_file(report_file) if report_file.is_file() else {},
            recipe=recipe,
            after=cost_facts(model_cost(path)),
            statistics=_load(ExpertStatistics, path),
            protection=_load(TokenProtectionRule, path),
            training=_load(TopAnyTraining, path),
            evaluations=read_evaluations(path),
            stages=_stages(recipe, recipe_file),
        )

    @property
    def name(self) -> str:
        """Of the model that was compressed."""
        return str(self.report.get("model") or self.path.resolve().name)

    @property
    def is_result(self) -> bool:
        """Whether mcsharp made the model."""
        return bool(self.report) or self.layout is not None

    @property
    def before(self) -> Mapping[str, Any]:
        """Costs of the original, as far as they are known."""
        known = self.report.get("before")
        if isinstance(known, Mapping):
            return known
        size = self.report.get("bytes_before")
        return {} if size is None else {"bytes": size}

    @property
    def warnings(self) -> list[str]:
        """What was noticed on the way."""
        return [str(warning) for warning in self.report.get("warnings", ())]

    @property
    def widths(self) -> Mapping[int, tuple[int, ...]]:
        """Decoder layer -> bit width of each expert; empty if experts are not packed."""
        return dict(sorted(self.layout.experts.items())) if self.layout else {}

    def stage_report(self, stage: str) -> Mapping[str, Any]:
        """What a stage had to say; empty if it had nothing, or was not run."""
        found = self.report.get("stages", {})
        told = found.get(stage, {}) if isinstance(found, Mapping) else {}
        return told if isinstance(told, Mapping) else {}

    def settings(self, stage: str) -> Mapping[str, Any]:
        """Settings of the first stage of a type as the recipe gives them; empty without one."""
        return next((s for s in self.stages if s.get("type") == stage), {})


def _load(kind: type[AnyArtifact], folder: Path) -> AnyArtifact | None:
    path = folder / kind.FILE
    return kind.load(path) if path.is_file() else None


def _stages(recipe: str, path: Path) -> tuple[Mapping[str, Any], ...]:
    try:
        content = yaml.safe_load(recipe)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not YAML: {error}; mend it or delete it") from None
    stages = content.get("stages") if isinstance(content, dict) else None
    return tuple(s for s in stages if isinstance(s, dict)) if isinstance(stages, list) else ()
