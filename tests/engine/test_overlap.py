"""Runs that read and write in the background end with the same bytes, and lose nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mortal_runs import Command, Death, files_of, run
from pruning_runs import write_text
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from torch import Tensor

import mcsharp_sdk
from mcsharp_sdk.engine import layer_store, memory_plan, quantising_memory
from mcsharp_sdk.engine.layer_store import LayerStore
from mcsharp_sdk.engine.layer_writing import WritingBehind
from mcsharp_sdk.errors import RunError
from mcsharp_sdk.models import scratch
from mcsharp_sdk.modifiers import expert_chunks

STAGES: list[dict[str, Any]] = [
    {"type": "ExpertStats", "group_size": 16},
    {"type": "BitAllocation", "target_bits": 2.25},
    {"type": "GPTQQuantize", "group_size": 16},
]
ON = {"MCSHARP_OVERLAP": "1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_tokenizer(save_tiny_model(folder / "model", "mixtral"))
    write_text(folder)
    return folder


def command(base: Path, output: Path, environment: Mapping[str, str], **settings: Any) -> Command:
    calibration = {"source": "text", "path": str(write_text(base)), "sequences": 4, "length": 32}
    recipe = {"version": 1, "calibration": calibration, "stages": STAGES}
    return Command(recipe, base / "model", output, settings, environment)


@pytest.fixture(scope="module")
def undisturbed(base: Path) -> dict[str, bytes]:
    """The output of a run that does one thing after the other."""
    wanted = command(base, base / "plain" / "out", {})
    (base / "plain").mkdir()
    assert run(wanted, Death(base / "plain")).code == 0
    return files_of(base / "plain" / "out")


@pytest.mark.parametrize("spill", [False, True])
def test_a_run_that_overlaps_ends_with_the_same_bytes(
    spill: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_chunks, "experts_at_once", lambda shapes: 1)
    write, threads = layer_store.write_safetensors, set()

    def noted(*arguments: Any) -> str:
        threads.add(threading.current_thread())
        return write(*arguments)

    def compressed(overlap: str) -> dict[str, bytes]:
        monkeypatch.setenv("MCSHARP_OVERLAP", overlap)
        wanted = command(base, tmp_path / overlap / "out", {})
        if spill:
            monkeypatch.setattr(memory_plan, "base_bytes", lambda: 0)
            monkeypatch.setattr(scratch, "SMALLEST_FILE", 1)
            recipe = mcsharp_sdk.Recipe.from_dict(dict(wanted.recipe))
            least = mcsharp_sdk.plan(recipe, wanted.model).least_memory
            wanted = replace(wanted, settings={"max_memory": least})
        wanted.run()
        return files_of(wanted.output)

    expected = compressed("0")
    monkeypatch.setattr(layer_store, "write_safetensors", noted)
    assert compressed("1") == expected
    assert threads
    assert threading.main_thread() not in threads


def test_the_plan_counts_what_is_read_ahead_and_not_yet_written(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "base_bytes", lambda: 0)
    monkeypatch.setattr(quantising_memory, "experts_together", lambda layer: 1)
    wanted = command(base, base / "out", {})
    recipe = mcsharp_sdk.Recipe.from_dict(dict(wanted.recipe))
    plain = mcsharp_sdk.plan(recipe, wanted.model)
    monkeypatch.setenv("MCSHARP_OVERLAP", "1")
    overlapping = mcsharp_sdk.plan(recipe, wanted.model)
    assert overlapping.least_memory > plain.least_memory
    assert overlapping.output_bytes == plain.output_bytes


CHANGES = 100
"""A few less than the changes of the folder that a run makes."""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(
    "changes", [(34, 40), pytest.param(range(1, CHANGES, 7), marks=pytest.mark.slow)], ids=len
)
def test_a_run_that_ends_while_it_writes_behind_goes_on_with_the_same_bytes(
    changes: Sequence[int], by: int, base: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    seen = set()
    for change in changes:
        folder = tmp_path / str(change)
        folder.mkdir()
        end = run(command(base, folder / "out", ON), Death(folder, change, by))
        assert end.code, f"the run ended before its change {change}"
        kept = folder / ".out.run" / "quantized_weights"
        seen.add(len(list(kept.glob("layer_*.json"))))
        assert not (kept / "summary.json").exists() or len(list(kept.glob("layer_*.json"))) == 3
        assert run(command(base, folder / "out", ON), Death(folder)).code == 0
        assert files_of(folder / "out") == undisturbed
    assert seen & {1, 2}, "no run ended between its layers"


def test_a_layer_that_cannot_be_written_ends_the_run_before_the_summary(
    base: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MCSHARP_OVERLAP", "1")
    write = layer_store.write_safetensors

    def full(path: Path, *rest: Any) -> str:
        if "layer_00002" in path.name:
            raise OSError(28, "No space left on device", str(path))
        return write(path, *rest)

    wanted = command(base, tmp_path / "out", {})
    with monkeypatch.context() as patch:
        patch.setattr(layer_store, "write_safetensors", full)
        with pytest.raises(RunError, match="no space is left on the disk"):
            wanted.run()
    folder = tmp_path / ".out.run" / "quantized_weights"
    assert {f.stem for f in folder.glob("*.json")} == {"layer_00000", "layer_00001"}
    wanted.run()
    assert files_of(tmp_path / "out") == undisturbed


class Gate:
    """Keeps layers, each once it is let through."""

    def __init__(self, store: LayerStore) -> None:
        self.store, self.begun, self.open = store, threading.Event(), threading.Event()

    def keep(self, layer: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        self.begun.set()
        assert self.open.wait(60)
        self.store.write(layer, tensors, notes)


def test_a_layer_counts_once_it_is_written_and_all_are_when_the_writer_is_left(
    tmp_path: Path,
) -> None:
    store = LayerStore(tmp_path)
    gate = Gate(store)
    with WritingBehind(gate.keep) as writer:
        writer.write(0, {"a": torch.arange(3)}, {"n": 0})
        assert gate.begun.wait(60)
        assert not store.has(0)
        gate.open.set()
        writer.write(1, {}, {"n": 1})
        assert store.has(0)
    assert store.notes(1) == {"n": 1}
    assert store.tensors(0)["a"].tolist() == [0, 1, 2]


def test_what_goes_wrong_with_a_layer_is_raised_at_the_next_or_at_the_end() -> None:
    def fails(*_: Any) -> None:
        raise ValueError("disk")

    def write(layers: int, then: BaseException | None = None) -> None:
        with WritingBehind(fails) as writer:
            for layer in range(layers):
                writer.write(layer, {}, {})
            if then is not None:
                raise then

    for layers in (1, 2):
        with pytest.raises(ValueError, match="disk"):
            write(layers)
    with pytest.raises(KeyError, match="first"):
        write(1, KeyError("first"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_that_overlap_end_with_the_same_bytes(base: Path, tmp_path: Path) -> None:
    wanted = command(base, tmp_path / "out", {})
    recipe = tmp_path / "recipe.json"
    recipe.write_text(mcsharp_sdk.Recipe.from_dict(dict(wanted.recipe)).model_dump_json())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for overlap in ("0", "1"):
        arguments = ["compress", recipe, "--model", wanted.model, "--output", tmp_path / overlap]
        done = subprocess.run(
            [*launcher, "-m", "mcsharp_sdk.cli", *map(str, arguments)],
            env={**os.environ, "MCSHARP_OVERLAP": overlap},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    weights = [f for f in files_of(tmp_path / "0") if f.endswith(".safetensors")]
    assert weights
    for name in weights:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
