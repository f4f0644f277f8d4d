"""mcsharp check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcsharp_sdk.cli.main import run

RECIPE = """\
version: 1
calibration: {source: embedded, sequences: 2, length: 32}
stages:
  - {type: GPTQQuantize, bits: 2, group_size: 64}
exports: []
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def check(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        run(["check", *map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_right_recipe_is_summed_up(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(recipe, "--set", "stages.GPTQQuantize.group_size=32") == 0
    printed = capsys.readouterr().out
    assert "GPTQQuantize" in printed
    assert "group_size=32" in printed
    assert "The recipe is right." in printed


def test_the_summary_is_data_with_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(recipe, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["valid"] is True
    assert printed["problems"] == []
    assert printed["recipe"]["stages"][0]["group_size"] == 64


def test_problems_go_to_standard_error(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(RECIPE.replace("group_size", "groupsize").replace("version: 1", "version: 2"))
    assert check(recipe) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{recipe} has 2 problems:" in printed.err
    assert "  recipe.yaml:1: version: should be 1, not 2\n" in printed.err
    assert (
        "  recipe.yaml:4: stages[0].groupsize: no such setting; did you mean 'group_size'?\n"
        in printed.err
    )


def test_problems_are_data_with_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(recipe, "--json", "--set", "stages.GPTQQuantize.grop_size=3") == 2
    printed = json.loads(capsys.readouterr().out)
    assert printed["valid"] is False
    assert printed["problems"] == [
        {
            "where": "--set stages.GPTQQuantize.grop_size=3",
            "message": "stages[0].grop_size: no such setting; did you mean 'group_size'?",
        }
    ]


def test_a_recipe_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check("quickstrat") == 2
    assert "did you mean 'quickstart'?" in capsys.readouterr().err


def test_nothing_is_written(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check("quickstart") == 0
    assert list(tmp_path.iterdir()) == [recipe]
