"""Routers of pruned models and of runs: the same as the loaded model prunes, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mcsharp_exporters.onnx_routers import OnnxRoutersExporter
from mcsharp_exporters.onnx_runner import OnnxRouters
from mcsharp_exporters.router_manifest import read_manifest
from pruned_models import networks, pruning_layout, save_pruned, stock_model
from router_cases import HIDDEN, hidden_states
from tiny_models import save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mcsharp_sdk
from mcsharp_sdk.artifacts import LayerProtection, TokenProtectionRule
from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.engine.context import RunContext
from mcsharp_sdk.engine.progress import ProgressBars
from mcsharp_sdk.engine.run_directory import RunDirectory
from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.models.routing import Routing, route
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.topology import read_topology
from mcsharp_sdk.pruning import TopAnyNetwork, keep_mask, slot_thresholds
from mcsharp_sdk.recipe import Recipe
from mcsharp_sdk.runtime import expert_pruner
from mcsharp_sdk.runtime.pruning_layout import (
    LearnedPruning,
    PruningLayout,
    PruningMode,
    RulePruning,
)

SharedPath = Callable[[str], Path]


def save_model(
    folder: Path, family: str, *, packed: bool = True, layers: slice = slice(None), **rule: Any
) -> Path:
    """A tiny pruned model; ``layers`` are the MoE layers that prune."""
    model, topology = stock_model(family)
    layout = pruning_layout(topology, rule.pop("mode", "both"), **rule)
    assert layout.rule
    assert layout.learned
    chosen = sorted(topology.moe)[layers]
    layout = PruningLayout(
        layout.mode,
        RulePruning(
            layout.rule.metric,
            layout.rule.protect_ratio,
            layout.rule.drop_ratio,
            {layer: layout.rule.thresholds[layer] for layer in chosen},
        ),
        LearnedPruning(layout.learned.units, tuple(chosen)),
    )
    nets = networks(topology, model.config.hidden_size, trained=True)
    return save_pruned(folder, model, topology, layout, nets, packed=packed)


@contextmanager
def protection(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Collects which tokens each layer protects, bool (tokens,), in the order of the layers."""
    seen: list[Tensor] = []
    choose = expert_pruner.most_important

    def recording(importance: Tensor, valid: Tensor, share: float) -> Tensor:
        seen.append(choose(importance, valid, share).reshape(-1))
        return choose(importance, valid, share)

    with monkeypatch.context() as patch:
        patch.setattr(expert_pruner, "most_important", recording)
        yield seen


Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Hidden states, then indices and weights before and after pruning."""


@torch.no_grad()
def pruner_calls(model: Any, tokens: Tensor) -> dict[int, Call]:
    """What each layer's pruner was given and gave in one forward."""
    calls: dict[int, Call] = {}
    hooks = [
        module.pruner.register_forward_hook(
            lambda pruner, given, made: calls.__setitem__(pruner.layer, (*given, *made))
        )
        for module in model.modules()
        if hasattr(module, "pruner")
    ]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def per_expert(indices: Tensor, weights: Tensor, experts: int) -> Tensor:
    """(tokens, experts) float32: the weight that each expert gets, whatever its slot."""
    spread = torch.zeros(len(indices), experts + 1)
    return spread.scatter_add_(1, indices, weights.float())[:, :experts]


def kept_by_onnx(found: Routing, experts: int) -> Tensor:
    """(tokens, experts) float32 of a graph's outputs, going by its keep mask."""
    return per_expert(found.indices.masked_fill(~found.keep, experts), found.weights, experts)


