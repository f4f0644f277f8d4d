"""Settings changed from the command line and from the environment."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sample_plugin
from hypothesis import given, settings
from hypothesis import strategies as st

from mcsharp_sdk.errors import InputProblems
from mcsharp_sdk.recipe import Recipe
from mcsharp_sdk.recipe.overrides import parse_override
from mcsharp_sdk.recipe.yaml_text import dump, parse

TEXT = """\
version: 1
calibration: {source: embedded, sequences: 4}
stages:
  - {type: Measure, widths: [1, 2]}
  - {type: Decide, target: 2.5}
exports:
  - {type: listing}
"""


def problems(overrides: list[str], text: str = TEXT) -> list[str]:
    with pytest.raises(InputProblems) as caught:
        Recipe.from_text(text, overrides=overrides)
    return [str(problem) for problem in caught.value.problems]


def decision(recipe: Recipe) -> sample_plugin.Decide:
    (found,) = (stage for stage in recipe.stages if isinstance(stage, sample_plugin.Decide))
    return found


@pytest.mark.parametrize("stage", ["stages.Decide", "stages[1]", "stages.1"])
def test_a_stage_is_named_by_its_type_or_its_index(stage: str) -> None:
    recipe = Recipe.from_text(TEXT, overrides=[f"{stage}.target=2.0", f"{stage}.rule=lowest"])
    assert (decision(recipe).target, decision(recipe).rule) == (2.0, "lowest")


def test_values_are_yaml_and_any_part_can_be_set() -> None:
    recipe = Recipe.from_text(
        TEXT,
        overrides=[
            "calibration.sequences=16",
            "stages.Measure.widths=[2, 3]",
            "stages.Measure.widths[0]=1",
            "stages.Measure.options={rounds: 5}",
            "exports.listing.order=descending",
        ],
    )
    assert len(recipe.sources) == 1
    assert recipe.sources[0].sequences == 16
    measure, listing = recipe.stages[0], recipe.exports[0]
    assert isinstance(measure, sample_plugin.Measure)
    assert (measure.widths, measure.options.rounds) == ((1, 3), 5)
    assert listing == sample_plugin.Listing(order="descending")


def test_the_recipe_as_run_holds_the_overrides() -> None:
    recipe = Recipe.from_text(TEXT, overrides=["stages.Decide.target=2"])
    assert Recipe.from_text(recipe.as_run).settings() == recipe.settings()
    assert decision(Recipe.from_text(recipe.as_run)).target == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.Decied.target=2", "stages has no 'Decied'; did you mean 'Decide'?"),
        ("stages[2].target=2", "stages has 2 entries, counted from 0: there is no [2]"),
        ("calibratoin.sequences=2", "the recipe has no 'calibratoin'; did you mean 'calibration'?"),
        ("calibratoin=2", "calibratoin: no such setting; did you mean 'calibration'?"),
        ("Decide.target=2", "has no 'Decide'; did you mean stages.Decide.target?"),
        ("listing.order=x", "has no 'listing'; did you mean exports.listing.order?"),
        ("target=2", "target: no such setting; did you mean 'stages.Decide.target'?"),
        ("stages.Decide.targt=2", "stages[1].targt: no such setting; did you mean 'target'?"),
        ("stages.Decide.target=x", "stages[1].target: should be a number, not 'x'"),
        ("stages.Decide.target=7", "stages[1].target: 7.0 is more than the widest width, 3"),
        ("stages.Decide.target.x=1", "stages[1].target has no entries, so there is no 'x' in it"),
        ("stages.Decide.target", "write it as target=value"),
        ("=2", "write it as target=value"),
        ("stages..target=2", "'stages..target' is no target"),
        ("stages[=2", "'stages[' is no target"),
        ("stages.Decide.target=[2", "the value cannot be read"),
        ("stages.Decide.target=!!python/name:os", "the value cannot be read"),
    ],
)
def test_an_override_that_is_wrong_is_told_as_itself(override: str, expected: str) -> None:
    (line,) = problems([override])
    assert line.startswith(f"--set {override}: ")
    assert expected in line


def test_a_type_that_two_stages_have_needs_an_index() -> None:
    text = TEXT.replace("exports:", "  - {type: Decide, target: 1}\nexports:")
    twice, ambiguous = problems(["stages.Decide.target=2"], text)
    assert "an earlier stage makes the decision already" in twice
    assert "stages has 2 of type 'Decide': write stages[1] or stages[2]" in ambiguous


def test_an_override_mends_what_is_wrong_in_the_file() -> None:
    text = TEXT.replace("target: 2.5", "target: ${NOT_SET}")
    recipe = Recipe.from_text(text, overrides=["stages.Decide.target=2"], environ={})
    assert decision(recipe).target == 2


def test_overrides_of_a_text_that_is_no_mapping_are_told() -> None:
    assert any("it is empty" in line or "has no entries" in line for line in problems(["a=1"], ""))


PLAIN_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cn")))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | PLAIN_TEXT
    | st.sampled_from(["1e3", "1e-3", "0x1", "yes", "2020-01-01", "$$", "${A}", "~", "", "1:30"])
)
KEYS = st.text("abc_ :$-", min_size=1, max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_a_value_given_as_json_arrives_as_it_is(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False).replace("\ufeff", "").replace("\ufffe", "")
    if "\ufeff" not in repr(value):
        assert parse_override(f"a.b={text}").value == value


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_dumped_data_are_read_back_the_same(value: Any) -> None:
    document = parse(dump({"key": value}), "recipe.yaml", "recipe.yaml", {})
    assert (document.data, document.findings) == ({"key": value}, [])
    assert type(document.data["key"]) is type(value)


def substituted(text: str, environ: dict[str, str]) -> Any:
    document = parse(text, "recipe.yaml", "recipe.yaml", environ)
    assert not document.findings
    return document.data


def test_references_take_the_environment_or_their_default_and_a_fitting_type() -> None:
    environ = {"NAME": "corpus.txt", "BITS": "2", "EMPTY": ""}
    text = """\
