"""What ``import mcsharp_sdk`` gives."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import mcsharp_sdk

ROOT = Path(__file__).resolve().parents[1]

FRESH = """
import sys
import mcsharp_sdk

mcsharp_sdk.errors.InputError, mcsharp_sdk.errors.McSharpError
assert set(mcsharp_sdk.__all__) <= set(dir(mcsharp_sdk))
print(*sorted({"torch", "transformers", "pydantic", "numpy"} & set(sys.modules)))
"""


def test_errors_and_names_of_verbs_are_there_and_nothing_slow_is_imported() -> None:
    found = subprocess.run(
        [sys.executable, "-c", FRESH], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == ""


def test_both_packages_say_that_they_are_typed() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in ("mcsharp_sdk", "mcsharp_exporters"):
        assert "py.typed" in data["package-data"][package]
        assert (ROOT / data["package-dir"][package] / "py.typed").is_file()


def test_the_docstring_has_a_line_for_each_verb() -> None:
    verbs = set(mcsharp_sdk.__all__) - {"__version__", "errors"}
    assert mcsharp_sdk.__doc__ is not None
    table = re.findall(r"^``(\w+)`` +\w", mcsharp_sdk.__doc__, re.MULTILINE)
    assert sorted(table) == sorted(verbs)
