"""Pruning through the whole path: recipe, compressed model, from_pretrained, fewer experts."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_runs import (
    LENGTH,
    QUANTISE,
    SEQUENCES,
    calibration_tokens,
    kept_shares,
    load,
    pruning_recipe,
    run,
    write_models,
    write_text,
)
from safetensors import safe_open

import mcsharp_sdk
from mcsharp_sdk.artifacts import TokenProtectionRule
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.cost import model_cost
from mcsharp_sdk.runtime.layout import PackedLayout

PROTECT: dict[str, Any] = {"type": "TokenProtection"}
LEARN: dict[str, Any] = {"type": "TopAnyRouter", "steps": 20, "batch_tokens": 96}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(tokens, use_cache=False).logits
    return found


def pruning_of(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return PackedLayout.from_dict(config).pruning


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_pruned_model_prunes_as_it_was_measured(
    family: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    recipe = pruning_recipe(text, QUANTISE, PROTECT, LEARN)
    output = run(models[family], recipe, tmp_path).output
    model, tokens = load(output), calibration_tokens(text)
    assert model.expert_pruning == "both"
    told = TokenProtectionRule.load(output / TokenProtectionRule.FILE)
    first = told.layers[0]
    model.set_expert_pruning("rule")
    # Layers behind the first see what pruning left, so only the first keeps exactly as many.
    share = kept_shares(model, tokens)[first.layer]
    assert share == pytest.approx(first.keep_ratio, abs=2.01 / tokens.numel())
    model.set_expert_pruning("learned")
    learned = json.loads((output / "top_any_training.json").read_text())["keep_ratio"]
    share = kept_shares(model, tokens)[first.layer]
    assert share == pytest.approx(learned[str(first.layer)], abs=2.01 / tokens.numel())
    model.set_expert_pruning("both")
    assert kept_shares(model, tokens)[first.layer] > share


def test_what_keeps_everything_changes_no_bit(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    plain = run(models["mixtral"], pruning_recipe(text, QUANTISE), tmp_path / "plain").output
    everything = ({**PROTECT, "threshold": 0.0}, {**LEARN, "target_activation": 1.0})
    recipe = pruning_recipe(text, QUANTISE, *everything)
    pruned = run(models["mixtral"], recipe, tmp_path / "pruned").output
    tokens = calibration_tokens(text)
    expected, model = logits(load(plain), tokens), load(pruned)
    for mode in ("off", "rule", "learned", "both"):
        model.set_expert_pruning(mode)
        assert torch.equal(logits(model, tokens), expected), mode


@pytest.mark.parametrize(
    ("stages", "mode"),
    [
        ([PROTECT], "rule"),
        ([LEARN], "learned"),
        ([LEARN, PROTECT], "both"),
        ([{**PROTECT, "metric": "drop_insignificant"}, LEARN], "learned"),
    ],
)
def test_a_model_that_is_only_pruned_keeps_its_weights(
    stages: list[dict[str, Any]],
    mode: str,
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
) -> None:
    done = run(models["mixtral"], pruning_recipe(text, *stages), tmp_path)
    assert pruning_of(done.output).mode == mode
    original, model = load(models["mixtral"]), load(done.output)
    kept, tokens = model.state_dict(), calibration_tokens(text)
    assert all(torch.equal(kept[name], tensor) for name, tensor in original.state_dict().items())
    assert model.expert_pruning == mode
    assert not torch.equal(logits(model, tokens), logits(original, tokens))
    model.set_expert_pruning("off")
    assert torch.equal(logits(model, tokens), logits(original, tokens))
    card = (done.output / "README.md").read_text()
    assert "The weights are as they were" in card
    assert f'model.set_expert_pruning("{mode}")' in card
    assert "nominal_bits" not in json.loads((done.output / "mcsharp_report.json").read_text())


def test_networks_are_stored_beside_the_experts(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    recipe = pruning_recipe(text, QUANTISE, {**LEARN, "units": 8})
    output = run(models["deepseek_v3"], recipe, tmp_path).output
    (weights,) = output.glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        names = [name for name in file.keys() if ".pruner." in name]  # noqa: SIM118
        shapes = {name.partition(".pruner.")[2]: file.get_slice(name).get_shape() for name in names}
        assert all(file.get_slice(name).get_dtype() == "F32" for name in names)
    assert shapes == {
        "first.weight": [8, 64 + 3],
        "first.bias": [8],
        "second.weight": [3, 8],
        "second.bias": [3],
    }
    assert {name.split(".mlp.")[0] for name in names} == {"model.layers.1", "model.layers.2"}
    assert pruning_of(output).learned.layers == (1, 2)


def test_the_training_is_drawn(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    output = run(models["mixtral"], pruning_recipe(text, LEARN), tmp_path).output
    picture = ET.fromstring((output / "top_any_training.svg").read_text())
    assert picture.attrib["height"] == "840"
    titles = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert {"layer 0", "layer 1", "layer 2", "Distillation loss"} <= set(titles)


def test_the_plan_knows_the_networks(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    for number, stages in enumerate(([QUANTISE, LEARN], [LEARN])):
        recipe = pruning_recipe(text, *stages)
        plan = mcsharp_sdk.plan(recipe, models["mixtral"])
        cost = model_cost(run(models["mixtral"], recipe, tmp_path / str(number)).output)
        assert plan.bytes_after == pytest.approx(cost.weight_bytes, rel=0.05)
        assert plan.stages[-1].seconds > 0
        assert plan.stages[-1].summary == "scope block, target_activation 0.8"


def test_an_exporter_needs_something_to_write(text: Path) -> None:
    with pytest.raises(
        InputError,
        match="safetensors, the default, needs the quantized weights, token protection or top any "
        "router of an earlier stage: add a GPTQQuantize, TokenProtection or TopAnyRouter stage",
    ):
        pruning_recipe(text, {"type": "ExpertStats"})


def test_sizes_of_the_calibration_are_those_of_the_tests(text: Path) -> None:
    recipe = pruning_recipe(text, PROTECT)
    assert len(recipe.sources) == 1
    assert (recipe.sources[0].sequences, recipe.sources[0].length) == (SEQUENCES, LENGTH)
