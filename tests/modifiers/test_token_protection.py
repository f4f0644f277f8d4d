"""TokenProtection against a plain computation on the full model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruning_runs import (
    LENGTH,
    QUANTISE,
    SEQUENCES,
    calibration_tokens,
    cut_off_after,
    expert_calls,
    experts_of,
    load,
    pruning_recipe,
    run,
)
from pydantic import ValidationError
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

from mcsharp_sdk.artifacts import TokenProtectionRule
from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.models.topology import MoeBlock
from mcsharp_sdk.modifiers import protection_measurement
from mcsharp_sdk.modifiers.token_protection import TokenProtection
from mcsharp_sdk.recipe.schema import Recipe


def measure(
    model: Path, text: Path, work: Path, *before: dict[str, Any], **settings: Any
) -> TokenProtectionRule:
    stages = [*before, {"type": "TokenProtection", **settings}]
    run(model, pruning_recipe(text, *stages, exports=[]), work)
    return TokenProtectionRule.load(work / "run" / TokenProtectionRule.FILE)


def protected_by_attention(model: Any, tokens: torch.Tensor, count: int) -> dict[int, np.ndarray]:
    """Layer -> (S·L,) bool: Eq. 6 of MC, from whole attention maps."""
    calls = expert_calls(model, tokens)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(tokens, use_cache=False, output_attentions=True).attentions
    found = {}
    for layer, (hidden, _, _) in calls.items():
        received = maps[layer].double().mean(1).sum(1).numpy()  # over queries, mean over heads
        later = LENGTH - np.arange(LENGTH)
        magnitude = hidden.view(SEQUENCES, LENGTH, -1).double().abs().sum(-1).numpy()
        importance = magnitude * received / later
        chosen = np.zeros((SEQUENCES, LENGTH), dtype=bool)
        for row, values in enumerate(importance):
            chosen[row, np.argsort(-values)[:count]] = True
        found[layer] = chosen.reshape(-1)
    model.set_attn_implementation("sdpa")
    return found


@torch.no_grad()
def states_behind(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states behind each layer."""
    states: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda *a: states.append(a[2])) for layer in model.model.layers
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return states


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_thresholds_shares_and_costs_equal_a_plain_computation(
    family: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    rule = measure(models[family], text, tmp_path, quantile=0.3, protect_ratio=0.1)
    model, tokens = load(models[family]), calibration_tokens(text)
    protected = protected_by_attention(model, tokens, count=4)  # 0.1 of 32, rounded up
    states, experts = states_behind(model, tokens), experts_of(model)
    calls = expert_calls(model, tokens)
    assert [found.layer for found in rule.layers] == sorted(calls)
    for found in rule.layers:
        hidden, index, weights = calls[found.layer]
        plain = weights.double().numpy()
        ratios = -np.sort(-plain, axis=1) / plain.max(axis=1, keepdims=True)
        expected = np.quantile(ratios[:, 1:], 0.3, axis=0)
        np.testing.assert_allclose(found.thresholds, expected, rtol=1e-5)

        kept = np.ones_like(plain, dtype=bool)
        for token, row in enumerate(plain):
            if not protected[found.layer][token]:
                for rank, slot in enumerate(np.argsort(-row)[1:]):
                    kept[token, slot] = row[slot] / row.max() >= found.thresholds[rank] - 1e-9
        # A token right at a threshold may go either way.
        assert found.keep_ratio == pytest.approx(kept.mean(), abs=1.01 / kept.size)

        sums = plain.sum(1, keepdims=True)
        pruned = plain * kept
        pruned *= sums / pruned.sum(1, keepdims=True)
        with torch.no_grad():
            before = experts[found.layer](hidden, index, weights)
            after = experts[found.layer](hidden, index, torch.from_numpy(pruned).float())
        cost = (after - before).norm() / states[found.layer].norm()
        assert found.cost == pytest.approx(float(cost), rel=0.02)


def test_the_quantised_model_is_measured_where_there_is_one(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    stages = [QUANTISE, {"type": "TokenProtection", "metric": "none"}]
    output = run(models["mixtral"], pruning_recipe(text, *stages), tmp_path).output
    model = load(output)
    model.set_expert_pruning("off")
    calls = expert_calls(model, calibration_tokens(text))
    for found in TokenProtectionRule.load(output / TokenProtectionRule.FILE).layers:
        weights = calls[found.layer][2].sort(dim=1).values.double().numpy()
        expected = np.median(weights[:, 0] / weights[:, 1])
        assert list(found.thresholds) == pytest.approx([float(expected)], rel=1e-4)


def test_insignificant_tokens_lose_all_experts(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    settings = {"metric": "drop_insignificant", "drop_ratio": 0.1}
    rule = measure(models["deepseek_v3"], text, tmp_path, **settings)
    for found in rule.layers:
        assert found.keep_ratio == 1 - 4 / LENGTH
        assert found.thresholds == (0.0, 0.0)
        assert found.cost > 0


@pytest.mark.parametrize("metric", ["kurtosis", "variance", "mean"])
def test_every_metric_protects_the_share(
    metric: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    settings = {"metric": metric, "threshold": 1.0, "protect_ratio": 0.25}
    rule = measure(models["mixtral"], text, tmp_path, **settings)
    assert [found.keep_ratio for found in rule.layers] == [(1 + 0.25) / 2] * 3


def test_the_cheapest_layers_prune(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    rule = measure(models["mixtral"], text, tmp_path, layers={"cheapest": 2})
    costs = {found.layer: found.cost for found in rule.layers}
    dearest = max(costs, key=lambda layer: costs[layer])
    assert {found.layer for found in rule.layers if not found.pruned} == {dearest}
    assert set(rule.thresholds()) == set(costs) - {dearest}


def test_layers_that_keep_everything_or_one_expert_are_named(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    for threshold, message in ((0.0, "drops no expert"), (1.0, "keeps no more than one of 2")):
        stage = {"type": "TokenProtection", "metric": "none", "threshold": threshold}
        work = tmp_path / str(threshold)
        done = run(models["mixtral"], pruning_recipe(text, stage, exports=[]), work)
        named = [warning for warning in done.warnings if message in warning]
        assert [warning.split(":")[0] for warning in named] == ["layer 0", "layer 1", "layer 2"]


@pytest.mark.parametrize("writes_until_the_cut", [1, 2])
def test_a_measurement_that_was_cut_off_ends_with_the_same_file(
    writes_until_the_cut: int,
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
) -> None:
    expected = measure(models["mixtral"], text, tmp_path / "undisturbed")
    with cut_off_after(writes_until_the_cut):
        measure(models["mixtral"], text, tmp_path / "again")
    assert measure(models["mixtral"], text, tmp_path / "again") == expected


def test_a_layer_without_softmax_attention_asks_for_another_metric(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its attention never fills the tap.
    monkeypatch.setattr(protection_measurement, "attach_tap", lambda *_: None)
    with pytest.raises(RunError, match=r"layer 0 has no softmax attention .*give another metric"):
        measure(models["mixtral"], text, tmp_path)


@pytest.mark.parametrize("metric", ["attention", "drop_insignificant"])
def test_sequences_of_one_token_cannot_be_ranked_by_attention(
    metric: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    recipe = pruning_recipe(text, {"type": "TokenProtection", "metric": metric}, exports=[])
    short = Recipe.from_dict(recipe.settings(), overrides=["calibration.length=1"])
    with pytest.raises(InputError, match=rf"calibration\.length: .*'{metric}'.*give 2 or more"):
        run(models["mixtral"], short, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{"metric": "variance"}, {"protect_ratio": 0}])
def test_sequences_of_one_token_do_where_attention_is_not_asked_for(
    settings: dict[str, Any], models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    recipe = pruning_recipe(text, {"type": "TokenProtection", **settings}, exports=[])
    short = Recipe.from_dict(recipe.settings(), overrides=["calibration.length=1"])
    run(models["mixtral"], short, tmp_path)
    assert (tmp_path / "run" / TokenProtectionRule.FILE).exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protect_ratio": 1.5}, "protect_ratio"),
        ({"drop_ratio": -0.1}, "drop_ratio"),
        ({"threshold": 1.5}, "threshold"),
        ({"quantile": 2}, "quantile"),
        ({"metric": "entropy"}, "metric"),
        ({"layers": {"cheapest": 0}}, "cheapest"),
        ({"layers": "most"}, "layers"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokenProtection.model_validate(settings)


def test_what_does_not_fit_the_model_is_told_before_any_work(
    text: Path, tmp_path: Path, models: dict[str, Path]
) -> None:
    blocks = {layer: MoeBlock(layer, "mlp.experts", "mlp.gate", 4, 2) for layer in range(3)}
    (problem,) = TokenProtection.model_validate({"layers": {"cheapest": 4}}).check_blocks(blocks)
    assert "4 layers are more than the model's 3" in problem.message
    single = save_tiny_model(tmp_path / "single", "mixtral", num_experts_per_tok=1)
    save_tiny_tokenizer(single)
    with pytest.raises(InputError, match=r"stages\[0\]: each token uses one expert in this model"):
        measure(single, text, tmp_path)
    assert not (tmp_path / "run").exists()
