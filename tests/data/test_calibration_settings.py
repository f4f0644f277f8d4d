"""The calibration part of a recipe, and its fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from mcsharp_sdk.data import (
    Calibration,
    DatasetSource,
    EmbeddedSource,
    TextSource,
)
from mcsharp_sdk.data.fingerprint import data_fingerprint
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.recipe.paths import BASE

ADAPTER: TypeAdapter[Calibration] = TypeAdapter(Calibration)


def test_the_source_picks_the_class() -> None:
    kinds = [
        ADAPTER.validate_python(settings)
        for settings in (
            {"source": "text", "path": "a.txt"},
            {"source": "dataset", "name": "wikitext"},
            {"source": "embedded"},
        )
    ]
    assert [type(kind) for kind in kinds] == [TextSource, DatasetSource, EmbeddedSource]


def test_defaults_are_those_of_the_paper() -> None:
    settings = EmbeddedSource()
    assert (settings.sequences, settings.length, settings.seed) == (128, 2048, 0)


@pytest.mark.parametrize(
    "wrong", [{"sequences": 0}, {"length": -1}, {"seed": -1}, {"sampling": "some"}, {"legnth": 2}]
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python({"source": "embedded", **wrong})


def test_a_relative_path_starts_at_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    settings = ADAPTER.validate_python(
        {"source": "text", "path": "a.txt"}, context={BASE: tmp_path}
    )
    assert isinstance(settings, TextSource)
    assert settings.path == tmp_path / "a.txt"


def test_a_dataset_beside_the_recipe_is_found_and_other_names_stay(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    for name, expected in (("here", str(tmp_path / "here")), ("hub/name", "hub/name")):
        settings = ADAPTER.validate_python(
            {"source": "dataset", "name": name}, context={BASE: tmp_path}
        )
        assert isinstance(settings, DatasetSource)
        assert settings.name == expected


def test_every_setting_is_described() -> None:
    for kind in (TextSource, DatasetSource, EmbeddedSource):
        undescribed = [n for n, f in kind.model_fields.items() if not f.description]
        assert undescribed == ["source"]


def test_the_fingerprint_follows_the_contents_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    settings = TextSource(path=path)
    path.write_text("one")
    first = data_fingerprint(settings)
    assert data_fingerprint(settings) == first
    path.write_text("two")
    assert data_fingerprint(settings) != first


def test_the_fingerprint_of_a_dataset_follows_its_identity_and_local_files(tmp_path: Path) -> None:
    settings = DatasetSource(name=str(tmp_path))
    prints = [data_fingerprint(settings)]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    prints.append(data_fingerprint(settings))
    prints.append(data_fingerprint(DatasetSource(name=str(tmp_path), split="test")))
    prints.append(data_fingerprint(EmbeddedSource()))
    assert all(a != b for i, a in enumerate(prints) for b in prints[:i])


def test_the_fingerprint_of_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.txt: cannot be read: No such file"):
        data_fingerprint(TextSource(path=tmp_path / "gone.txt"))
