"""Routers that prune, as graphs: the same masks and weights as the torch functions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mcsharp_exporters.graph_names import ROUTER_OUTPUTS, DtypeName
from mcsharp_exporters.graph_nodes import DTYPES
from mcsharp_exporters.pruning_graph import LayerPruning
from mcsharp_exporters.router_graph import router_graph
from router_cases import CASES, HIDDEN, LAYER, TOP_K, hidden_states, router_case
from torch import Tensor

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.router_settings import RouterSettings
from mcsharp_sdk.models.routing import Router, Routing, route, router_scores
from mcsharp_sdk.pruning import TopAnyNetwork, keep_mask, renormalise, slot_thresholds, weight_rule
from mcsharp_sdk.pruning.rule import ranked
from mcsharp_sdk.runtime.pruning_modes import PruningMode

UNITS = 16
UNSORTED = ("deepseek_v3", "deepseek_v3-one-group", "deepseek_v3-no-norm")


def thresholds(k: int) -> tuple[float, ...]:
    """Some drop much, some little."""
    return tuple(np.linspace(0.85, 0.35, k - 1).tolist())


def network(router: Router, seed: int = 0) -> TopAnyNetwork:
    """One that keeps each count of experts now and then."""
    generator = torch.Generator().manual_seed(seed)
    made = TopAnyNetwork(router.hidden_size, router.top_k, UNITS)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    return made.requires_grad_(False)


def layer_pruning(mode: PruningMode, router: Router, net: TopAnyNetwork) -> LayerPruning:
    return LayerPruning(
        mode,
        thresholds(router.top_k) if mode == "rule" else None,
        net.state_dict() if mode in ("learned", "both") else None,
    )


def run(graph: onnx.ModelProto, hidden: Tensor, protected: Tensor | None = None) -> Routing:
    ort = onnxruntime.OrtValue
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    if hidden.dtype == torch.float32:
        inputs = {"hidden_states": ort.ortvalue_from_numpy(hidden.numpy())}
    else:
        bits = hidden.view(torch.int16).numpy().view(np.uint16)
        kind = graph.graph.input[0].type.tensor_type.elem_type
        inputs = {"hidden_states": ort.ortvalue_from_numpy_with_onnx_type(bits, kind)}
    if protected is not None:
        inputs["protected"] = ort.ortvalue_from_numpy(protected.numpy())
    found = session.run_with_ort_values(list(ROUTER_OUTPUTS), inputs)
    return Routing(*(torch.from_numpy(value.numpy()) for value in found))


def torch_says(
    router: Router, pruning: LayerPruning, net: TopAnyNetwork, hidden: Tensor, protected: Tensor
) -> Routing:
    """The same with the torch functions."""
    indices, weights, keep = route(router, hidden)
    if pruning.network is not None:
        keep = keep_mask(net(hidden, weights), weights)
    elif pruning.thresholds is not None:
        keep = weight_rule(weights, pruning.thresholds)
    if pruning.mode in ("rule", "both"):
        keep = keep | protected.unsqueeze(-1)
    return Routing(indices, renormalise(weights, keep), keep)


def is_clear(router: Router, pruning: LayerPruning, net: TopAnyNetwork, hidden: Tensor) -> Tensor:
    """Tokens for which what to drop does not hang on the last bits of a weight or a logit."""
    weights = route(router, hidden).weights
    if pruning.network is not None:
        logits = net(hidden, weights).sort(descending=True).values
        margins = logits[:, :1] - logits[:, 1:]
    else:
        by_rank = weights.gather(1, ranked(weights))
        least = torch.tensor(pruning.thresholds or ()) * by_rank[:, :1]
        margins = (by_rank[:, 1:] - least).abs() / by_rank[:, :1]
    return (margins > 1e-5).all(-1)


def chooses_clearly(router: Router, hidden: Tensor) -> Tensor:
    """The same of the choice of experts."""
    scores = router_scores(router, hidden)
    if router.correction_bias is not None:
        scores = scores + router.correction_bias
    best = scores.topk(router.top_k + 1).values
    return ((best[:, :-1] - best[:, 1:]) > 1e-6).all(-1)


def assert_same(found: Routing, expected: Routing, clear: Tensor | None = None) -> None:
    """All rows are the same; those that are not ``clear`` may differ, but they are few."""
    if clear is not None:
        assert clear.float().mean() >= 0.998
        found, expected = (Routing(*(t[clear] for t in r)) for r in (found, expected))
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.keep, expected.keep)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-5, atol=0)


def some(tokens: int, seed: int = 3) -> Tensor:
    """A tenth of the tokens, or so."""
    return torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.1


@pytest.mark.parametrize("mode", ["rule", "learned", "both"])
@pytest.mark.parametrize("case", CASES)
def test_fp32_graphs_equal_torch_on_1000_random_tokens(case: str, mode: PruningMode) -> None:
    router = router_case(case)
    net = network(router)
    pruning = layer_pruning(mode, router, net)
    hidden, protected = hidden_states(1000), some(1000)
    graph = router_graph(router, pruning=pruning)
    onnx.checker.check_model(graph, full_check=True)
    found = run(graph, hidden, protected if pruning.takes_protected else None)
    expected = torch_says(router, pruning, net, hidden, protected)
    assert torch.equal(found.indices, expected.indices)
    assert 0.2 < found.keep.float().mean() < 0.95
    assert_same(found, expected, is_clear(router, pruning, net, hidden))


@pytest.mark.parametrize("case", UNSORTED)
def test_slots_of_sigmoid_routers_are_not_sorted_by_weight(case: str) -> None:
    """Or the tests above would not show that ranks are found."""
    weights = route(router_case(case), hidden_states(1000)).weights
    assert not torch.equal(ranked(weights), torch.arange(TOP_K).expand_as(weights))


@pytest.mark.parametrize("mode", ["rule", "learned", "both"])
@pytest.mark.parametrize("k", range(2, 7))
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_any_number_of_experts_per_token(scoring: str, k: int, mode: PruningMode) -> None:
    router = some_router(scoring, k)
    net = network(router, seed=k)
    pruning = layer_pruning(mode, router, net)
    hidden, protected = hidden_states(1000), some(1000)
    given_protected = protected if pruning.takes_protected else None
    found = run(router_graph(router, pruning=pruning), hidden, given_protected)
    expected = torch_says(router, pruning, net, hidden, protected)
    assert torch.equal(found.indices, expected.indices)
    assert_same(found, expected, is_clear(router, pruning, net, hidden))
    assert len(found.keep.sum(-1).unique()) >= k - 1, "it should keep this and that number"


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_slots_at_a_measured_threshold_are_kept(scoring: str) -> None:
    """Of one token every ratio is its own quantile."""
    router = some_router(scoring, k=4)
    unpruned = router_graph(router)
    for token in hidden_states(20).split(1):
        measured = tuple(slot_thresholds(run(unpruned, token).weights, 0.5))
        pruning = LayerPruning("rule", measured, protects=False)
        assert run(router_graph(router, pruning=pruning), token).keep.all()


def some_router(scoring: Any, k: int, experts: int = 12, seed: int = 0) -> Router:
    generator = torch.Generator().manual_seed(seed)
    biased = scoring == "sigmoid"
    return Router(
        0,
        RouterSettings("any", experts, k, scoring, correction_bias=biased, renormalise=True),
        torch.randn(experts, HIDDEN, generator=generator) / 4,
        correction_bias=torch.randn(experts, generator=generator) / 4 if biased else None,
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_graphs_equal_torch_wherever_no_decision_is_a_tie(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 6), label="k")
    router = some_router(data.draw(st.sampled_from(["softmax", "sigmoid"])), k)
    modes: list[PruningMode] = ["rule", "learned", "both"]
    mode = data.draw(st.sampled_from(modes), label="mode")
    seed = data.draw(st.integers(0, 1000), label="seed")
    limits = data.draw(st.tuples(*[st.floats(0, 1) for _ in range(k - 1)]), label="thresholds")
    net = network(router, seed)
    pruning = replace(
        layer_pruning(mode, router, net), thresholds=limits if mode == "rule" else None
    )
    tokens = data.draw(st.sampled_from([0, 1, 2, 50]), label="tokens")
    hidden = 3 * hidden_states(tokens, seed=seed + 1)
    protected = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)), dtype=torch.bool
    )
    graph = router_graph(router, pruning=pruning)
    found = run(graph, hidden, protected if pruning.takes_protected else None)
    expected = torch_says(router, pruning, net, hidden, protected)
    assert [t.shape for t in found] == [(tokens, k)] * 3
    clear = chooses_clearly(router, hidden) & is_clear(router, pruning, net, hidden)
    assert_same(Routing(*(t[clear] for t in found)), Routing(*(t[clear] for t in expected)))
    assert torch.equal(found.weights == 0, ~found.keep)
    assert found.keep[protected].all() or mode == "learned"


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3"])
def test_what_keeps_everything_changes_no_bit(case: str) -> None:
    router = router_case(case)
    hidden, none, all_ = hidden_states(500), torch.zeros(500).bool(), torch.ones(500).bool()
    plain = run(router_graph(router), hidden)
    new = TopAnyNetwork(HIDDEN, TOP_K, UNITS).state_dict()
    prunings = {
        "thresholds of zero": (LayerPruning("rule", (0.0,) * (TOP_K - 1)), none),
        "all tokens protected": (LayerPruning("rule", (1.0,) * (TOP_K - 1)), all_),
        "a new network": (LayerPruning("both", network=new), none),
        "a layer that the rule leaves alone": (LayerPruning("rule"), none),
        "a layer without a network": (LayerPruning("both"), none),
    }
    for what, (pruning, protected) in prunings.items():
        found = run(router_graph(router, pruning=pruning), hidden, protected)
        assert all(map(torch.equal, found, plain)), what


def test_the_sum_of_a_token_s_weights_stays() -> None:
    router = router_case("deepseek_v3")
    hidden = hidden_states(1000)
    before = route(router, hidden).weights.sum(-1)
    pruning = LayerPruning("rule", thresholds(TOP_K))
    found = run(router_graph(router, pruning=pruning), hidden, torch.zeros(1000).bool())
    torch.testing.assert_close(found.weights.sum(-1), before)


def test_of_equal_weights_the_first_slots_are_kept() -> None:
    router = Router(0, RouterSettings("any", 6, 4, correction_bias=True), torch.ones(6, 8))
    router = replace(router, correction_bias=torch.zeros(6))
    net = TopAnyNetwork(8, 4, 2)
    net.second.bias.data = torch.tensor([0.0, 1.0, 1.0, 0.0])  # two and three experts tie
    pruning = LayerPruning("learned", network=net.state_dict())
    found = run(router_graph(router, pruning=pruning), torch.randn(5, 8))
    assert found.keep.tolist() == [[True, True, False, False]] * 5


def test_weights_that_are_all_zero_stay_so() -> None:
    """Sigmoids of very small logits vanish in float32."""
    router = Router(0, RouterSettings("any", 4, 2, "sigmoid"), torch.full((4, 8), -100.0))
    found = run(
        router_graph(router, pruning=LayerPruning("rule", (0.5,))),
        torch.ones(3, 8),
        torch.tensor([True, False, False]),
    )
    assert torch.equal(found.weights, torch.zeros(3, 2))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("case", ["mixtral", "deepseek_v2-groups", "deepseek_v3"])
@pytest.mark.parametrize("mode", ["rule", "both"])
def test_half_precision_graphs_equal_torch_with_the_stored_weights(
    case: str, dtype: DtypeName, mode: PruningMode
) -> None:
    half = DTYPES[dtype].torch
    router = router_case(case)
    router = replace(router, weight=router.weight.to(half).float())
    net = network(router)
    pruning = layer_pruning(mode, router, net)
    hidden, protected = hidden_states(1000, half), some(1000)
    graph = router_graph(router, dtype, pruning)
    onnx.checker.check_model(graph, full_check=True)
    found = run(graph, hidden, protected)
    expected = torch_says(router, pruning, net, hidden.float(), protected)
    same = (found.indices == expected.indices).all(-1) & (found.keep == expected.keep).all(-1)
    assert same.float().mean() >= 0.999
    torch.testing.assert_close(found.weights[same], expected.weights[same], rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["off", "rule", "learned", "both"])
def test_the_metadata_say_how_the_graph_prunes(mode: PruningMode) -> None:
    router = router_case("mixtral")
    graph = router_graph(router, pruning=layer_pruning(mode, router, network(router)))
    facts = {p.key: p.value for p in graph.metadata_props}
    assert (facts["pruning"], json.loads(facts["format_version"])) == (mode, 2)
    expected = list(thresholds(TOP_K)) if mode == "rule" else None
    assert json.loads(facts["thresholds"]) == expected
    assert json.loads(facts["network_units"]) == (UNITS if mode in ("learned", "both") else None)
    inputs = [value.name for value in graph.graph.input]
    assert ("protected" in inputs) == (mode in ("rule", "both"))


def test_a_graph_that_prunes_nothing_has_no_more_nodes_than_before() -> None:
    operators = [node.op_type for node in router_graph(router_case("mixtral")).graph.node]
    assert operators[:2] == ["MatMul", "Softmax"]
    assert len(operators) == 9


def test_pruning_that_does_not_fit_is_refused() -> None:
    router = router_case("mixtral")
    net = dict(network(router).state_dict())
    faults = {
        "2 thresholds, but 4 experts per token need 3": LayerPruning("rule", (0.1, 0.2)),
        "its network has": LayerPruning("learned", network={**net, "first.bias": torch.ones(3)}),
        "expected": LayerPruning("learned", network={"first.weight": net["first.weight"]}),
        "second.bias of its network is not finite": LayerPruning(
            "learned", network={**net, "second.bias": net["second.bias"] / 0}
        ),
    }
    for message, pruning in faults.items():
        with pytest.raises(InputError, match=f"pruning of layer {LAYER}.*{message}"):
            router_graph(router, pruning=pruning)
