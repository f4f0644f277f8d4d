"""Variants of a recipe: every combination of the values that some of its settings are given."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mcsharp_sdk.arguments import text_list
from mcsharp_sdk.errors import InputError, InputProblems, Problem, raise_problems, some_of
from mcsharp_sdk.recipe.library import RecipeLike, as_recipe, recipe_path
from mcsharp_sdk.recipe.overrides import Overrides, override_texts, value_text
from mcsharp_sdk.recipe.schema import Recipe
from mcsharp_sdk.recipe.yaml_text import parse_value

LONGEST_NAME = 100
"""Characters of a folder's name; file systems allow 255 bytes."""

_OPENING, _CLOSING = ("[", "{"), ("]", "}")
_QUOTED = re.compile(r""" "(?:[^"\\]|\\.)*" | '(?:[^']|'')*' """, re.VERBOSE | re.DOTALL)


@dataclass(frozen=True)
class Value:
    """One value of a varied setting: as YAML text, and what that says."""

    text: str
    value: Any

    @property
    def shown(self) -> str:
        """The value for people: text without the quotes that it does not need."""
        bare = isinstance(self.value, str) and _reads_as_itself(self.value)
        return self.value if bare else self.text


@dataclass(frozen=True)
class Variation:
    """A setting and the values that it is given, e.g. ``stages.BitAllocation.target_bits``."""

    target: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Variant:
    """One combination of values.

    Attributes
    ----------
    name : of the combination, e.g. ``target_bits=2.5``; the name of a folder.
    values : target -> its value.
    recipe : with these values in it, checked.
    """

    name: str
    values: Mapping[str, Value]
    recipe: Recipe

    @property
    def settings(self) -> dict[str, Any]:
        """Target -> plain value."""
        return {target: value.value for target, value in self.values.items()}

    def placed(self, problem: Problem) -> Problem:
        """A problem of the recipe, with ``--vary`` named where that set what is wrong."""
        return _of_vary(problem, [f"{target}={v.text}" for target, v in self.values.items()])


@dataclass
class ProblemsOfVariants:
    """Problems of all variants, each told once.

    Parameters
    ----------
    subject : what was checked.
    """

    subject: str
    found: dict[Problem, list[str]] = field(default_factory=dict)
    variants: int = 0

    def add(self, problem: Problem, variant: str) -> None:
        """Note a problem of the variant of that name."""
        self.found.setdefault(problem, []).append(variant)

    def add_to_all(self, problem: Problem) -> None:
        """Note a problem that all variants have."""
        self.found[problem] = [""] * self.variants

    def raise_if_any(self) -> None:
        """Raise InputProblems if there were any."""
        raise_problems(self.subject, [self._told(p, names) for p, names in self.found.items()])

    def _told(self, problem: Problem, names: Sequence[str]) -> Problem:
        """The problem; with the variants that have it, if not all have and it does not say."""
        if len(names) == self.variants or problem.where.startswith("--vary "):
            return problem
        return Problem(problem.where, f"{problem.message} (with {some_of(names)})")


def parse_variations(vary: Sequence[str]) -> list[Variation]:
    """Read ``target=value,value,…``; values are YAML and end at commas outside of brackets.

    Raises
    ------
    InputProblems
        With everything that cannot be read.
    InputError
        If ``vary`` is no list of texts.
    """
    problems: list[Problem] = []
    variations = []
    for text in text_list(vary, "vary"):
        target, equals, written = text.partition("=")
        if not equals or not target.strip():
            wrong = "write it as target=value,value, e.g. stages.BitAllocation.target_bits=2,2.5"
            problems.append(Problem(f"--vary {text}", wrong))
            continue
        variations.append((target.strip(), split_values(written)))
    return _checked(variations, problems)


def variations_of(vary: Mapping[str, Sequence[Any]]) -> list[Variation]:
    """Variations from plain values: target -> its values.

    Raises
    ------
    InputProblems
        If there are none, or a value is no plain data.
    """
    problems: list[Problem] = []
    variations = []
    for target, values in vary.items():
        if not isinstance(target, str):
            problems.append(Problem("--vary", f"{target!r} is no setting: name one by a text"))
            continue
        if isinstance(values, str) or not isinstance(values, Sequence):
            problems.append(Problem(f"--vary {target}", f"give a list of values, not {values!r}"))
            continue
        try:
            texts = [value_text(value) for value in values]
        except (TypeError, ValueError) as error:
            problems.append(Problem(f"--vary {target}", f"a value is no plain data: {error}"))
            continue
        variations.append((target, texts))
    return _checked(variations, problems)


