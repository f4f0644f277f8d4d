"""Recipes from text and files: what is accepted, and that each mistake is told with its line."""

from __future__ import annotations

import re
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import sample_plugin
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.modifiers.bit_allocation import BitAllocation
from mcsharp_sdk.recipe import Recipe
from mcsharp_sdk.recipe.yaml_text import MAX_CHARACTERS

VALID = """\
version: 1
calibration: {source: embedded, sequences: 4, length: 64}
stages:
  - {type: Measure, widths: [1, 2]}
  - type: Decide
    target: 2.5
    rule: lowest
exports:
  - {type: listing}
"""


def problems(text: str) -> list[str]:
    with pytest.raises(InputProblems) as caught:
        Recipe.from_text(text)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


def decisions(recipe: Recipe) -> list[sample_plugin.Decide]:
    return [stage for stage in recipe.stages if isinstance(stage, sample_plugin.Decide)]


def test_each_part_is_of_its_own_class() -> None:
    recipe = Recipe.from_text(VALID)
    assert [type(stage) for stage in recipe.stages] == [sample_plugin.Measure, sample_plugin.Decide]
    assert [type(exporter) for exporter in recipe.exports] == [sample_plugin.Listing]
    assert len(recipe.sources) == 1
    assert (recipe.sources[0].source, recipe.sources[0].sequences) == ("embedded", 4)


def test_a_recipe_that_nothing_changed_runs_as_its_exact_text() -> None:
    text = f"# why these numbers\n{VALID}"
    assert Recipe.from_text(text).as_run == text


def test_the_settings_of_a_recipe_make_the_same_recipe() -> None:
    recipe = Recipe.from_text(VALID)
    assert Recipe.from_dict(recipe.settings()).settings() == recipe.settings()
    assert Recipe.from_text(Recipe.from_dict(yaml.safe_load(VALID)).as_run) is not None


def test_a_recipe_can_be_made_of_objects_and_is_checked_too() -> None:
    stages = [sample_plugin.Decide(target=2, given=3)]
    recipe = Recipe(version=1, stages=stages, exports=[sample_plugin.Listing()])
    assert recipe.stages == tuple(stages)
    with pytest.raises(ValueError, match="Decide needs the measurement of an earlier stage"):
        Recipe(version=1, stages=(sample_plugin.Decide(target=2),), exports=())


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    text = """\
version: 2
calibration: {source: embeded, sequences: 4}
stages:
  - {type: Measure, widths: [1, x], widths: 3}
  - type: Decide
    targt: 2.5
    rule: nearst
    given: nowhere.json
  - type: Decide
    rule: lowest
    target: 4
  - {type: Decied}
  - type: Broken
  - Measure
  - {type: 3}
  - {rule: 3}
exports:
  - {type: listng}
  - {type: listing, order: 3}
extra: 3
"""
    found = problems(text)
    patterns = [
        r"recipe.yaml:1: version: should be 1, not 2",
        r"recipe.yaml:2: calibration.source: unknown source 'embeded'; did you mean 'embedded'\?",
        r"recipe.yaml:4: stages\[0\].widths: given twice, the first time on line 4",
        r"recipe.yaml:4: stages\[0\].widths\[1\]: should be a whole number, not 'x'",
        r"recipe.yaml:6: stages\[1\].targt: no such setting; did you mean 'target'\?",
        r"recipe.yaml:7: stages\[1\].rule: should be 'nearest' or 'lowest', not 'nearst'; "
        r"did you mean 'nearest'\?",
        r"recipe.yaml:8: stages\[1\].given: 'nowhere.json': there is no such file.*",
        r"recipe.yaml:11: stages\[2\].target: 4.0 is more than the widest width, 3",
        r"recipe.yaml:12: stages\[3\].type: unknown stage 'Decied'; did you mean 'Decide'\?",
        r"recipe.yaml:13: stages\[4\].type: stage 'Broken' of sample-plugin 1.0 cannot be "
        r"imported: ModuleNotFoundError: .*package_that_is_not_there.*",
        r"recipe.yaml:14: stages\[5\]: should be a mapping such as .*",
        r"recipe.yaml:15: stages\[6\].type: should be a name, not 3",
        r"recipe.yaml:16: stages\[7\].type: required, but not given; there are .*Decide.*",
        r"recipe.yaml:18: exports\[0\].type: unknown exporter 'listng'; did you mean 'listing'\?",
        r"recipe.yaml:19: exports\[1\].order: should be 'ascending' or 'descending', not 3",
        r"recipe.yaml:20: extra: no such setting; there are calibration, exports, quality, "
        r"stages, version",
    ]
    assert len(found) == len(patterns), "\n".join(found)
    for pattern, line in zip(patterns, found, strict=True):
        assert re.fullmatch(pattern, line), line


