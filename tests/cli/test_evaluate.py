"""mcsharp evaluate, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

from mcsharp_sdk import evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "mixtral")
    save_tiny_tokenizer(folder)
    (folder / "text.txt").write_text("abc, it is easy as one, two, three. " * 4)
    return folder


def test_json_equals_the_python_function(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--window", "32", "--max-tokens", "100", "--device", "cpu", "--json")
    assert run("evaluate", model, "--text", model / "text.txt", *options) == 0
    printed = json.loads(capsys.readouterr().out)
    result = evaluate(model, model / "text.txt", window=32, max_tokens=100, device="cpu")
    expected = json.loads(json.dumps(result.to_json()))
    timed = {"seconds"}
    assert {k: v for k, v in printed.items() if k not in timed} == {
        k: v for k, v in expected.items() if k not in timed
    }
    promised = {"perplexity", "tokens", "nominal_bits", "stored_bits", "bytes"}
    assert promised | {"activated_expert_ratio"} <= printed.keys()


def test_people_get_a_table_and_no_bar_in_a_pipe(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--window", "32", "--device", "cpu")
    assert run("evaluate", model, "--text", model / "text.txt", *options) == 0
    captured = capsys.readouterr()
    for part in (
        "perplexity",
        "144 in 5 windows of 32",
        "not compressed",
        "100.0%",
        "float32 on cpu",
    ):
        assert part in captured.out
    assert "windows" not in captured.err


def test_bad_input_is_exit_code_two_and_one_message(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", model / "absent") == 2
    assert "there is no folder" in capsys.readouterr().err
    text = model / "text.txt"
    assert run("evaluate", model, "--text", text, "--window", "4096", "--json") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "longer than the model's 128 positions" in captured.err


def test_several_models_make_one_table_with_their_distance_to_the_original(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--text", model / "text.txt", "--window", "32", "--device", "cpu")
    assert run("evaluate", "--compare", model, model, "--reference", model, *options) == 0
    table = capsys.readouterr().out
    assert table.count(str(model)) == 4  # the text's name, the original, and both models
    assert "100.0%" in table
    assert run("evaluate", "--compare", model, "--reference", model, *options, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["models"][0]["top1_agreement"] == 1.0
    assert printed["reference"]["perplexity"] == printed["models"][0]["perplexity"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("one", "two"), "several folders go into one table with --compare"),
        (("one", "--limit", "3"), "--limit goes with --tasks or --suite"),
        (("one", "--tasks", "piqa", "--window", "3"), "--window does not go with tasks"),
        (("one", "--tasks", "piqa", "--save"), "--save does not go with tasks"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", *arguments) == 2
    assert message in capsys.readouterr().err
