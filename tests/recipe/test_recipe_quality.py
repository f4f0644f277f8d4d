"""``quality``: which settings it stands for, and what wins over it."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from mcsharp_sdk.errors import InputProblems
from mcsharp_sdk.recipe.quality import DEFAULTS, Quality
from mcsharp_sdk.recipe.registry import MODIFIERS
from mcsharp_sdk.recipe.schema import Recipe

STAGES: list[dict[str, Any]] = [
    {"type": "ExpertStats"},
    {"type": "BitAllocation", "target_bits": 2.5},
    {"type": "GPTQQuantize"},
]


def recipe(stages: list[dict[str, Any]] = STAGES, **parts: Any) -> Recipe:
    calibration = {"source": "embedded"}
    return Recipe.from_dict({"version": 1, "calibration": calibration, "stages": stages, **parts})


@pytest.mark.parametrize("quality", get_args(Quality))
def test_every_quality_stands_for_settings_that_its_stages_have(quality: Quality) -> None:
    found = recipe(quality=quality)
    for stage, given in zip(found.stages, STAGES, strict=True):
        told = DEFAULTS[quality].get(stage.type, {})
        plain = MODIFIERS.load(stage.type).model_validate({**given, **told})
        assert stage == plain
    assert set(DEFAULTS[quality]) <= {stage["type"] for stage in STAGES}


def test_balanced_is_what_a_recipe_without_it_has() -> None:
    assert recipe(quality="balanced").stages == recipe().stages
    assert recipe(quality="fast").stages != recipe().stages != recipe(quality="best").stages


def test_what_is_written_wins_and_a_paper_is_followed() -> None:
    written = [{**STAGES[0], "quantizer": "gptq"}, STAGES[1], {**STAGES[2], "mode": "released"}]
    found = recipe(written, quality="fast").stages
    assert (found[0].quantizer, found[0].error_tokens) == ("gptq", 128)  # type: ignore[attr-defined]
    assert found[2] == MODIFIERS.load("GPTQQuantize").model_validate(written[2])


def test_an_override_wins_over_it() -> None:
    text = "version: 1\nquality: best\ncalibration: {source: embedded}\nstages:\n"
    text += "  - {type: ExpertStats}\n  - {type: BitAllocation, target_bits: 2}\n"
    found = Recipe.from_text(
        text + "  - {type: GPTQQuantize}\n", overrides=["stages.ExpertStats.error_tokens=77"]
    )
    assert found.stages[0].error_tokens == 77  # type: ignore[attr-defined]
    assert found.quality == "best"


def test_an_unknown_quality_is_refused_by_name() -> None:
    with pytest.raises(InputProblems, match="quality"):
        recipe(quality="good")


def test_stages_given_as_objects_get_it_too() -> None:
    kinds = [MODIFIERS.load(stage["type"]) for stage in STAGES]
    stages = [kind.model_validate(given) for kind, given in zip(kinds, STAGES, strict=True)]
    found = Recipe(version=1, quality="best", calibration={"source": "embedded"}, stages=stages)  # type: ignore[arg-type]
    assert found.stages == recipe(quality="best").stages