def test_keys_may_be_numbers(tmp_path: Path) -> None:
    stage = "{type: BitAllocation, target_bits: 2, factors: factors.json, at_least: {3: 1, '2': 2}}"
    file = tmp_path / "recipe.yaml"
    file.write_text(f"version: 1\nstages: [{stage}]\nexports: []\n")
    (tmp_path / "factors.json").write_text("{}")
    (allocation,) = Recipe.from_file(file).stages
    assert isinstance(allocation, BitAllocation)
    assert allocation.at_least == {3: 1, 2: 2}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("version: 1\n", "", "recipe.yaml:1: version: required, but not given"),
        ("version: 1\n", "version: 1\nversion: 1\n", ":2: version: given twice"),
        ("target: 2.5", "target: much", ":6: stages[1].target: should be a number, not 'much'"),
        ("target: 2.5", "target: -1", ":6: stages[1].target: should be greater than 0"),
        ("target: 2.5", "target: yes", ":6: stages[1].target: should be a number, not true"),
        ("[1, 2]", "[1, on]", ":4: stages[0].widths[1]: should be a whole number, not 'true'"),
        ("version: 1\n", "version: yes\n", ":1: version: should be a whole number, not true"),
        ("sequences: 4", "sequences: yes", "sequences: should be a whole number, not true"),
        ("target: 2.5", "target: .nan", ":6: stages[1].target: '.nan' is no number"),
        ("target: 2.5", "target: 9" + 30 * "9", ":6: stages[1].target: '999"),
        ("    target: 2.5\n", "", ":5: stages[1].target: required, but not given"),
        ("widths: [1, 2]", "widths: 3", ":4: stages[0].widths: should be a list, not 3"),
        ("widths: [1, 2]", "options: {round: 3}", "options.round: no such setting; did you mean"),
        ("widths: [1, 2]", "options: 3", "options: should be a mapping of settings"),
        ("rule: lowest", "rule: !!python/name:os.system", "the tag 'python/name:os.system' has no"),
        ("rule: lowest", "? [a, b]\n    : 3", ":7: stages[1]: a key should be a plain name"),
        ("rule: lowest", "given: [3]", "stages[1].given: should be a file name, or should be a wh"),
        ("rule: lowest", "given: .", "stages[1].given: '.': is a folder, a file is needed"),
        ("sequences: 4", "sequence: 4", ":2: calibration.sequence: no such setting; did you mean"),
        ("- {type: listing}", "- {type: listing", ":10: this is not valid YAML"),
    ],
)
def test_a_mistake_is_told_where_it_is(old: str, new: str, expected: str) -> None:
    assert old in VALID
    assert any(expected in line for line in problems(VALID.replace(old, new)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml:1: it is empty"),
        ("# nothing\n", "recipe.yaml:1: it is empty"),
        ("- version: 1", "recipe.yaml:1: a recipe is a mapping"),
        ("just words", "recipe.yaml:1: a recipe is a mapping"),
        ("version: 1\nstages: []\n", "recipe.yaml:2: stages: at least one stage is needed"),
        ("version: 1\n", "recipe.yaml:1: stages: required, but not given"),
        ("version: 1\nstages: {type: Measure}\n", "recipe.yaml:2: stages: should be a list"),
        ("version: 1\nstages: [\n", "recipe.yaml:3: this is not valid YAML"),
        ("version: 1\n\tstages: 3\n", "recipe.yaml:2: this is not valid YAML"),
        ("version: 1\n---\nversion: 1\n", "one file holds one recipe"),
        ('version: "\\UFFFFFFFF"', "out of range"),
        ('version: "\\ud800"', "recipe.yaml:1: version: holds half a character"),
        ("version: 1\nx: \x00\n", "recipe.yaml:2: this is not valid YAML: character U+0000"),
        ("a: &a [*a]\n", "recipe.yaml:1: an anchor that holds itself has no end"),
        ("[" * 5000, "nested more than 32 levels deep"),
        ("a: [" + "x," * 20_000 + "]", "more than 10000 entries"),
        ("#" * (MAX_CHARACTERS + 1), "larger than 256 KiB"),
    ],
)
def test_a_text_that_is_no_recipe_is_refused(text: str, expected: str) -> None:
    assert expected in problems(text)[0]


