"""Variations as a user writes them, and the variants that they make."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mcsharp_sdk.engine.variants import (
    LONGEST_NAME,
    open_variants,
    parse_variations,
    split_values,
    variations_of,
)
from mcsharp_sdk.errors import InputError

RECIPE: dict[str, Any] = {
    "version": 1,
    "calibration": {"source": "embedded"},
    "stages": [
        {"type": "ExpertStats"},
        {"type": "BitAllocation", "target_bits": 2.5},
        {"type": "GPTQQuantize"},
    ],
}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.3,0.5,0.7", ["0.3", "0.5", "0.7"]),
        ("[1, 2],[1,2,3]", ["[1, 2]", "[1,2,3]"]),
        ("{3: 1, 2: 1}, {}", ["{3: 1, 2: 1}", "{}"]),
        ("{cheapest: [1, 2]},all", ["{cheapest: [1, 2]}", "all"]),
        ("'a,b',\"c,]\"", ["'a,b'", '"c,]"']),
        ("'it''s, so',[\"}\", 'x,']", ["'it''s, so'", "[\"}\", 'x,']"]),
        ('"a\\",b",c', ['"a\\",b"', "c"]),
        ('"a\\\\",b', ['"a\\\\"', "b"]),
        ('"open,b', ['"open', "b"]),
        ("don't,won't", ["don't", "won't"]),
        ("0{,null", ["0{", "null"]),
        ("0:[,a]},b", ["0:[", "a]}", "b"]),
        ("{a: 1}, a: [1, 2],c", ["{a: 1}", "a: [1, 2]", "c"]),
        ("pmq", ["pmq"]),
        ("1,", ["1", ""]),
        ("", [""]),
    ],
)
def test_values_end_at_commas_outside_of_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert split_values(text) == values


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1000, 1000)
    | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=6)
    | st.text("a0 ,:[]{}'\"-", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner),
    max_leaves=6,
)


@given(st.lists(plain, min_size=1, max_size=4))
def test_values_written_as_json_are_split_where_they_were_joined(values: list[Any]) -> None:
    texts = [json.dumps(value) for value in values]
    assert [json.loads(part) for part in split_values(",".join(texts))] == values


def written(value: Any) -> str:
    """A value as YAML on one line; text with commas in quotes, as a sweep needs it."""
    style = "'" if isinstance(value, str) and "," in value else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10**6)
    return text.removesuffix("...\n").strip()


@given(st.lists(plain, min_size=1, max_size=3))
def test_values_written_as_yaml_are_read_as_they_are(values: list[Any]) -> None:
    distinct = list(dict.fromkeys(map(written, values)))
    (read,) = parse_variations([f"stages[0].x={','.join(distinct)}"])
    assert [v.value for v in read.values] == [yaml.safe_load(text) for text in distinct]


def test_every_combination_is_a_variant_and_the_last_setting_changes_fastest() -> None:
    bits, allocators = [2.0, 2.5], ["pmq", "frequency"]
    vary: dict[str, Any] = {
        "stages.BitAllocation.target_bits": bits,
        "stages[1].allocator": allocators,
        "stages.BitAllocation.at_least": [{}],
    }
    variants, problems = open_variants(RECIPE, variations_of(vary))
    assert not problems.found
    found = [(v.recipe.stages[1], v.name) for v in variants]
    assert [(s.target_bits, s.allocator) for s, _ in found] == list(  # type: ignore[attr-defined]
        itertools.product(bits, allocators)
    )
    assert found[1][1].startswith("target_bits=2.0,allocator=frequency,at_least=")
    assert all(not stage.at_least for stage, _ in found)  # type: ignore[attr-defined]


def test_names_are_short_distinct_and_safe_for_files() -> None:
    vary: dict[str, Any] = {
        "stages.ExpertStats.group_size": [16, 32],
        "stages.GPTQQuantize.group_size": [16, 32],
        "stages.ExpertStats.bits": [[1, 2, 3], [1, 2, 3, 4]],
    }
    variants, _ = open_variants(RECIPE, variations_of(vary))
    names = [variant.name for variant in variants]
    assert names[0].startswith("ExpertStats.group_size=16,GPTQQuantize.group_size=16,")
    assert len(set(names)) == 8
    for name in names:
        assert len(name) <= LONGEST_NAME
        assert not set(name) & set("/\\ []{}'\"")


def test_a_text_is_no_list_of_variations_or_overrides() -> None:
    with pytest.raises(InputError, match=r"vary is a list: give \['a=1'\], not 'a=1'"):
        parse_variations("a=1")
    with pytest.raises(InputError, match="overrides is a list"):
        open_variants(RECIPE, variations_of({"quality": ["fast"]}), "quality=best")


def test_text_and_the_number_that_it_looks_like_have_different_names() -> None:
    variants, problems = open_variants(
        RECIPE, parse_variations(["calibration={source: text, path: x},{source: embedded}"])
    )
    assert [v.name for v in variants] == [n for n in (v.name for v in variants) if "embedded" in n]
    assert len(problems.found) == 1
    shown = variations_of({"x": ["2", 2, "a", "null", None]})[0].values
    assert [value.shown for value in shown] == ['"2"', "2", "a", '"null"', "null"]
