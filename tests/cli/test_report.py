"""mcsharp report, as a user calls it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import run
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), "mixtral")
    save_tiny_tokenizer(folder)
    (folder / "text.txt").write_text("abc, it is easy as one, two, three. " * 4)
    return folder


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, compressed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipe.yaml").write_text(
        f"version: 1\ncalibration: {{source: text, path: {model / 'text.txt'}, sequences: 4, "
        "length: 16}\nstages:\n  - {type: GPTQQuantize, bits: 2, group_size: 16}\n"
    )
    recipe, output = folder / "recipe.yaml", folder / "done"
    assert run("compress", recipe, "--model", model, "--output", output) == 0
    return output


def test_a_page_lies_in_the_folder_or_where_it_is_wanted(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", done) == 0
    assert str(done / "mcsharp_report.html") in capsys.readouterr().out
    assert run("report", done, "--output", tmp_path / "page.html", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(tmp_path / "page.html")}
    assert (tmp_path / "page.html").read_text() == (done / "mcsharp_report.html").read_text()


def test_an_original_model_has_nothing_to_report_and_gets_no_page(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", model) == 2
    told = capsys.readouterr().err
    assert f"{model} is not a result of mcsharp" in told
    assert f"`mcsharp inspect {model}` shows what it holds" in told
    original = shutil.copytree(model, tmp_path / "model")
    (original / "mcsharp_report.html").write_text("as older versions wrote it")
    options = ("--text", model / "text.txt", "--window", "32", "--device", "cpu", "--save")
    assert run("evaluate", original, *options) == 0
    assert (original / "mcsharp_report.html").read_text() == "as older versions wrote it"


def test_what_evaluate_saves_appears_on_the_page_and_can_be_compared(
    model: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", done) == 0
    options = ("--text", model / "text.txt", "--window", "32", "--device", "cpu", "--save")
    assert run("evaluate", done, *options) == 0
    assert "kept in" in capsys.readouterr().err
    assert "Quality on text.txt" in (done / "mcsharp_report.html").read_text()
    assert run("report", "--compare", done, "--output", tmp_path / "runs.html") == 0
    assert "1 run compared" in (tmp_path / "runs.html").read_text()


def test_a_model_stays_intact_when_it_is_evaluated_and_reported(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\ncalibration: {{source: text, path: {model / 'text.txt'}, sequences: 4, "
        "length: 16}\nstages:\n  - {type: TokenProtection}\nexports:\n  - {type: safetensors}\n"
        "  - {type: onnx_routers}\n"
    )
    done = tmp_path / "done"
    assert run("compress", recipe, "--model", model, "--output", done) == 0
    options = ("--text", model / "text.txt", "--window", "32", "--device", "cpu", "--save")
    assert run("evaluate", done, *options) == 0
    assert run("report", done) == 0
    assert run("inspect", done, "--verify") == 0
    assert run("export", "onnx_routers", done, "--overwrite", "--dtype", "fp16") == 0
    assert run("inspect", done, "--verify") == 0, capsys.readouterr().err


def test_no_other_file_is_replaced_by_a_page(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kept in (done / "config.json", next(done.glob("*.safetensors"))):
        before = kept.read_bytes()
        assert run("report", done, "--output", kept) == 2
        assert f"{kept} is there and is no page of a report" in capsys.readouterr().err
        assert kept.read_bytes() == before
    page = tmp_path / "page.html"
    page.touch()
    assert run("report", done, "--output", page) == 0
    assert run("report", done, "--output", page) == 0


def test_wrong_use_is_exit_code_two_and_one_message(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", model, model) == 2
    assert "several folders go on one page with --compare" in capsys.readouterr().err
    assert run("report", "--compare", model) == 2
    assert "--compare needs --output FILE" in capsys.readouterr().err
    assert run("report", "--compare", tmp_path, "--output", tmp_path / "x.html") == 2
    assert "mcsharp evaluate --compare" in capsys.readouterr().err
    assert run("report", tmp_path / "absent") == 2
    assert list(tmp_path.iterdir()) == []