def test_aliases_that_explode_are_refused_before_they_are_written_out() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    (line,) = problems("\n".join(lines))
    assert re.match(r"recipe.yaml:\d+: with its aliases written out", line)


def test_anchors_and_merge_keys_may_share_settings() -> None:
    shared = "[&first {source: embedded, sequences: 4, length: 64}, {<<: *first, sequences: 2}]"
    recipe = Recipe.from_text(VALID.replace("{source: embedded, sequences: 4, length: 64}", shared))
    assert [(part.sequences, part.length) for part in recipe.sources] == [(4, 64), (2, 64)]


def test_a_stage_says_which_stage_makes_what_it_needs() -> None:
    text = "version: 1\nstages:\n  - {type: Decide, target: 2}\nexports: [{type: listing}]\n"
    assert problems(text) == [
        "recipe.yaml:3: stages[0]: Decide needs the measurement of an earlier stage: "
        "add a Measure stage before it, or give 'given: FILE'"
    ]


def test_a_stage_in_the_wrong_order_is_told_to_move() -> None:
    text = VALID.replace("  - {type: Measure, widths: [1, 2]}\n", "").replace(
        "exports:", "  - {type: Measure}\nexports:"
    )
    (line,) = problems(text)
    assert "move Measure before it" in line


def test_a_stage_that_would_find_the_layers_of_another_is_refused() -> None:
    text = VALID.replace("stages:\n", "stages:\n  - {type: Measure}\n", 1)
    (line,) = problems(text)
    assert "stages[1]: an earlier stage makes the measurement already" in line


def test_a_stage_that_would_overwrite_what_another_made_is_refused() -> None:
    (line,) = problems(VALID.replace("exports:", "  - {type: Decide, target: 1}\nexports:"))
    assert "an earlier stage makes the decision already: leave one of them out" in line


def test_an_exporter_needs_its_artifact() -> None:
    text = "version: 1\ncalibration: {source: embedded}\nstages:\n  - {type: Measure}\n"
    (line,) = problems(text + "exports:\n  - {type: listing}\n")
    assert line.startswith("recipe.yaml:6: exports[0]: listing needs the decision of an earlier")
    (line,) = problems(text)
    assert "safetensors, the default, needs the quantized weights" in line
    assert "'exports: []'" in line
    assert Recipe.from_text(f"{text}exports: []").exports == ()


def test_two_exporters_do_not_share_a_folder() -> None:
    exports = "exports:\n  - {type: onnx_model}\n  - {type: onnx_model, precision: fp16}\n"
    quantise = "version: 1\nstages:\n  - {type: GPTQQuantize, bits: 2}\n"
    text = f"{quantise}calibration: {{source: embedded}}\n{exports}"
    (line,) = problems(text)
    assert line.startswith("recipe.yaml:7: exports[1].folder: onnx_model before it writes into")
    assert "give each a 'folder: NAME' of its own" in line
    Recipe.from_text(text.replace("fp16", "fp16, folder: half"))
    (line,) = problems(text.replace("fp16", "fp16, folder: onnx_routers") + ROUTERS)
    assert line.startswith("recipe.yaml:8: exports[2].folder: onnx_model before it writes into")
    model = "exports:\n  - {type: safetensors}\n  - {type: safetensors, max_shard_size: 1}\n"
    (line,) = problems(text.replace(exports, model))
    assert line.startswith("recipe.yaml:7: exports[1]: safetensors writes the same as one")


