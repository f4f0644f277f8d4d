"""Finished stages pass from one run directory to another, whole and without ties."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcsharp_sdk.engine.report import RunReport
from mcsharp_sdk.engine.run_directory import FinishedStage, RunDirectory
from mcsharp_sdk.engine.stage_store import FILES_FOLDER, RECORD_FILE, StageStore

REPORT = RunReport({"Quantise": {"layers": 1}}, ["a warning"])


def finish(directory: RunDirectory, name: str, artifact: str, value: float) -> FinishedStage:
    """Stands for a stage that writes a layer and a summary."""
    layers = directory.layers(artifact)
    layers.write(0, {"x": torch.full((2,), value)}, {"value": value})
    layers.write_summary({"value": value})
    stage = FinishedStage(directory.files_written(artifact), REPORT)
    directory.mark_finished(name, stage)
    return stage


@pytest.fixture(params=[True, False], ids=["hard links", "copies"])
def _links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no hard links here")

    if not request.param:
        monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("_links")
def test_a_run_is_given_what_another_run_kept(tmp_path: Path) -> None:
    store = StageStore(tmp_path / "store")
    with RunDirectory(tmp_path / "a", {}) as first:
        store.keep("key", first, finish(first, "0 Quantise", "weights", 1.0))
    with RunDirectory(tmp_path / "b", {}) as second:
        second.layers("weights").write(0, {"x": torch.zeros(2)}, {"value": "cut off"})
        assert not store.give("other", second, "0 Quantise")
        assert store.give("key", second, "0 Quantise")
        assert second.layers("weights").tensors(0)["x"].tolist() == [1, 1]
        assert second.layers("weights").summary() == {"value": 1.0}
        assert second.report() == REPORT
        second.layers("weights").write(0, {"x": torch.zeros(2)}, {"value": 0.0})
    with RunDirectory(tmp_path / "c", {}) as third:
        store.give("key", third, "0 Quantise")
        assert third.layers("weights").tensors(0)["x"].tolist() == [1, 1], "not that of b"
        assert third.layers("weights").notes(0) == {"value": 1.0}


def test_a_stage_keeps_its_own_files_and_no_other_stage_s(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a", {}) as directory:
        first = finish(directory, "0 Quantise", "weights", 1.0)
        (directory.path / "curve.json").write_text("{}")
        (directory.path / ".curve.json.tmp").write_text("half")
        second = finish(directory, "1 Prune", "pruning", 2.0)
    weights = {f"weights/{n}" for n in ("layer_00000.json", "layer_00000.safetensors")}
    assert set(first.files) == {*weights, "weights/summary.json"}
    assert set(second.files) == {f.replace("weights", "pruning") for f in first.files} | {
        "curve.json"
    }


def test_reports_are_put_together_and_warnings_stand_once(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a", {}) as directory:
        for name, report in {
            "0 A": RunReport({"A": {}}, ["x", "y"]),
            "1 B": RunReport({"B": {"z": 1}}, ["y", "w"]),
        }.items():
            directory.mark_finished(name, FinishedStage((), report))
        assert list(directory.finished()) == ["0 A", "1 B"]
        assert directory.report() == RunReport({"A": {}, "B": {"z": 1}}, ["x", "y", "w"])


def test_only_wanted_stages_are_kept(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a", {}) as directory:
        stage = finish(directory, "0 Quantise", "weights", 1.0)
        for key in ("one", "two"):
            StageStore(tmp_path / "store", {"two"}).keep(key, directory, stage)
    assert [entry.name for entry in (tmp_path / "store").iterdir()] == ["two"]
    StageStore(tmp_path / "store").drop_unwanted()
    assert [entry.name for entry in (tmp_path / "store").iterdir()] == ["two"]
    StageStore(tmp_path / "store", set()).drop_unwanted()
    assert list((tmp_path / "store").iterdir()) == []


def broken_record(entry: Path) -> None:
    (entry / RECORD_FILE).write_text("{")


def strange_record(entry: Path) -> None:
    (entry / RECORD_FILE).write_text('{"stages": 1, "warnings": [], "files": []}')


def changed_file(entry: Path) -> None:
    (entry / FILES_FOLDER / "curve.json").write_text("{ }")


def missing_file(entry: Path) -> None:
    (entry / FILES_FOLDER / "curve.json").unlink()


def changed_layer(entry: Path) -> None:
    file = entry / FILES_FOLDER / "weights" / "layer_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [changed_layer, broken_record, strange_record, changed_file, missing_file]
)
def test_a_damaged_entry_is_none_and_goes(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store = StageStore(tmp_path / "store")
    with RunDirectory(tmp_path / "a", {}) as first:
        (first.path / "curve.json").write_text("{}")
        layers = first.layers("weights")
        layers.write(0, {"x": torch.ones(2)}, {"value": 1.0})
        layers.write_summary({})
        files = first.files_written("weights")
        store.keep("key", first, FinishedStage(files, REPORT, first.checksums(files)))
    with RunDirectory(tmp_path / "b", {}) as second:
        assert store.give("key", second, "0 Curve")
    entry = tmp_path / "store" / "key"
    (entry / FILES_FOLDER / "curve.json").unlink()  # the link to the file of a run
    (entry / FILES_FOLDER / "curve.json").write_text("{}")
    damage(entry)
    with RunDirectory(tmp_path / "c", {}) as third:
        assert not store.give("key", third, "0 Curve")
        assert third.finished() == {}
    assert list((tmp_path / "store").iterdir()) == []


def keep_all(root: Path, name: str) -> None:
    """The work of one process in the next test."""
    with RunDirectory(root / name, {}) as directory:
        stage = finish(directory, "0 Quantise", "weights", 1.0)
        for number in range(40):
            StageStore(root / "store").keep(f"key{number}", directory, stage)


def test_sweeps_that_keep_the_same_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=keep_all, args=(tmp_path, name)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    for number in range(40):
        with RunDirectory(tmp_path / f"run{number}", {}) as directory:
            assert StageStore(tmp_path / "store").give(f"key{number}", directory, "0 Quantise")
            assert directory.layers("weights").tensors(0)["x"].tolist() == [1, 1]
