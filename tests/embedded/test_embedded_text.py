"""The text that comes with Python: what is in it, and that held-out modules stay held out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mcsharp_sdk.embedded import calibration_text, evaluation_text, text, training_text
from mcsharp_sdk.errors import InputError


def paragraphs(content: str) -> set[str]:
    return {part.strip() for part in content.split("\n\n") if len(part.strip()) > 50}


def test_evaluation_text_shares_no_paragraph_with_the_training_text() -> None:
    evaluated, trained = paragraphs(evaluation_text()), paragraphs(training_text())
    assert len(evaluated) > 200
    assert not evaluated & trained
    assert not evaluated & paragraphs(calibration_text())


def test_held_out_modules_are_told_apart_by_their_first_words() -> None:
    import fractions
    import statistics

    for module in (fractions, statistics):
        first = (module.__doc__ or "").strip().splitlines()[0]
        assert first in evaluation_text()
        assert first not in training_text()


def test_calibration_text_is_prose_of_the_training_side() -> None:
    assert training_text().startswith(calibration_text())
    assert "class Decimal" not in calibration_text()
    assert "The following identifiers are used as reserved words" in calibration_text()


def test_there_is_enough_text_for_the_default_calibration() -> None:
    assert len(calibration_text()) > 1_500_000
    assert len(evaluation_text()) > 100_000


def test_the_text_does_not_depend_on_what_else_is_installed() -> None:
    assert "site-packages" not in {part for path, _ in text._modules() for part in path.split("/")}
    assert all(path.split("/")[0].removesuffix(".py") in sys.stdlib_module_names
               for path, _ in text._modules())  # fmt: skip


def test_docstrings_are_cleaned_ordered_and_given_once() -> None:
    source = '''"""Module."""
def first():
    """First.

    More.
    """
    if True:
        class Inner:
            "Inner"
class Second:
    """Inner"""
    async def method(self):
        """Method ünï \\\\ ."""
no = """not a docstring"""
'''
    assert text.docstrings(source) == "Module.\n\nFirst.\n\nMore.\n\nInner\n\nMethod ünï \\ ."


@pytest.mark.parametrize("source", ["def broken(:", "\0", "", "x = 1"])
def test_source_without_docstrings_gives_nothing(source: str) -> None:
    assert text.docstrings(source) == ""


def test_a_python_without_its_library_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_library", lambda: tmp_path / "gone")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    for read in (text.calibration_text, text.evaluation_text):
        with pytest.raises(InputError, match="carries no standard library source"):
            read.__wrapped__()


def test_missing_and_unreadable_modules_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "tool.py").write_text('"""Good."""')
    (tmp_path / "abc.py").write_bytes(b'"""\xff"""')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text('"""A test."""')
    (tmp_path / "other.py").write_text('"""Not of the library."""')
    monkeypatch.setattr(text, "_library", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert text.calibration_text.__wrapped__() == "Good."