ROUTERS = "  - {type: onnx_routers}\n"


@pytest.mark.parametrize("name", ["config.json", "recipe.yaml", "README.md", "SHA256SUMS"])
def test_a_folder_is_not_named_like_a_file_of_the_output(name: str) -> None:
    text = VALID.replace("{type: listing}", f"{{type: onnx_routers, folder: {name}}}")
    (line,) = problems(text)
    assert line.startswith(f"recipe.yaml:9: exports[0].folder: '{name}' is named like a file")


def test_a_missing_calibration_is_told_at_the_stage_that_needs_it() -> None:
    (line,) = problems(VALID.replace("calibration: {", "#"))
    assert line.startswith("recipe.yaml:4: stages[0]: Measure needs calibration text")


def test_a_mistake_in_a_stage_does_not_hide_what_does_not_fit() -> None:
    found = problems(VALID.replace("widths: [1, 2]", "width: 3").replace("calibration: {", "#"))
    assert len(found) == 1  # a stage whose settings are wrong is not asked what it needs
    found = problems(VALID.replace("target: 2.5", "target: x").replace("calibration: {", "#"))
    assert [line.split(": ")[1] for line in found] == ["stages[0]", "stages[1].target"]


def test_files_are_found_next_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "given.json").write_text("{}")
    path = tmp_path / "recipe.yaml"
    path.write_text(VALID.replace("rule: lowest", "given: given.json"))
    (decision,) = decisions(Recipe.from_file(path))
    assert decision.given == tmp_path / "given.json"
    (tmp_path / "given.json").unlink()
    with pytest.raises(InputProblems, match=re.escape(f"(looked in {tmp_path})")):
        Recipe.from_file(path)


def test_files_that_cannot_be_recipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("version: 1\nname: käse".encode("latin-1"))
    (tmp_path / "large.yaml").write_bytes(b"#" * (4 * MAX_CHARACTERS + 1))
    expected = {
        "latin.yaml": "latin.yaml:2: is not text in UTF-8",
        "large.yaml": "larger than",
        ".": "is a folder",
        "latn.yaml": "there is no such file; did you mean 'latin.yaml'",
        "a\0b": "cannot be read",
    }
    for name, message in expected.items():
        with pytest.raises(InputProblems, match=re.escape(message)):
            Recipe.from_file(tmp_path / name)


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())
    assert len(Recipe.from_file(path).stages) == 2


MARKS = "{}[]:,-&*!|>'\"%@`#?\n \t$~<=\\\u2028\ue0000"
PIECES = st.one_of(st.text(MARKS, max_size=6), st.text(max_size=6), st.sampled_from(VALID.split()))
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, len(VALID)), st.integers(0, 20), st.lists(PIECES, max_size=4))
def test_no_edit_of_a_recipe_does_worse_than_an_input_error(
    start: int, length: int, pieces: list[str]
) -> None:
    expect_recipe_or_input_error(VALID[:start] + "".join(pieces) + VALID[start + length :])


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["stages", "exports", "calibration", "version"]), DATA)
def test_no_data_does_worse_than_an_input_error(key: str, value: object) -> None:
    data = {**yaml.safe_load(VALID), key: value}
    expect_recipe_or_input_error(yaml.safe_dump(data))
    with suppress(InputError):
        Recipe.from_dict(data)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_do_worse_than_an_input_error(raw: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(raw)
        file.flush()
        with pytest.raises(InputError):
            Recipe.from_file(file.name)


def expect_recipe_or_input_error(text: str) -> None:
    try:
        recipe = Recipe.from_text(text, environ={})
    except InputError as error:
        str(error).encode("utf-8")
    else:
        assert Recipe.from_text(recipe.as_run, environ={}).settings() == recipe.settings()
