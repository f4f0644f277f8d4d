"""Errors that a user meets, each with the exit code that the command line returns for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
    """

    def __init__(self, subject: str, problems: Sequence[Problem]) -> None:
        self.subject = subject
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = f"{subject} has {count} problem{'s' if count != 1 else ''}:"
        super().__init__("\n".join([heading, *(f"  {p}" for p in self.problems)]))
