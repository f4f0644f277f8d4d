"""TopAnyRouter: what it minimises, what it reaches, and what it says when it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_runs import (
    QUANTISE,
    calibration_tokens,
    expert_calls,
    experts_of,
    kept_shares,
    load,
    pruning_recipe,
    run,
)
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn import functional as F

import mcsharp_sdk
from mcsharp_sdk.artifacts import TopAnyTraining
from mcsharp_sdk.checked_files import read_checked_json
from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.engine.layer_store import LayerStore
from mcsharp_sdk.errors import RunError
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import advance, stream_layers
from mcsharp_sdk.models.topology import MoeBlock
from mcsharp_sdk.modifiers.top_any_block import BlockTask
from mcsharp_sdk.modifiers.top_any_router import TopAnyRouter
from mcsharp_sdk.modifiers.top_any_target import keep_ratio, shift_for
from mcsharp_sdk.modifiers.top_any_training import (
    StepLosses,
    Training,
    new_network,
    renormalised,
    seeded,
    temperature_at,
)
from mcsharp_sdk.pruning.rule import renormalise
from mcsharp_sdk.pruning.top_any import gumbel_noise, kept_counts, soft_keep

SHORT: dict[str, Any] = {"type": "TopAnyRouter", "steps": 30, "batch_tokens": 96, "patience": None}


def train(model: Path, text: Path, work: Path, **changes: Any) -> Any:
    return run(model, pruning_recipe(text, {**SHORT, **changes}, exports=[]), work)


def networks(work: Path) -> dict[str, torch.Tensor]:
    """All parameters that the stage left."""
    return {
        f"{file.stem}.{name}": tensor
        for file in sorted((work / "run" / "top_any_router").glob("layer_*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def training_of(work: Path) -> TopAnyTraining:
    return TopAnyTraining.load(work / "run" / TopAnyTraining.FILE)


# The loss


def test_weights_in_training_are_those_at_run_time_also_of_tokens_without_any() -> None:
    weights = torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.5, 0.3, 0.2]])
    keep = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1]]).float().requires_grad_()
    found = renormalised(weights, keep)
    torch.testing.assert_close(found, renormalise(weights, keep.bool()))
    found.square().sum().backward()
    assert keep.grad is not None
    assert keep.grad.isfinite().all()
    assert (keep.grad[3] != 0).any()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@torch.no_grad()
def test_the_loss_is_the_change_of_the_blocks_output(
    family: str, models: dict[str, Path], text: Path
) -> None:
    tokens = calibration_tokens(text)
    source = SourceModel(models[family])
    streamed = stream_layers(source, CalibrationSet.of_tokens(tokens), iter)
    tasks = {x.index: BlockTask.of_layer(x) for x in streamed if x.moe is not None}
    model = load(models[family])
    behind: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *a: behind.append(a[2].flatten(0, 1)))
    calls, experts = expert_calls(model, tokens), experts_of(model)
    for layer, task in tasks.items():
        hidden, index, weights = calls[layer]
        generator = torch.Generator().manual_seed(layer)
        keep = torch.rand(weights.shape, generator=generator) < 0.6
        order = weights.argsort(dim=1, descending=True)
        keep.scatter_(1, order[:, :1], True)
        pruned = weights * keep
        pruned = pruned * (weights.sum(1, keepdim=True) / pruned.sum(1, keepdim=True))
        change = experts[layer](hidden, index, pruned) - experts[layer](hidden, index, weights)
        expected = (change.double().square().sum(1) / behind[layer].double().square().sum(1)).mean()
        error = task.error(keep.gather(1, order).float(), slice(None)) / task.whole
        assert float(error) == pytest.approx(float(expected), rel=1e-3)


@torch.no_grad()
def test_what_streams_on_is_the_unpruned_output(models: dict[str, Path], text: Path) -> None:
    source, tokens = SourceModel(models["deepseek_v3"]), calibration_tokens(text)
    for layer in stream_layers(source, CalibrationSet.of_tokens(tokens), iter):
        if layer.moe is not None:
            BlockTask.of_layer(layer)
        if layer.is_last:
            advance(layer)
        last = layer.inputs
    states: list[torch.Tensor] = []
    model = load(models["deepseek_v3"])
    model.model.norm.register_forward_pre_hook(lambda _, a: states.append(a[0]))
    with torch.no_grad():
        model(tokens, use_cache=False)
    torch.testing.assert_close(torch.cat(last.hidden), states[0], rtol=1e-4, atol=1e-5)


# The target


logits_of_layers = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 10**6)),
    min_size=1,
    max_size=3,
    unique_by=lambda layer: layer[1],
)


@settings(max_examples=40, deadline=None)
@given(logits_of_layers, st.integers(2, 6), st.floats(0, 1))
def test_the_shift_comes_as_near_to_the_target_as_one_token_more_or_less(
    layers: list[tuple[int, int]], top_k: int, part: float
) -> None:
    target = 1 / top_k + part * (1 - 1 / top_k)
    logits = [
        torch.randn(tokens, top_k, generator=torch.Generator().manual_seed(seed))
        for tokens, seed in layers
    ]
    step = (top_k - 1) / sum(found.numel() for found in logits)  # a token from one to all experts
    reached = keep_ratio(logits, shift_for(logits, target))
    assert abs(reached - target) <= step / 2 + 1e-9


@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize(("family", "target"), [("mixtral", 0.7), ("deepseek_v3", 0.6)])
def test_the_target_is_reached_on_the_calibration_tokens(
    family: str, target: float, scope: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    stage = {**SHORT, "target_activation": target, "scope": scope}
    recipe = pruning_recipe(text, QUANTISE, stage)
    output = run(models[family], recipe, tmp_path).output
    told = TopAnyTraining.load(output / TopAnyTraining.FILE).keep_ratio
    tolerance = 0.005 + 1 / (192 * 2)  # a token more or less, where half a percent is less
    assert sum(told.values()) / len(told) == pytest.approx(target, abs=tolerance)
    if scope == "block":
        assert all(kept == pytest.approx(target, abs=tolerance) for kept in told.values())
    first = min(told)
    found = kept_shares(load(output), calibration_tokens(text))
    # The first layer sees what it saw in training; others see what pruning left.
    assert found[first] == pytest.approx(told[first], abs=tolerance)


def test_training_beats_what_the_start_knows(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """The trained choice costs less than any of 20 random ones that drop the same share."""
    train(models["mixtral"], text, tmp_path, steps=150, target_activation=0.75)
    source = SourceModel(models["mixtral"])
    for layer in stream_layers(source, CalibrationSet.of_tokens(calibration_tokens(text)), iter):
        task = BlockTask.of_layer(layer)
        told = LayerStore(tmp_path / "run" / "top_any_router").notes(layer.index)
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            keep = torch.ones_like(task.weights)
            chosen = torch.randperm(len(keep), generator=generator)
            keep[chosen[: len(keep) // 2], 1] = 0.0
            assert told["error"] < float(task.error(keep, slice(None))) / task.whole


# Cut off, and the same again


class _CutOff(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize("saves_until_the_cut", [1, 2])
def test_a_training_that_was_cut_off_ends_with_the_same_networks(
    saves_until_the_cut: int,
    scope: str,
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"scope": scope, "checkpoint_steps": 5, "steps": 14}
    train(models["mixtral"], text, tmp_path / "undisturbed", **changes)
    step = Training._step
    done: list[int] = []

    def cut_off(self: Training, number: int, *arguments: Any) -> None:
        if len(done) == 5 * saves_until_the_cut + 3:
            raise _CutOff
        done.append(number)
        step(self, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", cut_off)
        with pytest.raises(_CutOff):
            train(models["mixtral"], text, tmp_path / "again", **changes)
    state = tmp_path / "again" / "run" / "top_any_router" / "training.safetensors"
    assert state.exists()

    first: list[int] = []

    def note(self: Training, number: int, *arguments: Any) -> None:
        first.append(number)
        step(self, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", note)
        train(models["mixtral"], text, tmp_path / "again", **changes)
    assert first[0] == 5 * saves_until_the_cut
    assert not state.exists()
    expected, found = networks(tmp_path / "undisturbed"), networks(tmp_path / "again")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert training_of(tmp_path / "again") == training_of(tmp_path / "undisturbed")


def test_a_run_that_left_only_a_checkpoint_can_be_continued(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a run directory of the user's own, what was not finished usually goes."""
    step = Training._step

    def cut_off(self: Training, number: int, *arguments: Any) -> None:
        if number == 3:
            raise _CutOff
        step(self, number, *arguments)

    stage = {**SHORT, "scope": "model", "steps": 4, "checkpoint_steps": 2}
    recipe = pruning_recipe(text, stage)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", cut_off)
        with pytest.raises(_CutOff):
            mcsharp_sdk.compress(recipe, models["mixtral"], tmp_path / "out", progress=False)
    assert (tmp_path / ".out.run" / "top_any_router" / "training.safetensors").exists()
    mcsharp_sdk.compress(recipe, models["mixtral"], tmp_path / "out", progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_seed_decides(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    found: list[dict[str, torch.Tensor]] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(found))  # what others draw does not matter
        train(models["mixtral"], text, tmp_path / name, steps=5, seed=seed)
        found.append(networks(tmp_path / name))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


# What goes wrong


@pytest.mark.parametrize("scope", ["block", "model"])
def test_a_loss_that_is_not_finite_is_told_and_leaves_what_is_finished(
    scope: str,
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Training._step

    def overflow(self: Training, number: int, losses: Any) -> None:
        error, keep = losses(1.0, torch.Generator())
        worse = error * float("inf") if number == 3 else error
        step(self, number, lambda *_: StepLosses(worse, keep))

    monkeypatch.setattr(Training, "_step", overflow)
    recipe = pruning_recipe(text, QUANTISE, {**SHORT, "scope": scope})
    with pytest.raises(RunError, match=r"(layer 0|the networks): the loss is inf at step 3.*learn"):
        run(models["mixtral"], recipe, tmp_path)
    finished = read_checked_json(tmp_path / "run" / "finished_stages.json")
    assert len(finished) == 1
    assert (tmp_path / "run" / "quantized_weights" / "summary.json").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_penalty": 0.0, "steps": 5}, "its network keeps all experts of every token"),
        ({"activation_penalty": 1e3}, "its network keeps one expert of every token"),
        ({"learning_rate": 1e-9}, "its network never trained: the share of kept experts went from"),
        ({"learning_rate": 1e-9, "scope": "model", "steps": 8}, "the networks never trained"),
    ],
)
def test_networks_that_did_not_do_their_work_are_named(
    changes: dict[str, Any], message: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    done = train(models["mixtral"], text, tmp_path, **{"learning_rate": 0.05, **changes})
    assert any(message in warning for warning in done.warnings), done.warnings


def test_training_stops_early_where_nothing_gets_better(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    changes = {"activation_penalty": 1e3, "learning_rate": 0.05, "steps": 400, "patience": 20}
    train(models["mixtral"], text, tmp_path, **changes)
    assert all(40 <= curve.steps < 400 for curve in training_of(tmp_path).curves.values())


# Settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"activation_penalty": 0.1, "target_activation": 0.8}, "and not both"),
        ({"target_activation": None}, "give either target_activation or activation_penalty"),
        ({"target_activation": 1.5}, "target_activation"),
        ({"units": 0}, "units"),
        ({"temperature": 0}, "temperature"),
        ({"scope": "token"}, "scope"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TopAnyRouter.model_validate(given)


def test_a_penalty_takes_the_place_of_the_target() -> None:
    assert TopAnyRouter().target_activation == 0.8
    penalised = TopAnyRouter(activation_penalty=0.1)
    assert penalised.target_activation is None
    assert TopAnyRouter.model_validate(penalised.model_dump()) == penalised


def test_what_does_not_fit_the_model_is_told() -> None:
    def blocks(top_k: int) -> dict[int, MoeBlock]:
        return {0: MoeBlock(0, "mlp.experts", "mlp.gate", 8, top_k)}

    (problem,) = TopAnyRouter().check_blocks(blocks(1))
    assert "one expert in this model" in problem.message
    (problem,) = TopAnyRouter(target_activation=0.3).check_blocks(blocks(2))
    assert (problem.where, "the least is 0.5" in problem.message) == ("target_activation", True)
    assert TopAnyRouter(target_activation=0.3).check_blocks(blocks(6)) == []


@pytest.mark.parametrize(
    ("schedule", "middle"), [("constant", 4.0), ("linear", 2.5), ("exponential", 2.0)]
)
def test_temperatures_go_from_the_first_to_the_last(schedule: Any, middle: float) -> None:
    stage = TopAnyRouter(
        temperature_schedule=schedule, temperature=4.0, final_temperature=1.0, steps=11
    )
    last = 4.0 if schedule == "constant" else 1.0
    found = [temperature_at(stage, step) for step in (0, 5, 10)]
    assert found == pytest.approx([4.0, middle, last])


# Scope model


def test_the_whole_models_loss_is_the_divergence_of_its_predictions(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """The curve's first point, from a model whose experts' weights are changed by hand."""
    train(models["mixtral"], text, tmp_path, scope="model", steps=1, temperature=1.0)
    curve = training_of(tmp_path).curves["model"]
    stage = TopAnyRouter.model_validate({**SHORT, "scope": "model"})
    generator = torch.Generator().manual_seed(seeded(stage.seed, "model", 0))
    tokens = calibration_tokens(text)
    rows = torch.randint(len(tokens), (3,), generator=generator)
    noise = {i: gumbel_noise(torch.empty(3 * 32, 2), generator) for i in range(3)}
    model = load(models["mixtral"])
    with torch.no_grad():
        expected = model(tokens[rows], use_cache=False).logits.double().log_softmax(-1)

    def prune(layer: int, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, index, weights = arguments
        logits = new_network(layer, 64, 2, stage, "cpu")(hidden, weights)
        count = kept_counts(logits + noise[layer])
        alone = (count == 1).unsqueeze(1)
        heaviest = F.one_hot(weights.argmax(1), 2).bool()
        return hidden, index, torch.where(alone, heaviest * weights.sum(1, keepdim=True), weights)

    for layer, experts in experts_of(model).items():
        experts.register_forward_pre_hook(lambda _, a, layer=layer: prune(layer, a))
    with torch.no_grad():
        found = model(tokens[rows], use_cache=False).logits.double().log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert float(divergence) > 0
    assert curve.error[0] == pytest.approx(float(divergence), rel=0.02)


def test_only_networks_are_trained(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    train(models["mixtral"], text, tmp_path, scope="model", steps=2)
    names = {name.partition(".")[2] for name in networks(tmp_path)}
    assert names == {"first.weight", "first.bias", "second.weight", "second.bias"}


def test_a_mask_by_rank_is_hard_and_carries_gradients() -> None:
    logits = torch.zeros(5, 3, requires_grad=True)
    noise = gumbel_noise(logits, torch.Generator().manual_seed(0))
    keep = soft_keep(logits, 1.0, noise=noise)
    assert set(keep.detach().unique().tolist()) <= {0.0, 1.0}
    keep.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
