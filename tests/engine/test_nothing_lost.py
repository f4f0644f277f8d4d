"""Runs that are killed, interrupted or stopped by a full disk end with the same bytes, later."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mortal_runs import Command, Death, files_of, run
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

from mcsharp_sdk.checked_files import read_checked_json, write_checked_json
from mcsharp_sdk.engine import fingerprint as fingerprint_module
from mcsharp_sdk.errors import InputError, McSharpError, RunError
from mcsharp_sdk.modifiers.layer_quantisation import LayerQuantiser
from mcsharp_sdk.partial_folder import partial_folder

STAGES: list[dict[str, Any]] = [
    {"type": "ExpertStats", "group_size": 16},
    {"type": "BitAllocation", "target_bits": 2.25},
    {"type": "GPTQQuantize", "group_size": 16},
    {"type": "TokenProtection"},
    {"type": "TopAnyRouter", "steps": 20, "checkpoint_steps": 5, "batch_tokens": 64},
]
SLOW = (pytest.mark.slow, pytest.mark.timeout(1800))
CHANGES = 150
"""About how many changes of the folder a run makes before it brings its result to its place."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_tokenizer(save_tiny_model(folder / "model", "mixtral", num_hidden_layers=2))
    text = "".join(chr(33 + (i * i + i // 7) % 90) for i in range(4000))
    (folder / "text.txt").write_text(text)
    return folder


def command(base: Path, output: Path, **settings: Any) -> Command:
    calibration = {
        "source": "text",
        "path": str(base / "text.txt"),
        "sequences": 8,
        "length": 32,
    }
    recipe = {"version": 1, "calibration": calibration, "stages": STAGES}
    return Command(recipe, base / "model", output, settings)


@pytest.fixture(scope="module")
def finished(base: Path) -> Path:
    """A folder with the output ``out`` of an undisturbed run, and its run directory ``run``."""
    folder = base / "finished"
    folder.mkdir()
    assert run(command(base, folder / "out", run_dir=folder / "run"), Death(folder)).code == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> dict[str, bytes]:
    return files_of(finished / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=4M", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


# Killed


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=SLOW)])
def test_a_run_that_is_killed_again_and_again_loses_nothing(
    kills: int, base: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    chance = random.Random(kills)
    done, number = 0, 0
    while done < kills:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        log = tmp_path / f"{number}.log"
        while done < kills:
            death = Death(folder, change=chance.randint(1, CHANGES * 2 // kills + 25), log=log)
            code = run(command(base, folder / "out"), death).code
            if code == 0:
                break
            assert code == -signal.SIGKILL
            done += 1
        if not (folder / "out").exists():
            assert run(command(base, folder / "out"), Death(folder, log=log)).code == 0
        assert files_of(folder / "out") == undisturbed
        finished_layers = Counter(line for line in log.read_text().split() if "/layer_" in line)
        assert set(finished_layers.values()) == {1}, "a finished layer was made again"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_at_any_time_ends_with_the_same_bytes(
    base: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    chance = random.Random(0)
    kills = 0
    for number in itertools.count():
        if kills >= 20:
            break
        folder = tmp_path / str(number)
        folder.mkdir()
        wanted = command(base, folder / "out")
        while run(wanted, Death(folder), seconds=chance.uniform(0.1, 3)).code:
            kills += 1
        assert files_of(folder / "out") == undisturbed
        assert [f.name for f in folder.iterdir()] == ["out"]


def prepared(finished: Path, folder: Path) -> Path:
    """The folder of a finished run again, with an older output and a run directory that is to go.

    All that is left to do for a run is to replace the output.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished / "out", folder / "out")
    shutil.copytree(finished / "run", folder / ".out.run")
    (folder / "out" / "README.md").write_text("the old one")
    return folder


@pytest.mark.parametrize("step", [31, pytest.param(1, marks=SLOW)])
def test_a_result_that_is_replaced_is_there_whole_before_or_after(
    step: int, base: Path, finished: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    code = -signal.SIGKILL
    for change in itertools.count(1, step):
        folder = prepared(finished, tmp_path / "folder")
        old = files_of(folder / "out")
        again = command(base, folder / "out", overwrite=True)
        code = run(again, Death(folder, change)).code
        places = [folder / "out", folder / ".out.old"]
        assert any(p.exists() and files_of(p) in (old, undisturbed) for p in places)
        if code == 0:
            break
        assert run(again, Death(folder)).code == 0
        assert files_of(folder / "out") == undisturbed
        assert [f.name for f in folder.iterdir()] == ["out"]


def test_the_same_command_ends_a_run_that_was_killed_behind_its_result(
    base: Path, finished: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    shutil.copytree(finished / "run", tmp_path / ".out.run")
    record = read_checked_json(tmp_path / ".out.run" / "published.json")
    write_checked_json(
        tmp_path / ".out.run" / "published.json", {**record, "output": str(tmp_path / "out")}
    )
    wanted = command(base, tmp_path / "out")
    changed = {**wanted.recipe, "exports": [{"type": "safetensors", "max_shard_size": 1e-4}]}
    with pytest.raises(InputError, match="exists already"):
        replace(wanted, recipe=changed).run()
    wanted.run()
    assert files_of(tmp_path / "out") == undisturbed
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    with pytest.raises(InputError, match="exists already"):
        wanted.run()


def test_an_interrupted_run_leaves_its_finished_layers_and_nothing_half_written(
    base: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    end = run(command(base, folder / "out"), Death(folder, CHANGES // 2, signal.SIGINT))
    assert end.error.startswith("KeyboardInterrupt")
    assert [f.name for f in folder.iterdir()] == [".out.run"]
    assert not [f for f in folder.rglob(".*") if f.is_file()]
    assert run(command(base, folder / "out"), Death(folder)).code == 0
    assert files_of(folder / "out") == undisturbed


# No space, no memory


@pytest.mark.parametrize(
    "change", [*(pytest.param(n, marks=pytest.mark.slow) for n in (20, 100)), 60]
)
def test_a_run_whose_disk_is_full_goes_on_when_there_is_room(
    change: int, base: Path, undisturbed: dict[str, bytes], small_disk: Path
) -> None:
    wanted = command(base, small_disk / "out")
    end = run(wanted, Death(small_disk, change, by=None))
    assert end.code == 1
    assert "no space is left on the disk" in end.error
    assert f"is kept in {small_disk / '.out.run'}: the same command continues" in end.error
    assert not (small_disk / "out").exists()
    (small_disk / "hog").unlink()
    assert not [f for f in small_disk.rglob(".*") if f.is_file()]
    assert run(wanted, Death(small_disk)).code == 0
    assert files_of(small_disk / "out") == undisturbed


def test_a_file_size_limit_stops_a_run_that_goes_on_without_it(
    base: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    end = run(command(base, folder / "out"), Death(folder, file_limit=20_000))
    assert end.code == 1
    assert "larger than allowed" in end.error
    assert [f.name for f in folder.iterdir()] == [".out.run"]
    assert run(command(base, folder / "out"), Death(folder)).code == 0
    assert files_of(folder / "out") == undisturbed


def test_a_run_without_memory_says_so_and_goes_on_when_there_is_some(
    base: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_much(*_: Any) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    wanted = command(base, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(LayerQuantiser, "quantise", too_much)
        with pytest.raises(RunError, match="too little memory.* the same command continues"):
            wanted.run()
    wanted.run()
    assert files_of(tmp_path / "out") == undisturbed


# Not the same run


def changed_model(base: Path, wanted: Command) -> Command:
    model = shutil.copytree(base / "model", wanted.output.parent / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    return replace(wanted, model=model)


def changed_weights(base: Path, wanted: Command) -> Command:
    model = shutil.copytree(base / "model", wanted.output.parent / "model")
    file = min(model.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    return replace(wanted, model=model)


def changed_tokenizer(base: Path, wanted: Command) -> Command:
    model = shutil.copytree(base / "model", wanted.output.parent / "model")
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text + " ")
    return replace(wanted, model=model)


def changed_text(base: Path, wanted: Command) -> Command:
    path = wanted.output.parent / "text.txt"
    path.write_text((base / "text.txt").read_text()[::-1])
    calibration = {**wanted.recipe["calibration"], "path": str(path)}
    return replace(wanted, recipe={**wanted.recipe, "calibration": calibration})


def changed_stage(base: Path, wanted: Command) -> Command:
    stages = [*STAGES[:2], {**STAGES[2], "damping": 0.02}, *STAGES[3:]]
    return replace(wanted, recipe={**wanted.recipe, "stages": stages})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed_model, "model config"),
        (changed_weights, "model weights"),
        (changed_tokenizer, "tokenizer"),
        (changed_text, "calibration"),
        (changed_stage, "recipe"),
    ],
)
def test_what_changed_since_a_run_began_is_named_and_refused(
    change: Callable[[Path, Command], Command],
    named: str,
    base: Path,
    finished: Path,
    tmp_path: Path,
) -> None:
    before = files_of(finished / "run")
    wanted = command(base, tmp_path / "out", run_dir=finished / "run")
    with pytest.raises(InputError, match=rf"another run: .*{named}.* changed since it began"):
        change(base, wanted).run()
    assert files_of(finished / "run") == before
    assert not wanted.output.exists()


def test_another_version_does_not_resume(
    base: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint_module, "__version__", "9.9")
    with pytest.raises(InputError, match="another run: mcsharp_sdk version changed"):
        command(base, tmp_path / "out", run_dir=finished / "run").run()


def test_two_runs_into_one_output_do_not_disturb_each_other(
    base: Path, finished: Path, tmp_path: Path
) -> None:
    wanted = command(base, tmp_path / "out", run_dir=finished / "run")
    with partial_folder(tmp_path / "out") as partial:
        (partial / "mine").write_text("precious")
        with pytest.raises(InputError, match=r"/out is in use by another run"):
            wanted.run()
        assert (partial / "mine").read_text() == "precious"


@pytest.mark.parametrize("name", ["chapter_1.tex", ".env"])
def test_a_folder_of_something_else_is_no_run_directory(
    base: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / name).write_text("precious")
    with pytest.raises(InputError, match=f"no run directory: it has {re.escape(name)}"):
        command(base, tmp_path / "out", run_dir=tmp_path / "thesis").run()
    assert (tmp_path / "thesis" / name).read_text() == "precious"
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == [name]


# Bits that flip in the run directory


def test_a_flipped_bit_in_a_run_directory_is_found_where_it_would_do_harm(
    base: Path, finished: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    chance = random.Random(0)
    directory = shutil.copytree(finished / "run", tmp_path / "run")
    wanted = command(base, tmp_path / "out", run_dir=directory)
    files = [f for f in sorted(directory.rglob("*")) if f.is_file() and f.stat().st_size]
    kinds = {re.sub(r"\d+", "N", str(f.relative_to(directory))): f for f in files}
    harmless = []
    for kind, file in kinds.items():
        intact = file.read_bytes()
        damaged = bytearray(intact)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            wanted.run()
        except McSharpError as error:
            assert file.name in str(error)  # noqa: PT017
        else:
            harmless.append(kind)
            assert files_of(tmp_path / "out") == undisturbed
            shutil.rmtree(tmp_path / "out")
        file.write_bytes(intact)
    layers = "layer_N.json"  # of stages whose artifact is written: they are not read again
    assert harmless == [
        f"expert_statistics/{layers}",
        "published.json",
        f"token_protection/{layers}",
    ]


def test_a_damaged_layer_is_made_again_as_the_message_says(
    base: Path, finished: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    directory = shutil.copytree(finished / "run", tmp_path / "run")
    file = directory / "quantized_weights" / "layer_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    wanted = command(base, tmp_path / "out", run_dir=directory)
    with pytest.raises(RunError, match=r"layer_00001\.safetensors is damaged") as caught:
        wanted.run()
    names = re.findall(r"[\w/.-]+\.json", str(caught.value))
    assert [Path(name).name for name in names] == ["layer_00001.json", "finished_stages.json"]
    file.with_name(names[0]).unlink()
    Path(names[1]).unlink()
    wanted.run()
    assert files_of(tmp_path / "out") == undisturbed
