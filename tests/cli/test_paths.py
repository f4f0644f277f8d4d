"""Paths to which nothing can be written, or that name nothing: refused before any work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from tiny_models import save_tiny_model

import mcsharp_sdk
from mcsharp_sdk.embedded import model_directory
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.partial_folder import partial_folder, put_in_place
from mcsharp_sdk.report.comparison import write_comparison

RECIPE = """\
version: 1
stages: [{type: GPTQQuantize, bits: 4, quantizer: rtn, group_size: 64}]
"""
LONG = "a" * 300


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a recipe, a pipe, a folder, and links that lead there or nowhere."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "real").mkdir()
    (tmp_path / "live").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "model", "mixtral")


NO_FOLDERS = {
    "recipe.yaml": "is a file: give a folder to make",
    "recipe.yaml/sub": "recipe.yaml is no folder; give another path",
    "dangling/sub": "dangling is no folder; give another path",
    "pipe": "pipe is there and is no folder",
    LONG: "a name in it has 300 bytes, at most 255",
    f"new/{'a' * 240}": "a name in it has 240 bytes, at most 223",
    "~/out": "~ is not expanded here: write the path in full",
    "~": "~ is not expanded here: write the path in full",
    "": "is empty: give a path",
    "\udcff": r"'\udcff' is not text in UTF-8",
}
LINKS = {
    "live": "live is a link, which would be replaced: give the folder that it leads to",
    "dangling": "dangling is a link, which would be replaced: give the folder that it leads to",
}


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error on one line, without the box that is drawn around what options are told."""
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("output", [*NO_FOLDERS, *LINKS])
def test_an_output_that_can_be_no_folder_is_refused_before_work(
    output: str,
    overwrite: tuple[str, ...],
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(here.rglob("*"))
    arguments = ("compress", "recipe.yaml", "--model", model_directory(), "--output", output)
    assert run(*arguments, *overwrite) == 2
    assert {**NO_FOLDERS, **LINKS}[output] in told(capsys)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("output", [*NO_FOLDERS, *LINKS])
def test_python_refuses_the_same_outputs(output: str, here: Path, model: Path) -> None:
    before = sorted(here.rglob("*"))
    calls: list[Any] = [lambda: mcsharp_sdk.compress("recipe.yaml", model_directory(), output)]
    calls += [lambda: mcsharp_sdk.export("onnx_routers", model, output)]
    if output != "live":  # a sweep writes into the folder that is there
        varied = {"stages.GPTQQuantize.bits": [3, 4]}
        calls += [lambda: mcsharp_sdk.sweep("recipe.yaml", model_directory(), output, varied)]
    for call in calls:
        with pytest.raises(InputError) as caught:
            call()
        expected = "dangling is " if output == "dangling" else {**NO_FOLDERS, **LINKS}[output]
        assert expected in str(caught.value)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("directory", NO_FOLDERS)
def test_a_run_directory_that_can_be_no_folder_is_refused_before_work(
    directory: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.rglob("*"))
    arguments = ("compress", "recipe.yaml", "--model", model_directory(), "--output", "out")
    assert run(*arguments, "--run-dir", directory) == 2
    assert NO_FOLDERS[directory] in told(capsys)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("real", "real is a folder: give the file to write"),
        ("pipe", "pipe is there and is no file"),
        ("/dev/stdout", "/dev/stdout is a link: give the file"),
        ("recipe.yaml/page.html", "recipe.yaml is no folder"),
        ("~/page.html", "~ is not expanded here"),
        (LONG, "at most 255"),
        ("", "is empty"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(
    output: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", "real", "--compare", "--output", output) == 2
    assert message in told(capsys)
    with pytest.raises(InputError, match=message):
        write_comparison(["real"], output)
    options = ("--target-bits", "2", "--output", output, "--overwrite")
    assert run("allocate", "recipe.yaml", *options) == 2
    assert message in told(capsys)
    assert not (here / "pipe").is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "is empty: give a path; '.' is the current folder"),
        ("~/model", "there is no folder ~/model; ~ is not expanded here: write the path in full"),
        ("\udcff", r"'\udcff' is not text in UTF-8"),
        (LONG, "a name in it has 300 bytes"),
    ],
)
def test_a_model_that_can_be_none_is_refused(
    given: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(model_directory() / "config.json", "config.json")  # "" is not taken for "."
    for arguments in (
        ["inspect", given],
        ["inspect", given, "--verify"],
        ["report", given],
        ["evaluate", given],
        ["export", "onnx_routers", given],
        ["plan", "recipe.yaml", "--model", given],
        ["check", "recipe.yaml", "--model", given],
        ["compress", "recipe.yaml", "--model", given, "--output", "out"],
    ):
        assert run(*arguments) == 2
        assert message in told(capsys)
    calls: list[Any] = [mcsharp_sdk.inspect, mcsharp_sdk.verify, mcsharp_sdk.evaluate]
    calls += [lambda path: mcsharp_sdk.plan("recipe.yaml", path)]
    calls += [lambda path: mcsharp_sdk.compress("recipe.yaml", path, "out")]
    for call in calls:
        with pytest.raises(InputError) as caught:
            call(given)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [("", "recipe is empty"), (LONG, "300 bytes"), ("\udcff", r"recipe '\udcff' is not")],
)
def test_a_recipe_that_can_be_none_is_refused(
    given: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", given) == 2
    assert message in told(capsys)
    with pytest.raises(InputError) as caught:
        mcsharp_sdk.plan(given, model_directory())
    assert message in str(caught.value)


@pytest.mark.parametrize("left", ["link", "file", "folder"])
@pytest.mark.parametrize("name", [".out.old", ".out.partial"])
def test_what_stands_where_a_folder_is_put_aside_goes(name: str, left: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    hidden, output = tmp_path / name, tmp_path / "out"
    {
        "link": lambda: hidden.symlink_to(kept),
        "file": hidden.touch,
        "folder": lambda: shutil.copytree(kept, hidden),
    }[left]()
    for text in ("first", "second"):
        with partial_folder(output) as partial:
            (partial / "file").write_text(text)
            put_in_place(partial, output)
        assert (output / "file").read_text() == text
    assert sorted(f.name for f in tmp_path.iterdir()) == ["kept", "out"]
    assert (kept / "file").exists()
