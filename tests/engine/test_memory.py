"""Budgets of memory: what they change, what they refuse, and that the result is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pruning_runs import QUANTISE, pruning_recipe, write_text
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

import mcsharp_sdk
from mcsharp_sdk.engine import memory_plan
from mcsharp_sdk.engine.budget import read_bytes_of
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models import scratch
from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.recipe.schema import Recipe

STAGES: list[dict[str, Any]] = [
    {"type": "ExpertStats", "group_size": 16},
    {"type": "BitAllocation", "target_bits": 2.25},
    {"type": "GPTQQuantize", "group_size": 16, "propagation": 0.5, "refinements": 1},
    {"type": "RouterCalibration", "tokens": 64},
    {"type": "TokenProtection"},
    {"type": "TopAnyRouter", "steps": 6, "units": 4},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), "mixtral")
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return pruning_recipe(write_text(tmp_path), *STAGES)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("7.5 GiB", 15 * 2**29),
        ("800mb", 8 * 10**8),
        ("123", 123),
        (5, 5),
        (None, None),
    ],
)
def test_amounts_are_read_as_people_write_them(text: str | int | None, size: int | None) -> None:
    assert read_bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "8 apples", "-3GB", "GB", "0", "1e9"])
def test_other_amounts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="no amount of memory|no memory at all"):
        read_bytes_of(text)


def test_a_run_under_a_budget_ends_with_the_same_bytes(
    model: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "base_bytes", lambda: 0)
    monkeypatch.setattr(scratch, "SMALLEST_FILE", 1)
    files: list[int] = []
    make = scratch._mapped_file

    def counted(folder: Path, size: int) -> Any:
        files.append(size)
        return make(folder, size)

    monkeypatch.setattr(scratch, "_mapped_file", counted)
    free = mcsharp_sdk.compress(recipe, model, tmp_path / "free", progress=False)
    assert not free.plan.spill
    assert files == []
    tight = free.plan.least_memory
    kept = mcsharp_sdk.compress(recipe, model, tmp_path / "kept", progress=False, max_memory=tight)
    assert kept.plan.spill
    assert kept.plan.peak_memory == tight < free.plan.peak_memory
    assert len(files) > 20
    for file in sorted(free.output.iterdir()):
        assert (kept.output / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_budget_that_cannot_be_kept_is_refused_with_the_least_that_would_do(
    model: Path, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"not enough.*Give max_memory (\S+) or more") as caught:
        mcsharp_sdk.compress(recipe, model, tmp_path / "out", max_memory="200MB")
    assert not (tmp_path / "out").exists()
    least = str(caught.value).rpartition("max_memory ")[2].split()[0]
    plan = mcsharp_sdk.plan(recipe, model, max_memory=f"{float(least[:-2]) + 0.2}GB")
    assert plan.least_memory <= plan.peak_memory


def test_a_budget_goes_with_a_device_whose_memory_it_counts(
    model: Path, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="device cuda has its own"):
        mcsharp_sdk.compress(recipe, model, tmp_path / "out", max_memory="8GB", device="cuda")


def test_the_plan_foretells_the_disk_that_a_run_takes(model: Path, tmp_path: Path) -> None:
    quantised = pruning_recipe(write_text(tmp_path), QUANTISE)
    plan = mcsharp_sdk.plan(quantised, model)
    done = mcsharp_sdk.compress(
        quantised, model, tmp_path / "out", run_dir=tmp_path / "run", progress=False
    )
    kept = sum(f.stat().st_size for f in (tmp_path / "run").rglob("*.safetensors"))
    assert plan.run_bytes == pytest.approx(kept, rel=0.25)
    weights = sum(f.stat().st_size for f in done.output.glob("*.safetensors"))
    assert plan.output_bytes == pytest.approx(weights, rel=0.1)


def test_a_plan_reads_no_weight_and_tells_what_several_processes_need(
    model: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a plan reads headers only")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    monkeypatch.setattr(Checkpoint, "read_rows", refuse)
    monkeypatch.setattr(memory_plan, "base_bytes", lambda: 0)
    assert mcsharp_sdk.plan(recipe, model).stages
    shareable = [
        {name: value for name, value in stage.items() if name != "propagation"}
        for stage in STAGES
        if stage["type"] != "RouterCalibration"
    ]
    recipe = pruning_recipe(write_text(tmp_path), *shareable)
    alone = mcsharp_sdk.plan(recipe, model)
    shared = mcsharp_sdk.plan(recipe, model, processes=2)
    assert shared.output_bytes == alone.output_bytes
    # Half of the hidden states, but all tokens of the experts that a process works on.
    assert shared.least_memory <= alone.least_memory
    with pytest.raises(InputError, match="processes is 0: give a number from 1"):
        mcsharp_sdk.plan(recipe, model, processes=0)
