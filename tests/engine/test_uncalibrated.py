"""Quantising by weights alone: no calibration, and a model that is never run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mortal_runs import Command, Death, files_of, run
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

import mcsharp_sdk
from mcsharp_sdk.artifacts import BitMap
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.experts import MATRICES, fused_weight, is_experts
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.quantization.hqq import quantise_hqq
from mcsharp_sdk.quantization.round_to_nearest import quantise_rtn
from mcsharp_sdk.quantization.search import GridSettings

GRID = GridSettings(group_size=16)
QUANTISERS = {"rtn": quantise_rtn, "hqq": quantise_hqq}
TOKENS = torch.arange(24).reshape(2, 12)


def compressed(model: Path, output: Path, *stages: dict[str, Any]) -> Any:
    """A model compressed by stages without a calibration; there is not even a tokenizer."""
    recipe = mcsharp_sdk.Recipe.from_dict({"version": 1, "stages": list(stages)})
    mcsharp_sdk.compress(recipe, model, output, progress=False)
    return AutoModelForCausalLM.from_pretrained(output)


@torch.no_grad()
def rounded(folder: Path, quantiser: str, bits: int) -> Any:
    """The original with every matrix of experts and every linear rounded by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    quantise, topology = QUANTISERS[quantiser], SourceModel(folder).topology
    for module in model.modules():
        if is_experts(module):
            for matrix in MATRICES:
                weights = fused_weight(module, matrix)
                weights.copy_(quantise(weights, [bits] * len(weights), GRID).dequantise())
    for layer, names in topology.linears.items():
        for name in names:
            weight = model.get_parameter(f"{topology.layers_path}.{layer}.{name}.weight")
            weight.copy_(quantise(weight[None], [4], GRID).dequantise()[0])
    return model


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss", "qwen3_moe"])
@torch.no_grad()
def test_each_matrix_is_rounded_by_itself(family: str, quantiser: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", family)
    stage = {"type": "GPTQQuantize", "quantizer": quantiser, "bits": 3, "group_size": 16}
    model = compressed(folder, tmp_path / "out", stage)
    expected = rounded(folder, quantiser, 3)(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_experts_can_be_turned_before(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    stage = {"type": "GPTQQuantize", "quantizer": "rtn", "bits": 8, "group_size": 16}
    model = compressed(
        folder, tmp_path / "out", {**stage, "rotation": "hadamard", "other_bits": None}
    )
    original = AutoModelForCausalLM.from_pretrained(folder)
    difference = (model(TOKENS).logits - original(TOKENS).logits).norm()
    assert 0 < difference < 0.02 * original(TOKENS).logits.norm()


@pytest.mark.parametrize("allocator", ["uniform", "random"])
def test_allocators_that_look_at_nothing_need_no_statistics(allocator: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    allocation = {"type": "BitAllocation", "allocator": allocator, "target_bits": 2.5}
    compressed(
        folder,
        tmp_path / "out",
        {**allocation, "at_least": {}},
        {"type": "GPTQQuantize", "quantizer": "rtn", "group_size": 16},
    )
    bit_map = BitMap.load(tmp_path / "out" / BitMap.FILE)
    assert bit_map.nominal_bits == 2.5
    assert bit_map.objective is None


def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    stage = {"type": "GPTQQuantize", "quantizer": "rtn", "bits": 2, "group_size": 16}
    runs = tmp_path / "runs"
    runs.mkdir()
    command = Command({"version": 1, "stages": [stage]}, folder, runs / "out", {})
    assert run(command, Death(runs, change=12)).code == -signal.SIGKILL
    assert run(command, Death(runs)).code == 0
    compressed(folder, tmp_path / "whole", stage)
    assert files_of(runs / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"type": "GPTQQuantize", "bits": 2}], "GPTQQuantize needs calibration text"),
        (
            [{"type": "GPTQQuantize", "bits": 2, "quantizer": "lwc"}],
            "GPTQQuantize needs calibration text",
        ),
        (
            [{"type": "BitAllocation", "target_bits": 2.0, "allocator": "frequency"}],
            "needs the expert statistics",
        ),
    ],
)
def test_what_must_measure_asks_for_text(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mcsharp_sdk.Recipe.from_dict({"version": 1, "stages": stages, "exports": []})


def test_the_plan_counts_no_passes_and_no_hessians(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral", intermediate_size=2048)
    stage = {"type": "GPTQQuantize", "quantizer": "rtn", "bits": 2, "group_size": 16}
    blind = {"version": 1, "stages": [stage]}
    seeing = {**blind, "calibration": {"source": "embedded", "sequences": 8, "length": 64}}
    without, with_text = (
        mcsharp_sdk.plan(mcsharp_sdk.Recipe.from_dict(recipe), folder) for recipe in (blind, seeing)
    )
    hessian = 4 * 2048**2
    assert without.stages[0].seconds < with_text.stages[0].seconds
    assert without.peak_memory + hessian < with_text.peak_memory


def test_stages_that_go_by_the_quantised_model_stand_behind_it() -> None:
    calibration = {"source": "embedded", "sequences": 8, "length": 64}
    stages = [{"type": "TokenProtection"}, {"type": "GPTQQuantize", "bits": 2}]
    with pytest.raises(InputError, match=r"stages\[0\].*move it behind GPTQQuantize"):
        mcsharp_sdk.Recipe.from_dict({"version": 1, "calibration": calibration, "stages": stages})


def test_a_width_in_place_of_a_map_is_told(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    stages = [
        {"type": "BitAllocation", "allocator": "uniform", "target_bits": 3.0},
        {"type": "GPTQQuantize", "quantizer": "rtn", "bits": 2, "group_size": 16},
    ]
    recipe = mcsharp_sdk.Recipe.from_dict({"version": 1, "stages": stages})
    done = mcsharp_sdk.compress(recipe, folder, tmp_path / "out", progress=False)
    assert any("'bits: 2' stands in place of" in warning for warning in done.warnings)
    assert "bits 2" in done.plan.stages[1].summary


@pytest.mark.parametrize("allocator", ["uniform", "random"])
def test_the_solver_is_planned_where_it_is_imported(allocator: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    code = f"""
import sys
from pathlib import Path
import mcsharp_sdk
from mcsharp_sdk.engine import memory_plan

allocation = {{"type": "BitAllocation", "target_bits": 2.5, "allocator": {allocator!r}}}
stages = [allocation, {{"type": "GPTQQuantize", "quantizer": "rtn", "group_size": 16}}]
recipe = mcsharp_sdk.Recipe.from_dict({{"version": 1, "stages": stages}})
mcsharp_sdk.compress(recipe, Path({str(folder)!r}), Path({str(tmp_path / "out")!r}), progress=False)
memory_plan.base_bytes = lambda: 0
planned = mcsharp_sdk.plan(recipe, Path({str(folder)!r})).peak_memory
print("ortools.sat.python.cp_model" in sys.modules, planned >= memory_plan.SOLVER_BYTES)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, planned = ran.stdout.split()
    assert imported == planned == str(allocator == "random")
