"""Matrices that make up for the errors of their inputs, against the full models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_runs import (
    LENGTH,
    QUANTISE,
    SEQUENCES,
    calibration_tokens,
    cut_off_after,
    expert_calls,
    load,
    pruning_recipe,
    run,
)
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig

import mcsharp_sdk
from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.engine import memory_plan
from mcsharp_sdk.errors import InputProblems
from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.experts import MATRICES, Matrix
from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import stream_layers
from mcsharp_sdk.modifiers.original_model import OriginalExperts, OriginalLayer

COARSE = {**QUANTISE, "bits": 2, "other_bits": 3, "propagation": 0.5}


def made(folder: Path, family: str) -> Path:
    save_tiny_model(folder, family, initializer_range=0.2)
    save_tiny_tokenizer(folder)
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "qwen2_moe"])
def test_inputs_are_compared_with_those_of_the_whole_original(
    family: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With shared experts and dense layers too."""
    hidden: dict[int, Tensor] = {}
    grams: dict[tuple[int, Matrix], Tensor] = {}
    advance, cross_grams = OriginalLayer.advance, OriginalExperts.cross_grams
    current = [0]

    def note(self: OriginalLayer) -> None:
        advance(self)
        current[0] = self.layer.index
        if self.hidden is not None:
            hidden[self.layer.index] = self.hidden.clone()

    def note_grams(self: OriginalExperts, matrix: Matrix, *args: Any, **named: Any) -> Tensor:
        found = cross_grams(self, matrix, *args, **named)
        grams[current[0], matrix] = found.clone()
        return found

    monkeypatch.setattr(OriginalLayer, "advance", note)
    monkeypatch.setattr(OriginalExperts, "cross_grams", note_grams)
    model = made(tmp_path / "model", family)
    run(model, pruning_recipe(text, COARSE), tmp_path)
    tokens = calibration_tokens(text)
    original, packed = (expert_calls(load(f), tokens) for f in (model, tmp_path / "out"))
    assert hidden.keys() == original.keys()
    for layer, (wanted, _, _) in original.items():
        torch.testing.assert_close(hidden[layer], wanted, rtol=1e-3, atol=1e-3)
        found, index, _ = packed[layer]
        for expert, gram in enumerate(grams[layer, "gate_up"]):
            token, _ = torch.where(index == expert)
            x, y = found[token].double(), wanted[token].double()
            expected = 2 * (y - x).T @ x
            torch.testing.assert_close(gram.double(), expected, rtol=1e-2, atol=1e-2)
    assert float(grams[max(hidden), "down"].abs().max()) > 0


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "llama4"])
@pytest.mark.parametrize("weighted", [False, True])
def test_experts_are_compared_on_the_tokens_that_they_get_now(
    family: str, weighted: bool, tmp_path: Path
) -> None:
    """In a family whose routing weights multiply the experts' inputs too."""
    source = SourceModel(save_tiny_model(tmp_path, family, initializer_range=0.2))
    tokens = torch.randint(0, 128, (3, 32), generator=torch.Generator().manual_seed(0))
    layers = stream_layers(source, CalibrationSet.of_tokens(tokens))
    layer = next(layer for layer in layers if layer.moe is not None)
    runs = ExpertRuns.of_layer(layer)
    hidden = runs.routed.hidden
    wanted = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    experts = OriginalExperts(runs, wanted)
    chunk = [1, 3]
    experts.keep(chunk)
    for expert in chunk:  # a quantised first matrix
        weight = runs.weights.read("gate_up", expert)
        runs.weights.replace("gate_up", expert, (weight * 8).round() / 8)
    for matrix in MATRICES:
        grams = experts.cross_grams(matrix, chunk, routing_weighted=weighted)
        for gram, expert in zip(grams, chunk, strict=True):
            token, routing = runs.tokens.of(expert)
            factor = routing.unsqueeze(-1) if family == "llama4" else 1.0
            sigma = routing if weighted and family == "mixtral" else torch.ones_like(routing)
            x, y = hidden[token] * factor, wanted[token] * factor
            if matrix == "down":
                x = runs.weights.activated(expert, x)
                y = runs.weights.activated(expert, y, experts.first[expert])
            expected = 2 * ((y - x).double() * sigma.double().square()[:, None]).T @ x.double()
            torch.testing.assert_close(gram.double(), expected, rtol=1e-3, atol=1e-4)
    assert not torch.equal(experts.first[1], runs.weights.read("gate_up", 1))


def test_the_first_layers_attention_has_no_errors_to_make_up_for(
    text: Path, tmp_path: Path
) -> None:
    model = made(tmp_path / "model", "mixtral")
    run(model, pruning_recipe(text, COARSE), tmp_path / "with")
    run(model, pruning_recipe(text, {**COARSE, "propagation": 0.0}), tmp_path / "without")
    one, other = (stored(tmp_path / f / "out") for f in ("with", "without"))
    same = {name for name in one if torch.equal(one[name], other[name])}
    first = {name for name in one if name.startswith("model.layers.0.self_attn.")}
    assert first <= same
    assert {name for name in one if "layers.1." in name and "qweight" in name}.isdisjoint(same)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(
    family: str, text: Path, tmp_path: Path
) -> None:
    model, recipe = made(tmp_path / "model", family), pruning_recipe(text, COARSE)
    whole = run(model, recipe, tmp_path / "whole").output
    with cut_off_after(2):
        run(model, recipe, tmp_path / "cut")
    resumed = run(model, recipe, tmp_path / "cut").output
    one, other = stored(whole), stored(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_several_processes_are_refused_before_work(text: Path, tmp_path: Path) -> None:
    model, recipe = made(tmp_path / "model", "mixtral"), pruning_recipe(text, COARSE)
    with pytest.raises(InputProblems, match=r"start one process, or set 'propagation: 0'"):
        mcsharp_sdk.plan(recipe, model, processes=2)
    shared = pruning_recipe(text, {**COARSE, "propagation": 0})
    assert mcsharp_sdk.plan(shared, model, processes=2).stages


def test_the_plan_knows_the_memory_of_the_original_beside(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "base_bytes", lambda: 0)
    model = made(tmp_path / "model", "mixtral")
    with_, without = (
        mcsharp_sdk.plan(pruning_recipe(text, {**COARSE, "propagation": share}), model)
        for share in (0.5, 0)
    )
    # Hidden states before the layer, and in front of its experts, in float32.
    hidden_size = AutoConfig.from_pretrained(model).hidden_size
    assert with_.peak_memory - without.peak_memory >= 2 * SEQUENCES * LENGTH * hidden_size * 4
    assert with_.run_bytes >= without.run_bytes