path: data/${NAME}
bits: ${BITS}
quoted: "${BITS}"
default: ${OTHER:-2.5}
empty: ${EMPTY:-8}
flow: {a: ${BITS}, b: [${OTHER:-x y, z: 3}]}
nothing: ${OTHER:-}
dollars: $$ and $${NAME} and $5
${NAME}: key
"""
    assert substituted(text, environ) == {
        "path": "data/corpus.txt",
        "bits": 2,
        "quoted": "2",
        "default": 2.5,
        "empty": 8,
        "flow": {"a": 2, "b": ["x y, z: 3"]},
        "nothing": None,
        "dollars": "$ and ${NAME} and $5",
        "${NAME}": "key",
    }


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_what_is_in_the_environment_never_becomes_structure(value: str) -> None:
    document = parse("a: {b: x${V}}\n", "recipe.yaml", "recipe.yaml", {"V": value})
    assert document.findings or document.data == {"a": {"b": f"x{value}"}}


def test_a_reference_without_value_is_an_error_at_its_line() -> None:
    text = TEXT.replace("target: 2.5", "target: ${TARGET}").replace("[1, 2]", '["${A:?}", 2]')
    with pytest.raises(InputProblems) as caught:
        Recipe.from_text(text, environ={})
    assert [str(problem) for problem in caught.value.problems] == [
        "recipe.yaml:4: stages[0].widths[0]: '${' begins no reference: write ${NAME} or "
        "${NAME:-default}, or $${ for the characters themselves",
        "recipe.yaml:5: stages[1].target: the environment has no 'TARGET': set it, or write "
        "${TARGET:-default}",
    ]


def test_the_recipe_as_run_holds_what_the_environment_gave() -> None:
    text = TEXT.replace("target: 2.5", "target: ${TARGET}")
    recipe = Recipe.from_text(text, environ={"TARGET": "1.5"})
    assert decision(Recipe.from_text(recipe.as_run, environ={})).target == 1.5
