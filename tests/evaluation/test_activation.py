"""Counts of activated experts against a recount of what the routers chose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_vision_models import vision_config
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
)
from vision_runs import named_blocks

from mcsharp_sdk.evaluation.activation import watch_experts

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, "gate"),
    "qwen3_moe": ({"num_experts": 8, "num_experts_per_tok": 3}, "gate"),
    "deepseek_v2": (
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
        "gate",
    ),
}


def build(family: str) -> Any:
    torch.manual_seed(0)
    extra, _ = FAMILIES[family]
    config = AutoConfig.for_model(family, **SHAPE, **extra, num_hidden_layers=3)
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()


def routers(model: Any, name: str) -> dict[int, nn.Module]:
    layers = enumerate(model.model.layers)
    return {i: getattr(m.mlp, name) for i, m in layers if hasattr(m.mlp, name)}


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_counts_equal_what_the_routers_chose(family: str, tokens: Tensor) -> None:
    model = build(family)
    chosen: dict[int, list[Tensor]] = {}
    for layer, router in routers(model, FAMILIES[family][1]).items():
        chosen[layer] = []
        router.register_forward_hook(lambda _m, _a, out, c=chosen[layer]: c.append(out[2]))
    with watch_experts(model) as activity:
        model(input_ids=tokens)
        model(input_ids=tokens[:1])
    assert activity.ratio == 1.0
    assert set(activity.layers) == set(chosen)
    assert chosen
    for layer, seen in activity.layers.items():
        indices = torch.cat(chosen[layer])
        recount = [(indices == e).any(1).double().mean().item() for e in range(len(seen.activated))]
        assert seen.frequency == pytest.approx(recount)
        assert seen.ratio == 1.0
        assert seen.tokens == 90


@torch.no_grad()
def test_experts_of_image_tokens_are_not_counted() -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        vision_config("ernie4_5_vl_moe"), experts_implementation="eager"
    ).eval()
    blocks = [block for name, block in named_blocks(model) if "text_moe" in name]
    with watch_experts(model) as activity:
        model(input_ids=torch.arange(100)[None])
    assert set(activity.layers) == {block.layer for block in blocks} == {1, 2}
    for block in blocks:
        recount = torch.bincount(block.arguments[1].flatten(), minlength=4)
        assert torch.equal(activity.layers[block.layer].activated, recount)
        assert (activity.layers[block.layer].slots, int(recount.sum())) == (200, 200)


@torch.no_grad()
def test_slots_of_removed_experts_are_not_activated(tokens: Tensor) -> None:
    model = build("mixtral")
    with watch_experts(model) as everything:
        model(input_ids=tokens)
    for layer in model.model.layers:
        layer.mlp.experts.removed = (1, 3)
    with watch_experts(model) as activity:
        model(input_ids=tokens)
    for layer, seen in activity.layers.items():
        assert seen.activated.tolist()[1::2] == [0, 0]
        assert torch.equal(seen.activated[::2], everything.layers[layer].activated[::2])
    assert 0 < activity.ratio < 1


@pytest.mark.parametrize("marker", ["index", "weight", "both"])
@torch.no_grad()
def test_dropped_slots_are_not_activated(marker: str, tokens: Tensor) -> None:
    model = build("mixtral")
    dropped = torch.rand(60, generator=torch.Generator().manual_seed(5)) < 0.3

    def drop(_module: nn.Module, _args: Any, out: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, index = out
        if marker != "index":
            weights[dropped, 1] = 0
        if marker != "weight":
            index[dropped, 1] = 4
        return logits, weights, index

    routers(model, "gate")[1].register_forward_hook(drop)
    with watch_experts(model) as activity:
        model(input_ids=tokens)
    lost = int(dropped.sum())
    assert 0 < lost < 60
    assert activity.layers[0].ratio == 1.0
    assert activity.layers[1].ratio == pytest.approx(1 - lost / 120)
    assert activity.ratio == pytest.approx(1 - lost / 360)
    assert sum(activity.layers[1].frequency) == pytest.approx(2 - lost / 60)


@torch.no_grad()
def test_nothing_is_counted_outside_the_context(tokens: Tensor) -> None:
    model = build("mixtral")
    with watch_experts(model) as activity:
        pass
    model(input_ids=tokens)
    assert activity.ratio == 1.0
    assert all(seen.tokens == 0 and seen.ratio == 1.0 for seen in activity.layers.values())


def test_a_dense_model_has_no_activity() -> None:
    config = LlamaConfig(**{k: v for k, v in SHAPE.items() if k != "moe_intermediate_size"})
    config.num_hidden_layers = 1
    with watch_experts(LlamaForCausalLM(config)) as activity:
        pass
    assert activity.layers == {}
    assert activity.ratio == 1.0
