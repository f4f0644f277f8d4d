"""mcsharp recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcsharp_sdk.cli.main import run
from mcsharp_sdk.recipe.library import packaged


def recipes(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        run(["recipes", *map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_ls_tells_what_each_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes("ls") == 0
    assert "quickstart" in capsys.readouterr().out
    assert recipes("ls", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == list(packaged())
    assert all(entry["purpose"] for entry in listed)


def test_show_prints_the_exact_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes("show", "quickstart") == 0
    assert capsys.readouterr().out == packaged()["quickstart"]


def test_cp_writes_a_new_file_and_never_over_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipes("cp", "quickstart", tmp_path / "mine.yaml") == 0
    assert recipes("cp", "quickstart.yaml", tmp_path) == 0
    for name in ("mine.yaml", "quickstart.yaml"):
        assert (tmp_path / name).read_text() == packaged()["quickstart"]
    (tmp_path / "mine.yaml").write_text("kept")
    assert recipes("cp", "quickstart", tmp_path / "mine.yaml") == 2
    assert (tmp_path / "mine.yaml").read_text() == "kept"
    assert recipes("cp", "quickstart", tmp_path / "no" / "where.yaml") == 2
    assert "error:" in capsys.readouterr().err


def test_an_unknown_name_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes("show", "quikstart") == 2
    assert "did you mean 'quickstart'?" in capsys.readouterr().err
