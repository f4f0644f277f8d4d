"""Packed modules under ``torch.compile``: one graph, with the results of the modules themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pruned_models import networks, pruning_layout, save_pruned, stock_model
from test_load import compress_tiny, load, logits, tokens
from transformers import CompileConfig

from mcsharp_sdk.runtime import operators
from mcsharp_sdk.runtime.modules import ExpertBucket, PackedExpertsMixin, PackedLinear

NEW_TOKENS = 6


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress_tiny(tmp_path_factory.mktemp("mixtral"), "mixtral")


def compiled(model: Any) -> Any:
    """One graph or an error; what operators are said to give is checked against what they do."""
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def test_a_model_is_one_graph_with_the_same_logits(mixtral: Path) -> None:
    model = load(mixtral)
    torch.testing.assert_close(logits(compiled(model)), logits(model))


@pytest.mark.parametrize(
    ("widths", "settings"),
    [((0, 2, 3, 2), {}), ((2, 3), {"rotation": "hadamard"})],
    ids=["removed experts", "rotated experts"],
)
def test_so_is_one_with(widths: tuple[int, ...], settings: dict[str, Any], tmp_path: Path) -> None:
    model = load(compress_tiny(tmp_path, "mixtral", torch.bfloat16, widths, **settings))
    torch.testing.assert_close(logits(compiled(model)), logits(model))


@pytest.mark.parametrize(
    ("mode", "metric"), [("rule", "attention"), ("learned", "none"), ("both", "kurtosis")]
)
def test_so_is_one_that_prunes(mode: str, metric: str, tmp_path: Path) -> None:
    stock, topology = stock_model("mixtral")
    layout = pruning_layout(topology, mode, metric)
    nets = networks(topology, stock.config.hidden_size, trained=True)
    model = load(save_pruned(tmp_path, stock, topology, layout, nets, packed=True))
    torch.testing.assert_close(logits(compiled(model)), logits(model))


def test_generation_with_a_static_cache_is_compiled(mixtral: Path) -> None:
    model = load(mixtral)
    expected = model.generate(tokens(), max_new_tokens=NEW_TOKENS, do_sample=False)
    how: Any = CompileConfig(backend="aot_eager", fullgraph=True)
    how.mode = None  # of inductor
    how._compile_all_devices = True  # else transformers compiles on accelerators alone
    torch._dynamo.utils.counters.clear()
    found = model.generate(
        tokens(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation="static",
        compile_config=how,
    )
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_copy_of_a_model_is_compiled_with_its_own_experts(mixtral: Path) -> None:
    model = load(mixtral)
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, ExpertBucket):
            module.get_parameter("down_scales").zero_()
    expected = logits(other)
    assert not torch.allclose(expected, logits(model))
    torch.testing.assert_close(logits(compiled(other)), expected)
    torch.testing.assert_close(logits(compiled(model)), logits(model))


def packed_experts(model: Any) -> Any:
    return next(m for m in model.modules() if isinstance(m, PackedExpertsMixin))


def test_a_gradient_goes_through_what_is_compiled(mixtral: Path) -> None:
    experts = packed_experts(load(mixtral))
    hidden = torch.randn(5, 64, requires_grad=True)
    chosen, weights = torch.tensor([[0, 1]] * 5), torch.rand(5, 2)

    def gradient(run: Any) -> torch.Tensor:
        return torch.autograd.grad(run(hidden, chosen, weights).square().sum(), hidden)[0]

    found = gradient(torch.compile(experts, backend="eager"))
    torch.testing.assert_close(found, gradient(experts))


def test_operators_do_what_they_say_of_themselves(mixtral: Path) -> None:
    model = load(mixtral)
    linear = next(m for m in model.modules() if isinstance(m, PackedLinear))
    packed = (linear.qweight, linear.scales, linear.zeros)
    x = torch.randn(2, 3, linear.in_features)
    sizes = (linear.bits, linear.group_size, linear.in_features)
    torch.library.opcheck(operators.linear, (x, *packed, *sizes))
    given = (torch.randn(5, 64), torch.tensor([[0, 1]] * 5), torch.rand(5, 2))
    torch.library.opcheck(operators.experts, (*given, packed_experts(model).operator_number))
    given = (torch.randn(64, 5).T, *given[1:])
    torch.library.opcheck(operators.experts, (*given, packed_experts(model).operator_number))