def split_values(text: str) -> list[str]:
    """The parts of a text between commas that stand outside of brackets and quotes.

    As in YAML, brackets and quotes within plain text are text: ``don't`` and ``a{`` open nothing.
    """
    parts, depth, before, position = [""], 0, "", 0
    while position < len(text):
        begins = _a_value_begins(parts[-1], before, depth)
        quoted = _QUOTED.match(text, position) if begins else None
        piece = quoted[0] if quoted else text[position]
        position += len(piece)
        if piece == "," and depth == 0:
            parts.append("")
            before = ""
            continue
        if piece in _OPENING and (begins or depth):
            depth += 1
        elif piece in _CLOSING and depth:
            depth -= 1
        parts[-1] += piece
        before = before if piece.isspace() else piece[-1]
    return [part.strip() for part in parts]


def _a_value_begins(part: str, before: str, depth: int) -> bool:
    """Whether a value may begin behind ``part``, whose last character but spaces is ``before``."""
    if depth:
        return before in ",:[{"
    return not before or (before == ":" and part[-1].isspace())


def open_variants(
    recipe: RecipeLike, variations: Sequence[Variation], overrides: Overrides = ()
) -> tuple[list[Variant], ProblemsOfVariants]:
    """The recipe with every combination of values; the last variation's values change fastest.

    Returns
    -------
    The variants whose recipe is right, and the problems of the others.

    Raises
    ------
    InputError
        If there is no such recipe.
    """
    if isinstance(recipe, Recipe):
        raise InputError(
            "a sweep changes a recipe file, a recipe's name or plain data, no Recipe: give its "
            "settings()"
        )
    same = override_texts(overrides)
    problems = ProblemsOfVariants(_subject(recipe))
    short = _short_names([variation.target for variation in variations])
    variants = []
    for combination in itertools.product(*(variation.values for variation in variations)):
        values = {v.target: value for v, value in zip(variations, combination, strict=True)}
        assignments = [f"{target}={value.text}" for target, value in values.items()]
        name = _name([f"{short[target]}={value.shown}" for target, value in values.items()])
        problems.variants += 1
        try:
            opened = as_recipe(recipe, [*same, *assignments])
            variants.append(Variant(name, values, opened))
        except InputProblems as error:
            for problem in error.problems:
                problems.add(_of_vary(problem, assignments), name)
    return variants, problems


def _subject(recipe: RecipeLike) -> str:
    if isinstance(recipe, Mapping):
        return "recipe"
    return recipe_path(recipe).name


def _checked(
    variations: Sequence[tuple[str, Sequence[str]]], problems: list[Problem]
) -> list[Variation]:
    """Variations with their values read; problems are raised together with those found before."""
    read: list[Variation] = []
    for target, texts in variations:
        here = f"--vary {target}"
        if target in (variation.target for variation in read):
            problems.append(Problem(here, "is given twice: give all its values at once"))
        read.append(Variation(target, tuple(_values(here, texts, problems))))
    if not variations and not problems:
        wrong = "nothing to vary: give e.g. stages.BitAllocation.target_bits=2.0,2.5"
        problems.append(Problem("--vary", wrong))
    raise_problems("the sweep", problems)
    return read


def _values(here: str, texts: Sequence[str], problems: list[Problem]) -> Iterator[Value]:
    if not texts:
        problems.append(Problem(here, "has no values"))
    for index, text in enumerate(texts):
        if not text:
            problems.append(Problem(here, f"value {index + 1} is empty; write null for nothing"))
            continue
        if text in texts[:index]:
            problems.append(Problem(here, f"the value {text} stands there twice"))
            continue
        try:
            yield Value(text, parse_value(text))
        except ValueError as error:
            problems.append(Problem(f"{here}={text}", f"the value cannot be read: {error}"))


def _of_vary(problem: Problem, assignments: Sequence[str]) -> Problem:
    """A problem that an override is named for, with the option that the override came from."""
    option, _, given = problem.where.partition(" ")
    start = given.removesuffix("...")
    if option == "--set" and any(text.startswith(start) for text in assignments):
        return Problem(f"--vary {given}", problem.message)
    return problem


def _reads_as_itself(text: str) -> bool:
    try:
        return bool(parse_value(text) == text)
    except ValueError:
        return False


def _short_names(targets: Sequence[str]) -> dict[str, str]:
    """Target -> its last step, with the step before where two end alike."""
    steps = {target: re.split(r"[.\[\]]+", target.strip("]")) for target in targets}
    for length in range(1, 5):
        names = {target: ".".join(parts[-length:]) for target, parts in steps.items()}
        if len(set(names.values())) == len(targets):
            return names
    return {target: target for target in targets}


def _name(assignments: Sequence[str]) -> str:
    """A folder's name for a combination; a hash tells apart those that cannot be written out."""
    exact = ",".join(assignments)
    name = re.sub(r"[^\w.=,+-]+", "_", exact, flags=re.ASCII)
    if name == exact and len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
