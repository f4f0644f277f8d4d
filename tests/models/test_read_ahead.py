"""Experts that are read in the background are those that are read when they are asked for."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model
from torch import Tensor

from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.models.expert_reading import StackedExperts
from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.expert_weights import StoredExperts
from mcsharp_sdk.models.experts import MATRICES
from mcsharp_sdk.models.read_ahead import ReadAhead, overlaps
from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import stream_layers
from mcsharp_sdk.modifiers import expert_chunks as chunks_module
from mcsharp_sdk.modifiers.expert_chunks import expert_chunks


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCSHARP_OVERLAP", "1")


def stored(source: SourceModel) -> StoredExperts:
    """The experts of the first sparse layer, on disk."""
    experts = source.load_layer(next(iter(source.topology.moe)), by_expert=True)
    assert isinstance(experts, StoredExperts)
    return experts


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_expert_that_is_expected_is_the_one_on_disk(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny_model(tmp_path, family, dtype=dtype)
    plain = stored(SourceModel(path))
    assert plain.ahead is None
    monkeypatch.setenv("MCSHARP_OVERLAP", "1")
    ahead = stored(SourceModel(path))
    ahead.expect(range(ahead.num_experts))
    for expert in range(ahead.num_experts):
        for matrix in MATRICES:
            found, expected = ahead.read(matrix, expert), plain.read(matrix, expert)
            assert found.dtype == expected.dtype
            assert found.stride() == expected.stride()
            assert torch.equal(found, expected)
            assert not found.requires_grad
    assert ahead.ahead is not None
    assert len(ahead.ahead) == 0


@pytest.mark.usefixtures("overlapping")
def test_experts_are_read_once_each_and_at_most_one_chunk_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceModel(save_tiny_model(tmp_path, "mixtral"))
    reads: list[tuple[str, int]] = []
    read = StackedExperts.read

    def noted(self: StackedExperts, expert: int, device: str) -> Tensor:
        reads.append((self.name, expert))
        return read(self, expert, device)

    monkeypatch.setattr(StackedExperts, "read", noted)
    monkeypatch.setattr(chunks_module, "experts_at_once", lambda shapes: 2)
    tokens = torch.randint(1, 128, (4, 19), generator=torch.Generator().manual_seed(1))
    for layer in stream_layers(source, CalibrationSet.of_tokens(tokens), by_expert=True):
        reads.clear()
        runs = ExpertRuns.of_layer(layer)
        weights: Any = runs.weights
        for chunk in expert_chunks(runs):
            for expert in chunk:
                for matrix in MATRICES:
                    weights.read(matrix, expert)
            assert len(weights.ahead) == (0 if chunk[-1] == 3 else 2 * len(MATRICES))
            runs.run(chunk)
        layer.expert_outputs = runs.finish()
        names = {name for name, _ in reads}
        assert sorted(reads) == sorted((name, e) for name in names for e in runs.experts)
        assert len(weights.ahead) == 0


@pytest.mark.usefixtures("overlapping")
def test_an_expected_expert_is_read_while_something_else_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = stored(SourceModel(save_tiny_model(tmp_path, "mixtral")))
    done, threads = threading.Event(), []
    read = StackedExperts.read

    def noted(self: StackedExperts, expert: int, device: str) -> Tensor:
        found = read(self, expert, device)
        threads.append(threading.current_thread())
        if len(threads) == len(MATRICES):
            done.set()
        return found

    monkeypatch.setattr(StackedExperts, "read", noted)
    experts.expect([1])
    assert done.wait(60)
    experts.read("down", 1)
    assert threading.main_thread() not in threads
    experts.read("down", 2)
    assert threading.main_thread() in threads


@pytest.mark.usefixtures("overlapping")
def test_damage_that_the_background_finds_is_raised_where_the_expert_is_asked_for(
    tmp_path: Path,
) -> None:
    path = save_tiny_model(tmp_path, "mixtral")
    name = next(n for n in Checkpoint.open(path).names if "layers.0" in n and "experts.2." in n)
    info = Checkpoint.open(path).info(name)
    content = bytearray(info.file.read_bytes())
    content[info.offset : info.offset + info.nbytes] = b"\xff" * info.nbytes
    info.file.write_bytes(content)
    experts = stored(SourceModel(path))
    experts.expect([1, 2])
    experts.read("gate_up", 1)
    experts.read("down", 1)
    with pytest.raises(RunError, match=f"{info.file.name}: {name}: .* NaN"):
        [experts.read(matrix, 2) for matrix in MATRICES]


@pytest.mark.usefixtures("overlapping")
def test_what_is_replaced_or_released_is_not_what_was_read_ahead(tmp_path: Path) -> None:
    experts = stored(SourceModel(save_tiny_model(tmp_path, "mixtral")))
    own = experts.read("down", 1).clone()
    experts.replace("down", 1, own + 1)
    experts.expect([1])
    assert torch.equal(experts.read("down", 1), own + 1)
    experts.release(1)
    assert experts.ahead is not None
    assert len(experts.ahead) == 0
    assert torch.equal(experts.read("down", 1), own)


def test_what_was_taken_is_held_no_longer() -> None:
    ahead = ReadAhead("cpu")
    ahead.begin("a", lambda: torch.ones(3))
    ahead.begin("a", lambda: torch.zeros(3))
    taken = ahead.take("a")
    assert taken is not None
    assert taken.tolist() == [1, 1, 1]
    assert ahead.take("a") is None
    ahead.begin("b", lambda: torch.ones(3))
    ahead.drop("b")
    assert ahead.take("b") is None
    gone = weakref.ref(taken)
    del taken
    ahead.begin("c", lambda: torch.ones(1))
    ahead.take("c")  # the thread has let go of its last tensor
    gc.collect()
    assert gone() is None


def test_reading_overlaps_on_a_gpu_and_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MCSHARP_OVERLAP", raising=False)
    assert [overlaps(device) for device in ("cpu", "cuda", "cuda:1")] == [False, True, True]
    monkeypatch.setenv("MCSHARP_OVERLAP", "1")
    assert overlaps("cpu")
    monkeypatch.setenv("MCSHARP_OVERLAP", "0")
    assert not overlaps("cuda")
    monkeypatch.setenv("MCSHARP_OVERLAP", "yes")
    with pytest.raises(InputError, match="MCSHARP_OVERLAP=yes"):
        overlaps("cpu")
