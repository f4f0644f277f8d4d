"""What compress and demo replace, what they leave alone, and what they say when interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

from mcsharp_sdk.artifact_file import write_text_atomically
from mcsharp_sdk.cli import compress as compress_verb
from mcsharp_sdk.engine import publication, work
from mcsharp_sdk.engine.output_folder import check_replaceable
from mcsharp_sdk.errors import InputError

RECIPE = """\
version: 1
calibration: {{source: text, path: {text}, sequences: 4, length: 16}}
stages:
  - {{type: GPTQQuantize, bits: 2, group_size: 16}}
  - {{type: TokenProtection}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, a recipe, and the result of the recipe."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_tokenizer(save_tiny_model(folder / "model", "mixtral", num_hidden_layers=2))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 9)
    (folder / "recipe.yaml").write_text(RECIPE.format(text=folder / "text.txt"))
    assert compress(folder, folder / "done") == 0
    return folder


def compress(base: Path, output: Path, *options: str | Path, model: Path | None = None) -> int:
    return run(
        *("compress", base / "recipe.yaml", "--model", model or base / "model"),
        *("--output", output, *options),
    )


@pytest.fixture
def done(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base / "done", tmp_path / "done")


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", ["notes.txt", "onnx_routers/notes.txt", ".git/config"])
def test_a_result_with_files_of_others_is_not_overwritten(
    name: str, base: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", "onnx_routers", done) == 0
    (done / name).parent.mkdir(exist_ok=True)
    (done / name).write_text("precious")
    before = content(done)
    assert compress(base, done, "--overwrite") == 2
    told = capsys.readouterr().err
    assert f"{done} also holds {name}, which the run that made it did not write" in told
    assert content(done) == before
    (done / name).unlink()
    check_replaceable(done)


def test_what_our_own_commands_add_to_a_result_does_not_protect_it(base: Path, done: Path) -> None:
    options = ("--text", base / "text.txt", "--window", "32", "--device", "cpu", "--save")
    assert run("evaluate", done, *options) == 0
    assert run("report", done) == 0
    assert run("export", "onnx_routers", done, "--output", done / "routers") == 0
    (done / "README.md").write_text("edited")
    (done / ".mcsharp_evaluation.json.1.2.tmp").write_text("begun by a command that was killed")
    assert compress(base, done, "--overwrite") == 0
    assert content(done).keys() == content(base / "done").keys()


def test_a_file_that_came_during_the_run_is_not_deleted(
    base: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*arguments: Any, **settings: Any) -> None:
        (done / "notes.txt").write_text("precious")
        publication.publish(*arguments, **settings)

    monkeypatch.setattr(work, "publish", late)
    before = content(done)
    assert compress(base, done, "--overwrite") == 2
    assert content(done) == {**before, "notes.txt": b"precious"}


@pytest.mark.parametrize("within", ["", "part"])
def test_overwrite_is_not_suggested_where_it_would_be_refused(
    within: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(base / "model", tmp_path / "model")
    (model / "part").mkdir()
    (model / "part" / "notes.txt").write_text("precious")
    for options in ((), ("--overwrite",)):
        assert compress(base, model / within, *options, model=model) == 2
        told = capsys.readouterr().err
        assert "--overwrite" not in told
        assert "give another --output" in " ".join(told.split())


def test_the_demo_replaces_only_its_own_result(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(done)
    assert run("demo", "--output", done) == 2
    assert f"{done} holds something else than a result of the demo" in capsys.readouterr().err
    assert content(done) == before


@pytest.mark.slow
def test_the_demo_replaces_its_own_result(tmp_path: Path) -> None:
    for _ in range(2):
        assert run("demo", "--output", tmp_path / "demo") == 0


# Interrupted runs


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_run_says_where_it_goes_on_and_so_do_commands_on_its_output(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, directory = tmp_path / "so", tmp_path / ".so.run"
    with monkeypatch.context() as patched:
        patched.setattr(work, "_export", interrupt)
        assert compress(base, output) == 130
    told = capsys.readouterr().err
    assert f"is kept in {directory}: the same command continues from there" in told
    assert "Delete that folder to begin again" in told
    for verb in ("evaluate", "report", "inspect"):
        assert run(verb, output) == 2
        assert (
            f"{output} does not exist: its run is unfinished ({directory}); the same compress "
            "command continues it"
        ) in capsys.readouterr().err
    assert compress(base, output) == 0
    assert [f.name for f in tmp_path.iterdir()] == ["so"]


def test_a_run_that_is_interrupted_before_it_began_kept_nothing(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mcsharp_sdk.engine.run.check_outer_weights", interrupt)
    assert compress(base, tmp_path / "so") == 130
    assert "Nothing was finished" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_interrupting_the_clearing_away_leaves_a_result_that_the_same_command_ends(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "so"
    with monkeypatch.context() as patched:
        patched.setattr("mcsharp_sdk.engine.run_directory.RunDirectory._remove", interrupt)
        assert compress(base, output) == 130
    told = capsys.readouterr().err
    assert f"The result is complete in {output}. {tmp_path / '.so.run'} is left of the run" in told
    assert compress(base, output) == 0
    assert [f.name for f in tmp_path.iterdir()] == ["so"]
    assert content(output).keys() == content(base / "done").keys()


def test_interrupting_the_last_tables_loses_nothing_and_is_said_so(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compress_verb, "_show", interrupt)
    assert compress(base, tmp_path / "so") == 130
    assert f"The result is complete in {tmp_path / 'so'}." in capsys.readouterr().err
    assert run("inspect", tmp_path / "so", "--verify") == 0
    assert compress(base, tmp_path / "so") == 2
    assert "exists already; give --overwrite" in capsys.readouterr().err


# What is no model


NO_MODELS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "nothing": (lambda p: p, "absent", "there is no folder absent"),
    "a name on a hub": (
        lambda p: p,
        "mistralai/Mixtral-8x7B-v0.1",
        "if it is a name on a hub: models are not fetched, so download it first",
    ),
    "a path like a name on a hub": (
        lambda p: (p / "models").mkdir(),
        "models/mixtral",
        "there is no folder models/mixtral\n",
    ),
    "a file": (lambda p: (p / "m.txt").write_text(""), "m.txt", "m.txt is a file: give the folder"),
    "a sweep": (
        lambda p: write_text_atomically(p / "s" / "sweep.json", "{}"),
        "s",
        "s is a sweep, no model: `mcsharp report --compare s --output FILE`",
    ),
    "a folder": (lambda p: (p / "f").mkdir(), "f", "f is not a model folder: it has no config"),
}
VERBS: dict[str, Callable[[str], list[str]]] = {
    "evaluate": lambda model: ["evaluate", model],
    "report": lambda model: ["report", model],
    "inspect": lambda model: ["inspect", model],
    "verify": lambda model: ["inspect", model, "--verify"],
    "kernels": lambda model: ["inspect", model, "--kernels"],
    "export": lambda model: ["export", "onnx_routers", model],
    "check": lambda model: ["check", "quickstart", "--model", model],
    "plan": lambda model: ["plan", "quickstart", "--model", model],
    "compress": lambda model: ["compress", "quickstart", "--model", model, "--output", "o"],
    "sweep": lambda model: [
        *("sweep", "quickstart", "--model", model, "--output", "o"),
        *("--vary", "stages.BitAllocation.target_bits=2"),
    ],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", NO_MODELS)
def test_what_is_no_model_is_called_what_it_is(
    case: str,
    verb: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, given, message = NO_MODELS[case]
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run(*VERBS[verb](given)) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_that_is_there_is_refused_with_the_flags_that_help(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", "onnx_routers", done) == 0
    assert run("export", "onnx_routers", done) == 2
    assert (
        f"{done / 'onnx_routers'} exists already; give --overwrite to replace what an earlier "
        "export wrote there, or another folder as --output"
    ) in capsys.readouterr().err
    assert run("export", "onnx_routers", done, "--overwrite") == 0


def test_a_result_without_checksums_is_not_known_to_be_ours(done: Path) -> None:
    (done / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match=r"also holds .* and \d+ more"):
        check_replaceable(done)


def test_a_foreign_manifest_protects_its_folder(done: Path) -> None:
    (done / "mine").mkdir()
    (done / "mine" / "manifest.json").write_text(json.dumps({"files": [{"file": "a"}]}))
    (done / "mine" / "a").write_text("precious")
    with pytest.raises(InputError, match="also holds mine/a, mine/manifest.json"):
        check_replaceable(done)


def test_what_a_killed_export_left_protects_nothing(done: Path) -> None:
    (done / ".onnx_model.partial").mkdir()
    (done / ".onnx_model.partial" / "model.onnx").write_text("half")
    (done / ".onnx_model.lock").touch()
    check_replaceable(done)
    (done / ".mine.lock").touch()
    with pytest.raises(InputError, match=r"also holds \.mine\.lock"):
        check_replaceable(done)
