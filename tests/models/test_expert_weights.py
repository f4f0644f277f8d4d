"""Experts read from disk one at a time, and activations in files, against those in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from tiny_models import save_tiny_model

from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.errors import RunError
from mcsharp_sdk.models import scratch as scratch_module
from mcsharp_sdk.models.experts import MATRICES, projection_of_row
from mcsharp_sdk.models.scratch import Scratch
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import stream_layers

IN_ONE_PIECE = {"ernie4_5_vl_moe"}
"""Families whose experts cannot be read one by one: their layers are loaded whole."""


def _calibration() -> CalibrationSet:
    generator = torch.Generator().manual_seed(1)
    return CalibrationSet.of_tokens(torch.randint(1, 128, (5, 19), generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_read_from_disk_is_that_of_the_loaded_layer(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = SourceModel(save_tiny_model(tmp_path, family, dtype=dtype))
    index = next(iter(source.topology.moe))
    stored = source.load_layer(index, by_expert=True)
    assert stored is not None
    assert stored.in_memory == (family in IN_ONE_PIECE)
    names = [] if stored.in_memory else source.fused_weights(index)
    assert all(source.model.get_parameter(name).is_meta for name in names)
    found = {
        (matrix, expert): stored.read(matrix, expert).clone()
        for matrix in MATRICES
        for expert in range(stored.num_experts)
    }
    loaded = source.load_layer(index)
    assert loaded is not None
    assert loaded.in_memory
    for (matrix, expert), weight in found.items():
        assert weight.dtype == loaded.read(matrix, expert).dtype
        assert torch.equal(weight, loaded.read(matrix, expert))
        assert weight.shape == loaded.shape(matrix)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_whose_experts_stay_on_disk_pass_the_same_activations_on(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch_module, "SMALLEST_FILE", 1)
    source = SourceModel(save_tiny_model(tmp_path / "model", family))
    expected = [
        torch.cat([h.clone() for h in layer.inputs.hidden])
        for layer in stream_layers(source, _calibration())
    ]
    (tmp_path / "scratch").mkdir()
    spilled = Scratch(tmp_path / "scratch")
    for layer in stream_layers(source, _calibration(), by_expert=True, scratch=spilled):
        assert len(spilled._maps)
        torch.testing.assert_close(
            torch.cat(list(layer.inputs.hidden)), expected[layer.index], rtol=1e-5, atol=1e-5
        )
    assert not list((tmp_path / "scratch").iterdir())


def test_a_replaced_expert_stays_so_until_it_is_released(tmp_path: Path) -> None:
    source = SourceModel(save_tiny_model(tmp_path, "mixtral"))
    experts = source.load_layer(0, by_expert=True)
    assert experts is not None
    own = experts.read("down", 1).clone()
    experts.replace("down", 1, own + 1)
    assert torch.equal(experts.read("down", 1), own + 1)
    experts.release(0)
    assert torch.equal(experts.read("down", 1), own + 1)
    experts.release(1)
    assert torch.equal(experts.read("down", 1), own)


def test_released_files_are_no_memory_and_keep_their_content(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    tensor = scratch.empty(64, 2**18, dtype=torch.float32)  # 64 MiB
    before = _resident()
    tensor.copy_(torch.arange(64.0).unsqueeze(1).expand_as(tensor))
    assert _resident() - before > 48 * 2**20
    scratch.release()
    assert _resident() - before < 16 * 2**20
    assert torch.equal(tensor[:, 5], torch.arange(64.0))
    del tensor
    assert not len(scratch._maps)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_an_error_and_not_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(RunError, match=r"no room for 0.00 GB of activations \(No space left"):
        Scratch(tmp_path).empty(2**20, dtype=torch.float32)


def _resident() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_rows_of_fused_matrices_are_told_apart(family: str, tmp_path: Path) -> None:
    source = SourceModel(save_tiny_model(tmp_path, family))
    index = next(iter(source.topology.moe))
    experts = source.load_layer(index)
    assert experts is not None
    of_row = projection_of_row(experts.module, "gate_up")
    projected = torch.ones(1, len(of_row))
    without_gate = projected.masked_fill(of_row == 0, 0.0)
    assert experts.module._apply_gate(projected).abs().min() > 0
    assert not experts.module._apply_gate(without_gate).any()
    assert not projection_of_row(experts.module, "down").any()
