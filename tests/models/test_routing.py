"""Routing against the transformers modules themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from router_cases import (
    CASES,
    EXPERTS,
    HIDDEN,
    LAYER,
    TOP_K,
    hidden_states,
    router_case,
    router_module,
)
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.router_settings import RouterSettings, router_settings
from mcsharp_sdk.models.routing import (
    Router,
    Routing,
    read_router,
    route,
    router_from_tensors,
    router_scores,
)


def by_expert(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights with the slots in the order of the experts' indices."""
    indices, order = routing.indices.sort(dim=-1)
    return indices, routing.weights.gather(1, order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_route_equals_the_transformers_module(case: str, dtype: torch.dtype) -> None:
    module, config = router_module(case)
    module = module.to(dtype)
    hidden = hidden_states(1000, dtype)
    with torch.no_grad():
        _, weights, indices = module(hidden)
    ours = route(read_router(module, config, LAYER), hidden)
    expected = by_expert(Routing(indices, weights.float(), torch.empty(0)))
    found = by_expert(ours)
    assert torch.equal(found[0], expected[0])
    # DeepSeek-V3 sums the weights in an order of its own before it divides by the sum.
    tolerance = 3e-7 if case.startswith("deepseek_v3") else 0
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=0)
    assert ours.weights.dtype == torch.float32
    assert ours.indices.dtype == torch.int64
    assert ours.keep.all()


def test_choosing_before_scoring_equals_the_gpt_oss_module() -> None:
    config = SimpleNamespace(
        num_experts_per_tok=TOP_K, num_local_experts=EXPERTS, hidden_size=HIDDEN
    )
    module = GptOssTopKRouter(config)
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    settings = RouterSettings("gpt_oss", EXPERTS, TOP_K, score_chosen_only=True, logit_bias=True)
    router = Router(0, settings, module.weight.detach(), module.bias.detach())
    hidden = hidden_states(200)
    with torch.no_grad():
        _, weights, indices = module(hidden)
    ours = route(router, hidden)
    assert torch.equal(ours.indices, indices)
    assert torch.equal(ours.weights, weights)


def test_chosen_experts_lie_in_the_kept_groups_though_better_ones_lie_outside() -> None:
    router = router_case("deepseek_v3")
    routing = route(router, hidden_states(500))
    groups = routing.indices // (EXPERTS // router.settings.groups)
    assert all(len(set(row)) <= router.settings.kept_groups for row in groups.tolist())
    assert router.correction_bias is not None
    preference = router_scores(router, hidden_states(500)) + router.correction_bias
    free = preference.topk(TOP_K).indices
    assert not torch.equal(free.sort().values, routing.indices.sort().values)


def test_slots_stand_in_falling_order_of_the_choice() -> None:
    weights = route(router_case("olmoe"), hidden_states(100)).weights
    assert (weights.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    routing = route(router_case("deepseek_v3"), hidden_states(tokens))
    assert [t.shape for t in routing] == [(tokens, TOP_K)] * 3


def test_settings_are_known_from_the_config_alone() -> None:
    config = AutoConfig.for_model("deepseek_v3")
    settings = router_settings(config, 0)
    assert (settings.experts, settings.top_k) == (256, 8)
    assert (settings.groups, settings.kept_groups, settings.group_score) == (8, 4, "top2_sum")
    assert (settings.scoring, settings.scale, settings.epsilon) == ("sigmoid", 2.5, 1e-20)
    assert settings.tensors == ("weight", "e_score_correction_bias")


def test_an_unknown_family_is_named_with_those_that_are_known() -> None:
    with pytest.raises(
        InputError, match=r"'llama' is not known; known are .*deepseek_v2, .* qwen3_moe"
    ):
        router_settings(AutoConfig.for_model("llama"), 0)


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc", "num_experts_per_tok": 2}, "topk_method"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "cannot use None of 64 experts"),
        ("mixtral", {"num_experts_per_tok": 9}, "cannot use 9 of 8 experts"),
        ("deepseek_v3", {"n_group": 7}, "cannot be cut into 7 groups"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 5}, "of which 5 are kept"),
        ("deepseek_v3", {"n_group": 64, "topk_group": 1}, "hold fewer than 8 experts"),
        ("deepseek_v3", {"n_group": 256, "topk_group": 8}, "no best two"),
    ],
)
def test_contradicting_settings_are_refused(
    model_type: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        router_settings(AutoConfig.for_model(model_type, **settings), 0)


def test_missing_and_left_over_tensors_are_named() -> None:
    module, config = router_module("deepseek_v3")
    weight = module.get_parameter("weight")
    with pytest.raises(InputError, match=r"has tensors \['weight'\].*e_score_correction_bias"):
        router_from_tensors({"weight": weight}, config, 5)
    other, mixtral = router_module("mixtral")
    weight = other.get_parameter("weight")
    with pytest.raises(InputError, match="bias"):
        router_from_tensors({"weight": weight, "bias": weight[:, 0]}, mixtral, 5)


def test_wrong_shapes_are_refused() -> None:
    settings = RouterSettings("deepseek_v3", 8, 2, correction_bias=True)
    with pytest.raises(InputError, match=r"layer 3.*\[7, 4\], expected \[8, hidden\]"):
        Router(3, settings, torch.zeros(7, 4))
    with pytest.raises(InputError, match=r"e_score_correction_bias has shape \[7\]"):
        Router(3, settings, torch.zeros(8, 4), correction_bias=torch.zeros(7))
    router = Router(3, settings, torch.zeros(8, 4), correction_bias=torch.zeros(8))
    with pytest.raises(InputError, match=r"\[tokens, 4\], got torch.float32 \[2, 5\]"):
        route(router, torch.zeros(2, 5))
    with pytest.raises(InputError, match=r"got torch.int64"):
        route(router, torch.zeros(2, 4, dtype=torch.int64))
