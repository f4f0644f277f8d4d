"""RouterCalibration against the full models, and that what it makes reaches every reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from mcsharp_exporters.onnx_runner import OnnxRouters
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
from stock_models import stir
from tiny_models import save_tiny_model, tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from torch import Tensor

import mcsharp_sdk
from mcsharp_sdk.artifacts import TokenProtectionRule
from mcsharp_sdk.engine.run_directory import LayerStore
from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.models.directory import routers_of_directory
from mcsharp_sdk.models.routing import route
from mcsharp_sdk.models.shards import Checkpoint

COARSE = {**QUANTISE, "bits": 2, "other_bits": 2}
CALIBRATE = {"type": "RouterCalibration", "ridge": 1e-3}
TOKENS = SEQUENCES * LENGTH
HELD_OUT = torch.arange(TOKENS) % 8 == 7


def made(folder: Path, family: str) -> Path:
    save_tiny_model(folder, family, initializer_range=0.1)
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A softmax router, and a sigmoid one with correction bias and groups."""
    families = ("mixtral", "deepseek_v3")
    return {family: made(tmp_path_factory.mktemp(family), family) for family in families}


def stored(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names}


@torch.no_grad()
def router_inputs(model: Any, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Decoder layer -> what its router gets, and the logits that its weight makes of it."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        gate = getattr(layer.mlp, "gate", None)
        if gate is None:
            continue

        def note(module: Any, arguments: Any, index: int = index) -> None:
            hidden = arguments[0].reshape(-1, arguments[0].shape[-1])
            found[index] = hidden, hidden @ module.weight.T

        handles.append(gate.register_forward_pre_hook(note))
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_reported_distances_are_those_of_the_full_models_on_tokens_held_out(
    family: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    run(models[family], pruning_recipe(text, COARSE, CALIBRATE), tmp_path)
    original, compressed = load(models[family]), load(tmp_path / "out")
    tokens = calibration_tokens(text)
    was, now = router_inputs(original, tokens), router_inputs(compressed, tokens)
    chosen, again = expert_calls(original, tokens), expert_calls(compressed, tokens)
    store = LayerStore(tmp_path / "run" / "calibrated_routers")
    changed = 0
    for layer in was:
        notes = store.notes(layer)
        changed += notes["changed"]
        target, logits = (states[layer][1].double()[HELD_OUT] for states in (was, now))
        if family == "mixtral":
            kl = (target.softmax(-1) * (target.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
        else:
            known, found = (torch.distributions.Bernoulli(logits=z) for z in (target, logits))
            kl = torch.distributions.kl_divergence(known, found).sum(-1)
        assert notes["divergence_after"] == pytest.approx(float(kl.mean()), rel=0.02)
        assert notes["divergence_after"] <= notes["divergence_before"]
        same = [
            np.isin(one, other).mean()
            for one, other in zip(
                chosen[layer][1][HELD_OUT].numpy(), again[layer][1][HELD_OUT].numpy(), strict=True
            )
        ]
        assert notes["same_after"] == pytest.approx(np.mean(same), abs=0.02)
    assert changed


def test_only_routers_change_and_all_readers_get_them(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    exports = [{"type": "safetensors"}, {"type": "onnx_routers"}]
    plain, fitted = tmp_path / "plain", tmp_path / "fitted"
    run(models["mixtral"], pruning_recipe(text, COARSE), plain)
    done = run(models["mixtral"], pruning_recipe(text, COARSE, CALIBRATE, exports=exports), fitted)
    before, after = stored(plain / "out"), stored(done.output)
    assert before.keys() == after.keys()
    different = {name for name in before if not torch.equal(before[name], after[name])}
    store = LayerStore(fitted / "run" / "calibrated_routers")
    expected = [store.tensors(layer) for layer in range(3)]
    assert different == {name for tensors in expected for name in tensors}
    assert different
    for name in different:
        assert name.endswith("mlp.gate.weight")
    onnx = OnnxRouters(done.output / "onnx_routers")
    for router in routers_of_directory(done.output):
        hidden = torch.randn(50, router.hidden_size, generator=torch.Generator().manual_seed(0))
        assert torch.equal(onnx(router.layer, hidden).indices, route(router, hidden).indices)


def test_thresholds_behind_it_are_measured_with_the_fitted_routers(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    protection = {"type": "TokenProtection", "metric": "none"}
    run(models["mixtral"], pruning_recipe(text, COARSE, CALIBRATE, protection), tmp_path)
    rule = TokenProtectionRule.load(tmp_path / "run" / TokenProtectionRule.FILE)
    model = load(tmp_path / "out")
    model.set_expert_pruning("off")
    calls = expert_calls(model, calibration_tokens(text))
    for layer in rule.layers:
        weights = calls[layer.layer][2].double()
        ratio = weights.amin(1) / weights.amax(1)
        assert layer.thresholds[0] == pytest.approx(float(ratio.quantile(0.5)), rel=1e-3)


@pytest.mark.parametrize("writes_until_the_cut", [3, 4, 5])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(
    writes_until_the_cut: int,
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
) -> None:
    recipe = pruning_recipe(text, COARSE, CALIBRATE)
    whole = run(models["mixtral"], recipe, tmp_path / "whole").output
    with cut_off_after(writes_until_the_cut):
        run(models["mixtral"], recipe, tmp_path / "cut")
    resumed = run(models["mixtral"], recipe, tmp_path / "cut").output
    one, other = stored(whole), stored(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "phimoe"])
def test_routers_of_every_family_are_fitted_and_load(
    family: str, text: Path, tmp_path: Path
) -> None:
    model = tiny_model(family, initializer_range=0.1)
    stir(model)
    model.save_pretrained(tmp_path / "model")
    save_tiny_tokenizer(tmp_path / "model")
    # Few tokens and random routers: only a small change holds on tokens that were held out.
    calibrate = {**CALIBRATE, "ridge": 0.1}
    done = run(tmp_path / "model", pruning_recipe(text, COARSE, calibrate), tmp_path)
    store = LayerStore(tmp_path / "run" / "calibrated_routers")
    fitted = {
        layer: tensors
        for layer in range(len(list(store.folder.glob("layer_*.json"))) + 3)
        if store.has(layer) and (tensors := store.tensors(layer))
    }
    assert fitted
    loaded = {router.layer: router.weight for router in routers_of_directory(done.output)}
    for layer, tensors in fitted.items():
        (weight,) = tensors.values()
        assert torch.equal(loaded[layer].float(), weight.float())


def test_a_router_that_does_not_choose_by_probabilities_is_refused(
    text: Path, tmp_path: Path
) -> None:
    model = made(tmp_path / "model", "phimoe")
    with pytest.raises(InputProblems, match=r"phimoe cannot be calibrated: SparseMixer"):
        run(model, pruning_recipe(text, COARSE, CALIBRATE), tmp_path)
    assert not (tmp_path / "out").exists()


def test_it_needs_quantised_weights(text: Path) -> None:
    with pytest.raises(InputError, match=r"RouterCalibration needs the quantized weights"):
        pruning_recipe(text, CALIBRATE, exports=[])


@pytest.mark.parametrize("stage", ["TokenProtection", "TopAnyRouter"])
def test_it_is_refused_behind_what_measures_with_the_routers_as_they_were(
    stage: str, text: Path
) -> None:
    refusal = rf"stages\[2\]: .*put RouterCalibration in front of {stage}"
    with pytest.raises(InputProblems, match=refusal):
        pruning_recipe(text, COARSE, {"type": stage}, CALIBRATE)
    pruning_recipe(text, COARSE, CALIBRATE, {"type": stage})


def test_it_is_planned(models: dict[str, Path], text: Path) -> None:
    assert (
        "RouterCalibration"
        in mcsharp_sdk.plan(pruning_recipe(text, COARSE, CALIBRATE), models["mixtral"])
        .stages[1]
        .stage
    )
