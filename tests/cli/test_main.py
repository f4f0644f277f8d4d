"""The command line as a whole: verbs, exit codes, messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from typer import Typer

from mcsharp_sdk import __version__
from mcsharp_sdk.cli import main
from mcsharp_sdk.errors import InputError, RunError


def fake_verb(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
    """Makes `mcsharp schema` raise ``error``."""

    def schema() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("mcsharp_sdk.cli.schema.schema", schema)


HELP = """\
import sys
import mcsharp_sdk
before = set(sys.modules)
from mcsharp_sdk.cli.main import VERBS, run
try:
    run(["--help"])
except SystemExit as end:
    unwanted = {"torch", "transformers", "onnx", "ortools"}
    unwanted |= {f"mcsharp_sdk.cli.{verb}" for verb in VERBS}
    imported = unwanted & (set(sys.modules) - before)
    sys.exit(end.code or (f"imported {imported}" if imported else 0))
"""


def test_help_names_all_verbs_and_imports_none() -> None:
    command = [sys.executable, "-c", HELP]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in main.VERBS:
        assert f" {verb} " in done.stdout


SPINS = """\
from mcsharp_sdk.cli.main import run
try:
    run(["--version"])
except SystemExit:
    import torch
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch has libgomp on Linux alone")
@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_waiting_threads_soon_sleep(chosen: dict[str, str], spins: str) -> None:
    others = {k: v for k, v in os.environ.items() if k not in main.SPIN_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", SPINS],
        env={**others, **chosen, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


READER_LEAVES = """\
import sys
from mcsharp_sdk.cli import main, output, schema
def verb():
    for _ in range(3):
        output.print_table("title", ["name"], [["x" * 99]] * 2000)
        output.print_text("text " * 9999)
        output.print_json({"a": "b" * 99999})
    print("done", file=sys.stderr)
schema.schema = verb
main.run(["schema"])
"""


def test_work_goes_on_when_the_reader_of_its_output_leaves() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", READER_LEAVES], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read().decode()
    assert (process.returncode, told) == (0, "done\n")


PRINTS_AND_WORKS = """\
import sys
from mcsharp_sdk.cli import main, output, schema
def verb():
    output.print_text("the plan")
    output.print_note("a warning")
    open(sys.argv[1], "w").write("the work")
    output.print_json({"the": "result"})
schema.schema = verb
main.run(["schema"])
"""

FULL = "error: the result is complete, but standard output could not be written: No space left"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("streams", "code", "told"),
    [
        ("> /dev/full", 1, f"a warning\n{FULL} on device\n"),
        (">&-", 0, "a warning\n"),
        ("> /dev/null 2> /dev/full", 0, ""),
        ("> /dev/null 2>&-", 0, ""),
        (">&- 2>&-", 0, ""),
    ],
)
def test_work_is_done_where_nothing_can_be_printed(
    streams: str, code: int, told: str, tmp_path: Path
) -> None:
    (tmp_path / "verb.py").write_text(PRINTS_AND_WORKS)
    command = f"{sys.executable} verb.py work.txt {streams}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, told)
    assert (tmp_path / "work.txt").read_text() == "the work"


def test_what_an_encoding_cannot_say_is_spelt_out(tmp_path: Path) -> None:
    (tmp_path / "verb.py").write_text(PRINTS_AND_WORKS.replace("the plan", "Σ φ ≥ 1"))
    command = [sys.executable, "verb.py", "work.txt"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\\u03a3 \\u03c6 \\u2265 1" in done.stdout
    assert (tmp_path / "work.txt").read_text() == "the work"


WAITS = """\
import sys
from mcsharp_sdk.cli.main import run
try:
    run(sys.argv[1:])
except SystemExit as end:
    heavy = {"transformers.modeling_utils"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else end.code)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        "evaluate nowhere",
        "report nowhere",
        "inspect nowhere",
        "export onnx_routers nowhere",
        "plan quickstart --model nowhere",
        "sweep quickstart --model nowhere --output o --vary stages.BitAllocation.target_bits=2",
        "compress quickstart --model nowhere --output o",
        "compress nowhere.yaml --model . --output o",
        "compress text.yaml --model . --output o",
        "compress recipe.yaml --model . --output done",
        "compress quickstart --model . --output done",
        "demo --output .",
    ],
)
def test_a_path_that_is_wrong_is_told_before_transformers_is_imported(
    arguments: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    stages = "stages: [{type: GPTQQuantize, bits: 2}]"
    recipe = f"{{version: 1, calibration: {{source: embedded}}, {stages}}}"
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "text.yaml").write_text(recipe.replace("embedded", "text, path: absent.txt"))
    (tmp_path / "done").mkdir()
    command = [sys.executable, "-c", WAITS, *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr


def test_the_schema_is_printed_without_importing_transformers() -> None:
    command = [sys.executable, "-c", WAITS, "schema"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", main.VERBS)
def test_each_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    assert f"mcsharp {verb}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"mcsharp {__version__}\n"


@pytest.mark.parametrize("arguments", [["chekc"], ["check"], ["check", "--nope", "x"], ["--nope"]])
def test_a_wrong_command_line_is_bad_input(arguments: list[str]) -> None:
    assert run(*arguments) == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (InputError("the recipe is [red]"), 2, "error: the recipe is [red]"),
        (RunError("the disk is full"), 1, "error: the disk is full"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("by zero"), 1, "error: ZeroDivisionError: by zero (run again with"),
    ],
)
def test_exit_codes(
    error: BaseException | None,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_verb(monkeypatch, error)
    monkeypatch.delenv(main.DEBUG_VARIABLE, raising=False)
    assert run("schema") == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("arguments", [["--debug", "schema"], ["schema", "--debug"]])
def test_debug_shows_where_an_error_came_from(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_verb(monkeypatch, ZeroDivisionError("by zero"))
    assert run(*arguments) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "on"), [("1", True), ("yes", True), ("", False), ("0", False), ("False", False)]
)
def test_debug_by_the_environment(
    value: str, on: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_verb(monkeypatch, InputError("no"))
    monkeypatch.setenv(main.DEBUG_VARIABLE, value)
    assert run("schema") == 2
    assert ("Traceback" in capsys.readouterr().err) == on


def test_json_output_is_one_document_of_plain_values(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    from mcsharp_sdk.cli.output import print_json
    from mcsharp_sdk.errors import Problem

    value = {
        "array": np.arange(3),
        "nan": float("nan"),
        "number": np.float64(0.5),
        "path": Path("a"),
        "problem": Problem("here", "ü"),
        2: {3},
    }
    print_json(value)
    assert json.loads(capsys.readouterr().out) == {
        "array": [0, 1, 2],
        "nan": None,
        "number": 0.5,
        "path": "a",
        "problem": {"where": "here", "message": "ü"},
        "2": [3],
    }


def test_tables_off_a_terminal_cut_nothing_off(capsys: pytest.CaptureFixture[str]) -> None:
    from mcsharp_sdk.cli.output import print_table

    print_table("[blue]", ["name", "value"], [("x" * 300, 1.23456), ("[red]", None)])
    printed = capsys.readouterr().out
    assert "x" * 300 in printed
    assert "1.235" in printed
    assert "[red]" in printed
    assert "[blue]" in printed


def test_no_text_becomes_a_picture(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mcsharp_sdk.cli.output import print_error, print_note, print_table, print_text
    from mcsharp_sdk.engine.progress import ProgressBars

    name = "emo.yaml:100: :smile:"
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_error(name)
    print_note(name)
    print_text(name)
    print_table(name, [name], [[name]])
    with ProgressBars(visible=True) as bars:
        list(bars.track([1], name))
    printed = capsys.readouterr()
    assert [printed.out.count(name), printed.err.count(name)] >= [4, 3]
    assert "\N{HUNDRED POINTS SYMBOL}" not in printed.out + printed.err


def test_the_app_is_a_typer_app() -> None:
    assert isinstance(main.app, Typer)
