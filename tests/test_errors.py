"""Messages of several problems told together."""

from __future__ import annotations

import pytest

from mcsharp_sdk.errors import Checks, InputError, InputProblems, Problem, raise_problems

TENSORS = [Problem(f"tensor {number}", "has another shape") for number in range(143)]


def test_the_heading_counts_all_problems_of_which_some_are_told() -> None:
    with pytest.raises(InputProblems) as caught:
        raise_problems("the model", TENSORS, 12)
    heading, *lines = str(caught.value).splitlines()
    assert heading == "the model has 143 problems:"
    assert lines[0] == "  tensor 0: has another shape"
    assert lines[12:] == ["  and 131 more"]


def test_problems_that_are_all_told_have_nothing_behind_them() -> None:
    with pytest.raises(InputProblems) as caught:
        raise_problems("the model", TENSORS[:12], 12)
    assert str(caught.value).startswith("the model has 12 problems:")
    assert "more" not in str(caught.value)
    raise_problems("the model", [], 12)


def test_checks_that_fail_together_count_what_each_does_not_tell() -> None:
    def refuse() -> None:
        raise InputError("the output exists already")

    checks = Checks()
    checks.result(lambda: raise_problems("the model", TENSORS, 12))
    checks.result(refuse)
    with pytest.raises(InputProblems) as caught:
        checks.raise_together("the run")
    assert str(caught.value).startswith("the run has 144 problems:")
    assert str(caught.value).endswith("  the output exists already\n  and 131 more")
