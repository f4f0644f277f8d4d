"""mcsharp sweep, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

from mcsharp_sdk.modifiers.gptq_quantize import GPTQQuantize

RECIPE = """\
version: 1
calibration: {source: text, path: text.txt, sequences: 4, length: 32}
stages:
  - {type: GPTQQuantize, bits: 2, group_size: 16}
"""
VARY = ("--vary", "stages.GPTQQuantize.bits=2,3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "mixtral", num_hidden_layers=1, hidden_size=32, head_dim=8)
    save_tiny_tokenizer(folder)
    (folder / "text.txt").write_text("".join(chr(33 + (i * i) % 90) for i in range(500)))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def sweep(model: Path, output: Path, *options: str | Path) -> int:
    text = ("--text", model / "text.txt", "--window", "32", "--max-tokens", "64")
    where = ("--model", model, "--output", output)
    return run("sweep", model / "recipe.yaml", *where, *text, *options)


def test_people_get_a_table_and_know_where_the_rest_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(model, tmp_path / "out", *VARY) == 0
    printed = capsys.readouterr()
    for part in ("bits=2", "bits=3", "perplexity", "100.0%", "sweep.csv", "sweep.svg"):
        assert part in printed.out
    assert "variant 2 of 2: bits=3" in printed.err
    assert printed.err.count("few tokens reached") == 1, "told once, not once per variant"


def test_json_is_one_document(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(model, tmp_path / "out", *VARY, "--keep-models", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [v["settings"] for v in printed["variants"]] == [
        {"stages.GPTQQuantize.bits": bits} for bits in (2, 3)
    ]
    for variant in printed["variants"]:
        assert (tmp_path / "out" / variant["model"] / "config.json").is_file()
    assert run("report", "--compare", tmp_path / "out", "--output", tmp_path / "page.html") == 0
    assert "2 runs compared" in (tmp_path / "page.html").read_text()


def test_bad_input_is_exit_code_two_and_all_problems(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ("--vary", "stages.GPTQQuantize.group_size=16,4", "--set", "calibration.length=0")
    assert sweep(model, tmp_path / "out", *VARY, *wrong) == 2
    told = capsys.readouterr().err
    assert "recipe.yaml has 2 problems" in told
    assert "--vary stages.GPTQQuantize.group_size=4: stages[0].group_size: should be" in told
    assert "--set calibration.length=0: calibration.length: should be" in told
    assert not (tmp_path / "out").exists()
    assert sweep(model, tmp_path / "out") == 2


def test_a_failed_variant_is_exit_code_one_and_the_others_are_there(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = GPTQQuantize.run

    def fail(self: GPTQQuantize, context: object) -> None:
        if self.bits == 2:
            raise TypeError("a fault of a stage")
        stage(self, context)  # type: ignore[arg-type]

    monkeypatch.setattr(GPTQQuantize, "run", fail)
    assert sweep(model, tmp_path / "out", *VARY) == 1
    printed = capsys.readouterr()
    assert "1 of 2 variants failed:\n  bits=2: TypeError: a fault of a stage" in printed.err
    assert "Traceback" not in printed.err
    assert "failed" in printed.out
    assert "bits=3" in printed.out
    assert sweep(model, tmp_path / "out", *VARY, "--debug") == 1
    assert "in fail" in capsys.readouterr().err
