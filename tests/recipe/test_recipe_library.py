"""The recipes that come with the package, and the one in the project's description."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcsharp_sdk.data.calibration import TextSource
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.recipe import Recipe, open_recipe
from mcsharp_sdk.recipe.library import packaged

EXAMPLE = """\
version: 1
calibration: {source: text, path: corpus.txt, sequences: 128, length: 2048, seed: 0}
stages:
  - {type: ExpertStats, bits: [1, 2, 3]}
  - {type: BitAllocation, target_bits: 2.5, alpha: 1.0, beta: 1.0, gamma: 2.0}
  - {type: GPTQQuantize, group_size: 128, other_bits: 4}
exports:
  - {type: safetensors}
  - {type: onnx_routers}
"""


@pytest.mark.parametrize("name", packaged())
def test_each_packaged_recipe_is_right(name: str, tmp_path: Path) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("some words")
    recipe = open_recipe(name, environ={"CALIBRATION_TEXT": str(text)})
    assert recipe.stages
    assert packaged()[name].startswith("# ")


def test_the_example_recipe_is_right_as_written(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("some words")
    path = tmp_path / "recipe.yaml"
    path.write_text(EXAMPLE)
    recipe = Recipe.from_file(path)
    assert [stage.type for stage in recipe.stages] == [
        "ExpertStats",
        "BitAllocation",
        "GPTQQuantize",
    ]
    assert isinstance(recipe.sources[0], TextSource)
    assert recipe.sources[0].path == tmp_path / "corpus.txt"
    assert recipe.as_run == EXAMPLE


def test_a_budget_out_of_reach_is_told_at_its_line() -> None:
    text = EXAMPLE.replace("target_bits: 2.5", "target_bits: 3.5").replace(
        "{source: text, path: corpus.txt", "{source: embedded"
    )
    with pytest.raises(InputError, match=r"recipe\.yaml:5: stages\[1\]"):
        Recipe.from_text(text)


def test_an_allocation_without_statistics_is_told_what_to_add() -> None:
    text = EXAMPLE.replace("  - {type: ExpertStats, bits: [1, 2, 3]}\n", "").replace(
        "{source: text, path: corpus.txt", "{source: embedded"
    )
    with pytest.raises(InputError, match=r"recipe\.yaml:4: stages\[0\].*add an ExpertStats stage"):
        Recipe.from_text(text)


def test_a_file_goes_before_a_packaged_recipe_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_recipe("quickstart").as_run == packaged()["quickstart"]
    assert open_recipe("quickstart.yaml").as_run == packaged()["quickstart"]
    mine = packaged()["quickstart"] + "# mine\n"
    Path("quickstart.yaml").write_text(mine)
    assert open_recipe("quickstart.yaml").as_run == mine


@pytest.mark.parametrize("reference", ["quikstart", "./quickstart", "quikstart.yaml", "no/where"])
def test_a_recipe_that_is_nowhere_is_told(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        open_recipe(reference)