def assert_same_experts(found: Routing, call: Call, experts: int) -> None:
    _, indices, _, pruned, weights = call
    assert torch.equal(found.indices.sort(-1).values, indices.sort(-1).values)
    ours, theirs = kept_by_onnx(found, experts), per_expert(pruned, weights, experts)
    assert torch.equal(ours > 0, theirs > 0)
    assert torch.equal(found.weights > 0, found.keep)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("family", "packed"),
    [
        ("mixtral", True),
        ("qwen2_moe", True),
        ("deepseek_v2", True),
        ("deepseek_v3", True),
        ("deepseek_v3", False),
    ],
)
def test_routers_of_a_folder_prune_as_the_loaded_model_does(
    family: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", family, packed=packed)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(0, 128, (3, 40), generator=torch.Generator().manual_seed(2))
    experts = 8 if "deepseek" in family else 4
    for mode in ("rule", "learned", "both"):
        model.set_expert_pruning(mode)
        with protection(monkeypatch) as protected:
            calls = pruner_calls(model, tokens)
        mcsharp_sdk.export("onnx_routers", folder, tmp_path / mode, pruning=mode)
        routers = OnnxRouters(tmp_path / mode, "cpu")
        assert routers.pruning == mode
        assert routers.layers == tuple(sorted(calls))
        for place, (layer, call) in enumerate(sorted(calls.items())):
            chosen = None if mode == "learned" else protected[place]
            assert chosen is None or chosen.any()
            found = routers(layer, call[0], chosen)
            assert 0.3 < found.keep.float().mean() < 1
            assert_same_experts(found, call, experts)


@pytest.mark.parametrize("mode", ["rule", "both"])
def test_every_layer_of_deepseek_mini_on_real_text(
    mode: PruningMode, shared_path: SharedPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text = shared_path("models/deepseek-mini"), shared_path("data/wikitext2-test.txt")
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = torch.tensor([tokenizer(text.read_text()[:9000])["input_ids"][:1000]])
    topology = read_topology(stock, stock.config)
    nets = networks(topology, stock.config.hidden_size, trained=True)
    top_k = next(iter(topology.moe.values())).top_k
    limits = dict.fromkeys(topology.moe, tuple([0.6, 0.4, 0.35, 0.3, 0.25][: top_k - 1]))
    layout = PruningLayout(
        mode,
        RulePruning("attention", 0.02, 0.0, limits),
        LearnedPruning(nets[min(nets)].first.out_features, tuple(topology.moe)),
    )
    folder = save_pruned(tmp_path / "model", stock, topology, layout, nets, packed=False)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with protection(monkeypatch) as protected:
        calls = pruner_calls(model, tokens)
    mcsharp_sdk.export("onnx_routers", folder, tmp_path / "routers")
    routers = OnnxRouters(tmp_path / "routers", "cpu")
    assert set(calls) == set(topology.moe) == set(routers.layers)
    for place, (layer, call) in enumerate(sorted(calls.items())):
        found = routers(layer, call[0], protected[place])
        assert_same_experts(found, call, topology.moe[layer].num_experts)


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("mode", ["rule", "learned", "both"])
def test_the_token_axis_is_free(tokens: int, mode: PruningMode, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "deepseek_v3")
    mcsharp_sdk.export("onnx_routers", folder, tmp_path / "routers", pruning=mode)
    routers = OnnxRouters(tmp_path / "routers", "cpu")
    for layer in routers.layers:
        found = routers(layer, torch.randn(tokens, HIDDEN))
        assert [t.shape for t in found] == [(tokens, 3)] * 3


def test_layers_that_do_not_prune_keep_everything(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "mixtral", layers=slice(1, 2))
    hidden = torch.randn(200, 64)
    for mode in ("rule", "both"):
        mcsharp_sdk.export("onnx_routers", folder, tmp_path / mode, pruning=mode)
        routers = OnnxRouters(tmp_path / mode, "cpu")
        kept = [
            routers(layer, hidden, torch.zeros(200).bool()).keep.all().item() for layer in range(3)
        ]
        assert kept == [True, False, True]
        prunes = [
            bool(entry.thresholds or entry.network_units)
            for entry in read_manifest(tmp_path / mode).layers
        ]
        assert prunes == [False, True, False]


@pytest.mark.parametrize("mode", ["rule", "learned", "both"])
def test_default_is_the_mode_in_which_the_model_is_loaded(
    mode: PruningMode, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "mixtral", mode=mode)
    made = mcsharp_sdk.export("onnx_routers", folder)
    assert (made["version"], made["pruning"]) == (2, mode)
    on_disk = json.loads((folder / "onnx_routers" / "manifest.json").read_text())
    assert on_disk == json.loads(json.dumps(made))
    first = on_disk["layers"][0]
    assert first["thresholds"] == ([0.8] if mode == "rule" else None)
    assert first["network_units"] == (None if mode == "rule" else 6)
    assert ("protected" in first["inputs"]) == (mode != "learned")


def test_off_gives_the_routers_of_an_unpruned_model(tmp_path: Path) -> None:
    model, topology = stock_model("mixtral")
    pruned = save_model(tmp_path / "pruned", "mixtral")
    plain = save_pruned(tmp_path / "plain", model, topology, None, {}, packed=True)
    mcsharp_sdk.export("onnx_routers", pruned, tmp_path / "one", pruning="off")
    mcsharp_sdk.export("onnx_routers", plain, tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_what_a_router_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "mixtral", mode="rule", metric="drop_insignificant")
    for choice in ("default", "rule"):
        with pytest.raises(InputError, match="'drop_insignificant' drops all experts of whole"):
            mcsharp_sdk.export("onnx_routers", folder, tmp_path / "out", pruning=choice)
    assert mcsharp_sdk.export("onnx_routers", folder, pruning="learned")["pruning"] == "learned"


def test_a_mode_that_the_model_has_no_data_for_is_refused(tmp_path: Path) -> None:
    model, topology = stock_model("mixtral")
    plain = save_pruned(tmp_path / "plain", model, topology, None, {}, packed=False)
    with pytest.raises(InputError, match="neither a pruning rule"):
        mcsharp_sdk.export("onnx_routers", plain, tmp_path / "out", pruning="learned")
    rule = RulePruning("none", 0.0, 0.0, dict.fromkeys(topology.moe, (0.5,)))
    ruled = save_pruned(
        tmp_path / "rule", model, topology, PruningLayout("rule", rule), {}, packed=False
    )
    with pytest.raises(InputError, match=r"no learned pruning \(stage TopAnyRouter\).*off, rule"):
        mcsharp_sdk.export("onnx_routers", ruled, tmp_path / "out", pruning="both")
    assert not (tmp_path / "out").exists()


def exported(context: RunContext, output: Path, **settings: Any) -> OnnxRouters:
    exporter = OnnxRoutersExporter.model_validate({"type": "onnx_routers", **settings})
    exporter.run(context, output)
    return OnnxRouters(output / exporter.folder, "cpu")


def test_the_exporter_takes_what_the_stages_of_the_run_made(tmp_path: Path) -> None:
    source = SourceModel(save_tiny_model(tmp_path / "model", "mixtral"))
    routers, hidden = list(source.routers()), hidden_states(300)
    weights = route(routers[1], hidden).weights
    with RunDirectory(tmp_path / "run", {}) as directory, ProgressBars(False) as bars:
        recipe: Any = None
        context = RunContext(source, recipe, CalibrationSet((), ()), directory, bars)
        assert exported(context, tmp_path / "0").pruning == "off"
        with pytest.raises(InputError, match="neither a pruning rule"):
            exported(context, tmp_path / "no", pruning="rule")

        limits = tuple(slot_thresholds(weights, 0.6))
        layers = [LayerProtection(r.layer, limits, 0.1, 0.5, r.layer == 1) for r in routers]
        directory.write(TokenProtectionRule("none", 0.0, 0.0, tuple(layers)))
        ruled = exported(context, tmp_path / "1")
        assert ruled.pruning == "rule"
        assert 0.65 < ruled(1, hidden).keep.float().mean() < 0.75
        assert ruled(0, hidden).keep.all()

        net = TopAnyNetwork(HIDDEN, 2, 5)
        torch.nn.init.normal_(net.second.weight)
        store = directory.layers("top_any_router")
        for router in routers:
            store.write(router.layer, dict(net.state_dict()), {})
        store.write_summary({"units": 5, "layers": [r.layer for r in routers]})
        both = exported(context, tmp_path / "2")
        assert both.pruning == "both"
        with torch.no_grad():
            expected = keep_mask(net(hidden, weights), weights)
        assert torch.equal(both(1, hidden).keep, expected)
        assert exported(context, tmp_path / "3", pruning="learned").pruning == "learned"
        off = exported(context, tmp_path / "4", pruning=False)  # as YAML reads a plain "off"
        assert off.pruning == "off"
        assert off(1, hidden).keep.all()


@pytest.mark.parametrize(
    ("stage", "pruning", "expected"),
    [
        ("{type: GPTQQuantize, bits: 2}", "rule", "needs the token protection"),
        ("{type: GPTQQuantize, bits: 2}", "learned", "needs the top any router"),
        ("{type: TokenProtection}", "both", "needs the top any router"),
        ("{type: TokenProtection, metric: drop_insignificant}", "rule", "which no router knows"),
        ("{type: TokenProtection, metric: drop_insignificant}", "default", "which no router knows"),
        (
            "{type: TokenProtection, metric: drop_insignificant}\n  - {type: TopAnyRouter}",
            "both",
            "which no router knows",
        ),
    ],
)
def test_pruning_that_routers_will_not_have_is_told_with_the_recipe(
    stage: str, pruning: str, expected: str
) -> None:
    recipe = (
        f"version: 1\ncalibration: {{source: embedded}}\nstages:\n  - {stage}\n"
        f"exports:\n  - {{type: onnx_routers, pruning: {pruning}}}\n"
    )
    with pytest.raises(InputProblems, match=rf"recipe.yaml:\d: exports.*{expected}"):
        Recipe.from_text(recipe)


def test_tokens_may_be_dropped_where_the_routers_prune_otherwise() -> None:
    stages = [{"type": "TokenProtection", "metric": "drop_insignificant"}]
    networks = [{"type": "TopAnyRouter"}]
    for more, pruning in (([], "off"), (networks, "default"), (networks, "learned")):
        Recipe.from_dict(
            {
                "version": 1,
                "calibration": {"source": "embedded"},
                "stages": [*stages, *more],
                "exports": [{"type": "onnx_routers", "pruning": pruning}],
            }
        )
