"""A calibration of several sources in a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcsharp_sdk.errors import InputProblems
from mcsharp_sdk.recipe import Recipe, json_schema

STAGE = "stages: [{type: ExpertStats}]\nexports: []\n"


def recipe(calibration: str, *overrides: str, base: Path | None = None) -> Recipe:
    text = f"version: 1\ncalibration:\n{calibration}{STAGE}"
    return Recipe.from_text(text, overrides=overrides, base=base)


def problems(calibration: str, *overrides: str) -> list[tuple[str, str]]:
    with pytest.raises(InputProblems) as caught:
        recipe(calibration, *overrides)
    return [(problem.where, problem.message) for problem in caught.value.problems]


TWO = "  - {source: embedded, weight: 3, length: 32}\n  - {source: embedded, length: 16}\n"


def test_sources_share_the_sequences_by_weight(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    found = recipe(TWO + "  - {source: text, path: a.txt, sequences: 5}\n", base=tmp_path)
    assert [s.sequences for s in found.sources] == [96, 32, 5]
    assert [s.length for s in found.sources] == [32, 16, 2048]


def test_settings_of_a_list_read_back_as_the_same() -> None:
    found = recipe(TWO)
    again = Recipe.from_dict(found.settings())
    assert [s.sequences for s in again.sources] == [96, 32]


@pytest.mark.parametrize("target", ["calibration.0.weight", "calibration[0].weight"])
def test_overrides_reach_a_source(target: str) -> None:
    assert [s.sequences for s in recipe(TWO, f"{target}=1").sources] == [64, 64]


def test_overrides_reach_a_source_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    text = "  - {source: embedded}\n  - {source: text, path: a.txt}\n"
    found = recipe(text, "calibration.text.weight=3", base=tmp_path)
    assert [s.sequences for s in found.sources] == [32, 96]


def test_every_problem_of_a_list_is_told_with_its_line() -> None:
    text = (
        "  - {source: embedded, wieght: 2}\n  - {source: embeded}\n"
        "  - {source: embedded, weight: 0}\n  - 7\n  - {source: text, path: gone.txt}\n"
    )
    found = problems(text)
    assert [where for where, _ in found] == [f"recipe.yaml:{n}" for n in (3, 4, 5, 6, 7)]
    assert "calibration[0].wieght: no such setting; did you mean 'weight'?" in found[0][1]
    assert "did you mean 'embedded'?" in found[1][1]
    assert "calibration[2].weight: should be greater than 0" in found[2][1]
    assert "calibration[3]: should be a mapping" in found[3][1]
    assert "there is no such file" in found[4][1]


def test_a_weight_beside_a_number_or_without_a_list_is_refused() -> None:
    (both,) = problems("  - {source: embedded, weight: 2, sequences: 4}\n")
    assert both[0] == "recipe.yaml:3"
    assert "calibration[0].weight: 'sequences' says how many already" in both[1]
    (alone,) = problems("  {source: embedded, weight: 2}\n")
    assert "calibration.weight: has a meaning only in a list of sources" in alone[1]


def test_an_empty_list_is_refused() -> None:
    (empty,) = problems("  []\n")
    assert "give at least one source" in empty[1]


def test_the_json_schema_takes_a_list_of_what_it_takes_alone() -> None:
    schema = json_schema()
    alone, several, nothing = schema["properties"]["calibration"]["anyOf"]
    assert several == {"type": "array", "items": alone, "minItems": 1}
    assert nothing == {"type": "null"}
    kinds = [one["$ref"].rpartition("/")[2] for one in schema["$defs"]["calibration"]["oneOf"]]
    assert "ImageTextSource" in kinds
    weight = schema["$defs"]["ImageTextSource"]["properties"]["weight"]
    assert weight["anyOf"][0]["exclusiveMinimum"] == 0
