"""What a sweep will do, with everything checked that can be known before the first variant runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mcsharp_exporters.safetensors_model import SafetensorsExporter

from mcsharp_sdk.checked_files import hash_of
from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.engine.fingerprint import CALIBRATION, fingerprint, stage_keys
from mcsharp_sdk.engine.model_fit import check_model
from mcsharp_sdk.engine.run import read_calibration
from mcsharp_sdk.engine.variants import (
    ProblemsOfVariants,
    Variant,
    open_variants,
    parse_variations,
    variations_of,
)
from mcsharp_sdk.errors import InputError, InputProblems, Problem, raise_problems
from mcsharp_sdk.evaluation.text import check_max_tokens, choose_window, named_pieces, read_tokens
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.recipe.library import RecipeLike
from mcsharp_sdk.recipe.overrides import Overrides
from mcsharp_sdk.recipe.schema import Recipe


@dataclass(frozen=True)
class EvaluationSettings:
    """Text, window and tokens, as :func:`mcsharp_sdk.evaluate` takes them."""

    text: Path | None
    window: int | None
    max_tokens: int | None

    def fingerprint(self) -> str:
        """Hash of the settings and of the text."""
        content = self.text.read_bytes() if self.text else b""
        return hash_of([self.window, self.max_tokens, hashlib.sha256(content).hexdigest()])


@dataclass(frozen=True)
class PlannedVariant:
    """A checked variant.

    Attributes
    ----------
    name, settings, recipe : as in :class:`Variant`.
    shown : varied setting -> its value as it was written.
    fingerprint : part -> hash of everything that its evaluation depends on.
    stage_keys : of its stages, equal where a stage can be shared.
    """

    name: str
    settings: Mapping[str, Any]
    shown: Mapping[str, str]
    recipe: Recipe
    fingerprint: Mapping[str, str]
    stage_keys: Sequence[str]

    @property
    def identity(self) -> str:
        """A name for the folders of its intermediate results."""
        return hash_of(dict(self.fingerprint))[:16]


@dataclass(frozen=True)
class SweepPlan:
    """Variants in the order in which they run, and what they have in common.

    Attributes
    ----------
    title : of the plot.
    varied : settings that are varied.
    variants : in order.
    source : the model.
    evaluation : how they are evaluated.
    """

    title: str
    varied: Sequence[str]
    variants: Sequence[PlannedVariant]
    source: SourceModel
    evaluation: EvaluationSettings
    _calibrations: dict[str, CalibrationSet] = field(default_factory=dict)

    def calibration(self, recipe: Recipe) -> CalibrationSet:
        """Calibration sequences; read once for all recipes with the same calibration."""
        key = hash_of(recipe.settings()["calibration"])
        if key not in self._calibrations:
            self._calibrations[key] = read_calibration(recipe, self.source)
        return self._calibrations[key]


def plan_sweep(
    recipe: RecipeLike,
    model: Path,
    vary: Mapping[str, Sequence[Any]] | Sequence[str],
    overrides: Overrides,
    evaluation: EvaluationSettings,
    device: str,
) -> SweepPlan:
    """Check all variants, the model and the evaluation, and say what is to be done.

    Raises
    ------
    InputError
        If something is wrong; the problems of all variants together.
    """
    given = variations_of(vary) if isinstance(vary, Mapping) else parse_variations(vary)
    variants, problems = open_variants(recipe, given, overrides)
    source = _opened(model, device, problems)
    title = f"{problems.subject} on {source.path.name}"
    plan = SweepPlan(title, [v.target for v in given], [], source, evaluation)
    for variant in variants:
        for problem in _misfits(variant, plan):
            problems.add(variant.placed(problem), variant.name)
    for problem in _evaluation_problems(evaluation, source):
        problems.add_to_all(problem)
    problems.raise_if_any()
    planned = [_planned(variant, plan) for variant in variants]
    _check_distinct(planned)
    return replace(plan, variants=planned)


def _opened(model: Path, device: str, problems: ProblemsOfVariants) -> SourceModel:
    """The model; if it cannot be opened, the error tells what is wrong with the recipes too."""
    try:
        return SourceModel(model, device)
    except InputError as error:
        problems.add_to_all(Problem("model", str(error)))
        problems.raise_if_any()
        raise


def _misfits(variant: Variant, plan: SweepPlan) -> list[Problem]:
    """What is wrong with a variant whose recipe is right in itself."""
    found: list[Problem] = []
    try:
        check_model(variant.recipe, plan.source)
        plan.calibration(variant.recipe)
    except InputProblems as error:
        found += error.told
    except InputError as error:
        found.append(Problem(CALIBRATION, str(error)))
    if not any(isinstance(e, SafetensorsExporter) for e in variant.recipe.exports):
        wrong = "a sweep evaluates the compressed model: add {type: safetensors}"
        found.append(Problem("exports", wrong))
    return found


def _evaluation_problems(settings: EvaluationSettings, source: SourceModel) -> list[Problem]:
    config = source.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    checks: list[Callable[[], Any]] = [
        lambda: choose_window(settings.window, positions),
        lambda: check_max_tokens(settings.max_tokens),
    ]
    if settings.text is not None:
        checks.append(
            lambda: read_tokens(*named_pieces(settings.text), source.path, 2, config.vocab_size)
        )
    problems = []
    for check in checks:
        try:
            check()
        except InputError as error:
            problems.append(Problem("evaluation", str(error)))
    return problems


def _planned(variant: Variant, plan: SweepPlan) -> PlannedVariant:
    run = fingerprint(variant.recipe, plan.source)
    exports = variant.recipe.settings()["exports"]
    more = {"exports": hash_of(exports), "evaluation": plan.evaluation.fingerprint()}
    shown = {target: value.shown for target, value in variant.values.items()}
    keys = stage_keys(variant.recipe, run)
    return PlannedVariant(
        variant.name, variant.settings, shown, variant.recipe, {**run, **more}, keys
    )


def _check_distinct(variants: Sequence[PlannedVariant]) -> None:
    """Refuse two variants that are the same, e.g. since one value is written in two ways."""
    first: dict[str, str] = {}
    problems = []
    for variant in variants:
        name = first.setdefault(variant.identity, variant.name)
        if name != variant.name:
            problems.append(Problem(variant.name, f"is the same as {name}: leave one of them out"))
    raise_problems("the sweep", problems)
