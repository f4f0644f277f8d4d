"""Errors that a user meets, each with the exit code that the command line returns for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Result = TypeVar("Result")


class McSharpError(Exception):
    """Base of all errors that mcsharp_sdk raises on purpose."""

    exit_code = 1


class RunError(McSharpError):
    """Work had begun and could not be finished."""


class InputError(McSharpError, ValueError):
    """Something given by the user is wrong; found before any work was done."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it stands, and what is wrong and what to do."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class InputProblems(InputError):
    """Several problems of one input, reported together.

    Parameters
    ----------
    subject : what was checked, e.g. the recipe's file name.
    problems : at least one problem, in the order they should be read.
    more : how many there are besides, which are counted only.
    """

    def __init__(self, subject: str, problems: Sequence[Problem], more: int = 0) -> None:
        self.subject = subject
        self.problems = tuple(problems)
        self.more = more
        count = len(self.problems) + more
        heading = f"{subject} has {count} problem{'s' if count != 1 else ''}:"
        super().__init__("\n".join([heading, *(f"  {p}" for p in self.told)]))

    @property
    def told(self) -> list[Problem]:
        """The problems, and as one more how many are not told."""
        rest = [Problem("", f"and {self.more} more")] if self.more else []
        return [*self.problems, *rest]


MOST_NAMED = 3
"""Most names in one message, where nothing hangs on the others."""

MOST_MISFITS = 12
"""Most tensors that an error names: a wrong width is wrong in every layer."""


def some_of(names: Sequence[str], separator: str = ", ") -> str:
    """The first names, and how many more there are."""
    rest = len(names) - MOST_NAMED
    return separator.join(names[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def raise_problems(subject: str, problems: Sequence[Problem], most: int | None = None) -> None:
    """Raise the problems of a subject as one ``InputProblems``, if there are any.

    Parameters
    ----------
    most : how many are told; behind them stands how many more there are. None for all.
    """
    if problems:
        shown = problems[:most]
        raise InputProblems(subject, shown, more=len(problems) - len(shown))


@dataclass
class Checks:
    """Checks that do not depend on each other, so that all that fail are told together."""

    failed: list[InputError] = field(default_factory=list)

    def result(self, check: Callable[[], Result]) -> Result | None:
        """What a check returns; None if it fails."""
        try:
            return check()
        except InputError as error:
            self.failed.append(error)
            return None

    def raise_together(self, subject: str) -> None:
        """Raise what failed: one error as it is, several as the problems of ``subject``."""
        if len(self.failed) == 1:
            raise self.failed[0]
        if self.failed:
            found = [_as_problems(error) for error in self.failed]
            problems = [problem for error in found for problem in error.problems]
            raise InputProblems(subject, problems, more=sum(error.more for error in found))


def _as_problems(error: InputError) -> InputProblems:
    if isinstance(error, InputProblems):
        return error
    return InputProblems("", [Problem("", str(error))])
