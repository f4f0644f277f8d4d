"""Text that every Python installation carries, to train, calibrate and evaluate the embedded model.

Read from the running Python: the language reference in ``pydoc_data.topics``, and the docstrings
and source of the standard library. The wording differs a little between Python versions. It is
under the PSF licence.

Whole modules are held out for evaluation: nothing of them is in the training or calibration text.
"""

from __future__ import annotations

import ast
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mcsharp_sdk.errors import InputError

SEPARATOR = "\n\n"

HELD_OUT = frozenset(
    {
        "argparse",
        "configparser",
        "csv",
        "difflib",
        "fractions",
        "functools",
        "heapq",
        "ipaddress",
        "locale",
        "random",
        "shutil",
        "statistics",
        "string",
        "textwrap",
        "uuid",
    }
)
"""Top-level modules and packages whose docstrings are the evaluation text."""

LEFT_OUT = frozenset(
    {
        "antigravity",  # a joke, as is 'this'
        "encodings",  # tables of characters
        "distutils",  # gone since Python 3.12
        "ensurepip",  # carries pip
        "idlelib",
        "lib2to3",
        "pydoc_data",  # read as topics
        "sre_constants",
        "test",
        "this",
        "turtledemo",
    }
)
"""Top-level names that are no prose and no ordinary code."""

_UNWANTED_FOLDERS = frozenset({"test", "tests", "_vendor", "__pycache__", "idle_test"})


@cache
def training_text() -> str:
    """What the embedded model is trained on: :func:`calibration_text`, then source.

    Nothing of the held-out modules. Docstrings appear twice, as prose and inside their source.
    """
    return SEPARATOR.join([calibration_text(), *_sources(held_out=False)])


@cache
def calibration_text() -> str:
    """Topics and docstrings of the training side; no held-out module.

    Raises
    ------
    InputError
        If this Python carries no standard library source.
    """
    return _joined([*_topics(), *_docstrings(held_out=False)])


@cache
def evaluation_text() -> str:
    """Docstrings of the held-out modules, less those that share a long line with the training text.

    Raises
    ------
    InputError
        If this Python carries no standard library source.
    """
    seen = _long_lines(SEPARATOR.join([*_topics(), *_sources(held_out=False)]))
    found = (text.split(SEPARATOR) for text in _docstrings(held_out=True))
    paragraphs = (paragraph for part in found for paragraph in part)
    return _joined([p for p in paragraphs if seen.isdisjoint(_long_lines(p))])


def _joined(documents: list[str]) -> str:
    if not documents:
        raise InputError(
            "the embedded text cannot be read: this Python carries no standard library source "
            f"in {_library()}; use a full Python installation, or give a text file"
        )
    return SEPARATOR.join(documents)


def _long_lines(text: str) -> set[str]:
    """Lines long enough that meeting one twice means that the text was copied."""
    lines = (line.strip(" \t\"'") for line in text.splitlines())
    return {line for line in lines if len(line) > 50}


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some minimal installations leave it out
        return []
    return [topics[name].strip() for name in sorted(topics)]


def _sources(*, held_out: bool) -> list[str]:
    return [
        text for name, text in _modules() if (_top(name) in HELD_OUT) == held_out and text.strip()
    ]


def _docstrings(*, held_out: bool) -> list[str]:
    texts = (docstrings(source) for source in _sources(held_out=held_out))
    return [text for text in texts if text]


def docstrings(source: str) -> str:
    """All docstrings of a Python source text, cleaned, in order, each once, two newlines between.

    Source that does not parse gives an empty string.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the library's own strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    found = (ast.get_docstring(node, clean=False) for node in (tree, *_definitions(tree)))
    return SEPARATOR.join(dict.fromkeys(inspect.cleandoc(text).strip() for text in found if text))


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions below a node, in order; expressions hold none and are not visited."""
    for block in ("body", "handlers", "cases", "orelse", "finalbody"):
        for child in getattr(node, block, []):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            yield from _definitions(child)


def _modules() -> Iterator[tuple[str, str]]:
    """(path within the library, text) of every wanted module, sorted by path."""
    library = _library()
    if not library.is_dir():
        return
    tops = [entry for entry in library.iterdir() if _wanted(entry.name.removesuffix(".py"))]
    found = (path for top in tops for path in ([top] if top.is_file() else top.rglob("*.py")))
    for path in sorted(path.relative_to(library) for path in found):
        if _UNWANTED_FOLDERS.intersection(path.parts):
            continue
        try:
            yield path.as_posix(), (library / path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # an unreadable module is a missing module


def _wanted(top: str) -> bool:
    """Whether a top-level module is read; other folders may hold any number of packages."""
    return (
        top in sys.stdlib_module_names
        and top not in LEFT_OUT
        and not top.startswith("_sysconfigdata")
    )


def _top(path: str) -> str:
    """Top-level module of a path within the library."""
    return path.split("/")[0].removesuffix(".py")
