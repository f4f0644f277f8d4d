"""Routers of every family against what the stock modules decide, bit for bit."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from stock_models import StockBlock, stir, watched_blocks
from tiny_models import tiny_model
from torch import Tensor, nn

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.router_settings import (
    REFUSED_FAMILIES,
    ROUTER_FAMILIES,
    TENSOR_NAMES,
    router_settings,
)
from mcsharp_sdk.models.routing import Router, read_router, route, router_from_tensors

SUMMED_IN_ANOTHER_ORDER = {"minimax_m2", "deepseek_v3", "glm4_moe", "dots1", "nemotron_h"}
"""Families whose top-k is not sorted: the sum that weights are divided by may differ in a bit."""

OF_VISION_MODELS = {"qwen3_vl_moe_text", "glm4v_moe_text", "ernie4_5_vl_moe_text", "aria_text"}


def router_of(model: nn.Module, block: StockBlock) -> Router:
    """The stock router as mcsharp_sdk reads it."""
    if (layer := getattr(block.router, "layer", None)) is not None:  # dbrx
        return router_from_tensors({"weight": layer.weight}, model.config, block.layer)
    owner = next(m for m in model.modules() if block.router in m.children())
    return read_router(block.router, model.config, block.layer, owner)


def dense(router: Router, indices: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros(len(indices), router.experts).scatter_(1, indices, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_route_decides_as_the_stock_module(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, initializer_range=0.1)
    stir(model)
    model = model.to(dtype).eval()
    blocks = watched_blocks(model)
    with torch.no_grad():
        model(torch.randint(0, 128, (4, 100), generator=torch.Generator().manual_seed(0)))
    assert blocks
    for block in blocks:
        assert block.hidden is not None
        router = router_of(model, block)
        found = route(router, block.hidden)
        expected = block.routing.float()
        ours = dense(router, found.indices, found.weights)
        assert torch.equal(ours != 0, expected != 0)
        tolerance = 3e-7 if family in SUMMED_IN_ANOTHER_ORDER else 0.0
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=0)


def test_every_known_family_is_tested() -> None:
    tested = {row.model_type or name for name, row in FAMILIES.items()}
    assert set(ROUTER_FAMILIES) == tested | OF_VISION_MODELS
    assert not set(REFUSED_FAMILIES) & set(ROUTER_FAMILIES)


def test_names_that_stand_for_others_are_met() -> None:
    met: set[str] = set()
    for family in ("hunyuan_v1_moe", "ernie4_5_moe"):
        model = tiny_model(family)
        met |= {n for block in watched_blocks(model) for n, _ in block.router.named_parameters()}
    assert set(TENSOR_NAMES) <= met


def test_a_routing_that_cannot_be_described_is_refused_with_the_reason() -> None:
    from transformers import AutoConfig

    with pytest.raises(InputError, match=r"'deepseek_v4' cannot be described: .*token's number"):
        router_settings(AutoConfig.for_model("deepseek_v4"), 0)
