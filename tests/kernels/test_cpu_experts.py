"""All experts of a layer at once on a CPU: against float64, and when it is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from expert_stacks import random_layer, relative_error, silu_layer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_layers import BITS, packed_experts, routed
from torch import Tensor

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.kernels import Case, cpu_experts, crossovers, support, threads
from mcsharp_sdk.kernels.cpu_experts import run_experts
from mcsharp_sdk.kernels.expert_layer import ExpertLayer, PerSlot
from mcsharp_sdk.quantization.grid import WIDTHS
from mcsharp_sdk.runtime.modules import ExpertBucket
from mcsharp_sdk.runtime.whole_layers import whole_layer

pytestmark = pytest.mark.skipif(
    bool(support.missing_support()), reason=support.missing_support() or "kernels can be compiled"
)


COMPILED_WIDTHS = [bits for bits in WIDTHS if bits < 8 or support.has_vnni()]


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCSHARP_CROSSOVERS", "off")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    bits=st.lists(st.sampled_from(COMPILED_WIDTHS), min_size=4, max_size=4),
    hidden=st.sampled_from([33, 64, 192, 256, 300]),
    intermediate=st.sampled_from([32, 72, 128, 160]),
    group=st.sampled_from([32, 64, 128, 256]),
    tokens=st.integers(1, 9),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_a_layer_agrees_with_float64(
    bits: list[int], hidden: int, intermediate: int, group: int, tokens: int, dtype: torch.dtype
) -> None:
    layer, gate_up, down = random_layer(bits, hidden, intermediate, group)
    x, chosen, routing = routed(tokens, hidden)
    x = x.to(dtype)
    out = run_experts(layer, x, chosen, routing)
    assert out.shape == x.shape
    assert out.dtype == dtype
    expected = silu_layer(x, chosen, routing, gate_up, down)
    assert relative_error(out, expected) < 2e-4 + torch.finfo(dtype).eps


@pytest.fixture
def _unset_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_unset_memory_is_nan")
def test_dropped_slots_leave_nothing_behind() -> None:
    assert torch.empty(1).isnan()
    layer, gate_up, down = random_layer(BITS, 64, 32, 32)
    x, _, routing = routed(3, 64)
    dropped = len(BITS)
    chosen = torch.tensor([[dropped, 1], [2, dropped], [dropped, dropped]])
    out = run_experts(layer, x, chosen, routing)
    assert relative_error(out, silu_layer(x, chosen, routing, gate_up, down)) < 2e-3
    assert not out[2].any()
    assert not run_experts(layer, x, torch.full_like(chosen, dropped), routing).any()


def test_a_weight_that_is_no_number_counts_only_where_its_expert_does() -> None:
    layer, _, _ = random_layer(BITS, 64, 32, 32)
    x, _, routing = routed(2, 64)
    chosen = torch.tensor([[len(BITS), 1], [2, 0]])
    expected = run_experts(layer, x, chosen, routing)
    routing[0, 0] = float("nan")
    assert torch.equal(run_experts(layer, x, chosen, routing), expected)


def test_sums_stay_exact_under_autocast() -> None:
    layer, _, _ = random_layer(BITS, 64, 32, 32)
    given = routed(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = run_experts(layer, *given)
    assert torch.equal(found, run_experts(layer, *given))


def test_the_default_dtype_does_not_matter() -> None:
    layer, _, _ = random_layer(BITS, 64, 32, 32)
    given = routed(3, 64)
    expected = run_experts(layer, *given)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(run_experts(layer, *given), expected)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("family", "rotated"), [("mixtral", True), ("llama4", False)])
def test_no_tokens_give_nothing(family: str, rotated: bool) -> None:
    experts = packed_experts(family, rotated=rotated, removed=False).half()
    hidden, chosen, routing = routed_in(experts, 1)
    assert experts(hidden[:0], chosen[:0], routing[:0].half()).shape == (0, hidden.shape[1])


@pytest.mark.parametrize("shares", [2, 3])
def test_threads_share_a_layer(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, _ = random_layer(BITS, 192, 160, 64)
    given = routed(5, 192)
    alone = run_experts(layer, *given)
    monkeypatch.setattr(threads, "SMALL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: shares)
    assert torch.equal(run_experts(layer, *given), alone)


FAMILIES = [
    ("mixtral", False, False),
    ("mixtral", True, False),
    ("mixtral", True, True),
    ("gpt_oss", False, False),
    ("gpt_oss", True, False),
    ("llama4", False, False),
    ("llama4", True, True),
    ("nemotron_h", False, True),
]


@pytest.mark.parametrize(("family", "rotated", "removed"), FAMILIES)
def test_families_run_at_once_as_bucket_by_bucket(
    family: str, rotated: bool, removed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = packed_experts(family, rotated=rotated, removed=removed)
    for tokens in (1, 5):
        hidden, chosen, routing = routed_in(experts, tokens)
        expected = experts.float()(hidden.float(), chosen, routing)
        met: list[Tensor] = []

        def noted(
            layer: ExpertLayer, hidden: Tensor, *others: Any, met: Any = met, **n: Any
        ) -> Tensor:
            met.append(hidden)
            return run_experts(layer, hidden, *others, **n)

        monkeypatch.setattr(cpu_experts, "run_experts", noted)
        found = experts.half()(hidden, chosen, routing.half())
        monkeypatch.undo()
        assert relative_error(found, expected.double()) < 4e-3
        assert len(met) == 1


@pytest.mark.skipif(not support.has_wide_vnni(), reason="needs AVX-512 VNNI")
@pytest.mark.parametrize("rotated", [False, True])
def test_activations_of_eight_bits_are_taken_where_they_are_asked_for(
    rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = packed_experts("mixtral", rotated=rotated, removed=False)
    hidden, chosen, routing = routed_in(experts, 12)
    expected = experts.float()(hidden.float(), chosen, routing).double()
    monkeypatch.setenv("MCSHARP_KERNEL", "int8_dot")
    found = experts.half()(hidden, chosen, routing.half())
    assert 4e-3 < relative_error(found, expected) < 3e-2


def test_tokens_beyond_the_workspace_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, gate_up, down = random_layer(BITS, 64, 32, 32)
    given = routed(7, 64)
    monkeypatch.setattr(cpu_experts, "WORKSPACE_BYTES", 3 * cpu_experts.workspace_bytes(layer, 2))
    out = run_experts(layer, *given)
    assert relative_error(out, silu_layer(*given, gate_up, down)) < 2e-3


def own_code(rows: Tensor, expert: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return torch.nn.functional.gelu(gate) * up


@pytest.mark.parametrize("between", [None, own_code])
@pytest.mark.parametrize(("dropped", "slots", "inner"), [(0, 2, 384), (1, 2, 384), (1, 1, 32)])
def test_memory_stays_within_the_workspace(
    dropped: int,
    slots: int,
    inner: int,
    between: PerSlot | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, _, _ = random_layer(BITS, 512, inner, 32)
    layer = replace(layer, between=between)
    hidden = torch.randn(300, 512).half()
    chosen = torch.arange(300 * slots).reshape(300, slots) % (len(BITS) + dropped)
    given = hidden, chosen, torch.rand(300, slots)
    run_experts(layer, *given)
    room = 100 * cpu_experts.workspace_bytes(layer, slots)
    monkeypatch.setattr(cpu_experts, "WORKSPACE_BYTES", room)
    results = 400 * 512 * 2  # all, and those of one part
    assert 0.4 * room < peak_bytes(lambda: run_experts(layer, *given)) - results <= room


def test_products_are_called_for_twice_whatever_the_routing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, _, _ = random_layer(BITS, 64, 32, 32)
    calls: list[int] = []
    products = cpu_experts.products

    def noted(x: Tensor, spans: Any, *others: Any) -> Tensor:
        calls.append(len(spans))
        return products(x, spans, *others)

    monkeypatch.setattr(cpu_experts, "products", noted)
    x, _, routing = routed(2, 64)
    run_experts(layer, x, torch.tensor([[0, 3], [1, 2]]), routing)
    run_experts(layer, x, torch.tensor([[1, 1], [1, 1]]), routing)
    assert calls == [4, 4, 1, 1]


# When it is done


def routed_in(experts: Any, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``routed``, for an experts module."""
    hidden, chosen, routing = routed(tokens, buckets_of(experts)[0].columns["gate_up"])
    return hidden, chosen.where(chosen < len(BITS), experts.num_experts), routing


def buckets_of(experts: Any) -> list[ExpertBucket]:
    return [module for module in experts.children() if isinstance(module, ExpertBucket)]


def is_done(experts: Any, hidden: Tensor, *, weights: Tensor | None = None) -> bool:
    weights = torch.ones(len(hidden), 2) if weights is None else weights
    return whole_layer(experts, buckets_of(experts), hidden, weights) is not None


@pytest.fixture
def mixtral() -> Any:
    return packed_experts("mixtral", rotated=False, removed=False).half()


@pytest.mark.parametrize(("wide", "most"), [(True, 128), (False, 24)])
def test_tokens_in_half_precision_are_done_at_once_where_experts_get_few(
    mixtral: Any, monkeypatch: pytest.MonkeyPatch, wide: bool, most: int
) -> None:
    monkeypatch.setattr(support, "has_wide_vnni", lambda: wide)
    tokens = most * mixtral.num_experts // 2
    hidden, _, _ = routed_in(mixtral, tokens + 1)
    assert is_done(mixtral, hidden[:1])
    assert is_done(mixtral, hidden[:tokens])
    assert not is_done(mixtral, hidden)
    assert not is_done(mixtral, hidden[:0])
    assert not is_done(mixtral, hidden[:1].float())


def test_gradients_are_left_to_the_buckets(mixtral: Any) -> None:
    hidden, _, routing = routed_in(mixtral, 1)
    assert not is_done(mixtral, hidden.clone().requires_grad_())
    assert not is_done(mixtral, hidden, weights=routing.requires_grad_())
    with torch.no_grad():
        assert is_done(mixtral, hidden, weights=routing)


@pytest.mark.parametrize("rotated", [False, True])
def test_weights_of_inputs_have_gradients(rotated: bool) -> None:
    experts = packed_experts("llama4", rotated=rotated, removed=False)
    hidden, chosen, routing = routed_in(experts, 3)
    given, expected = routing.half().requires_grad_(), routing.clone().requires_grad_()
    experts.float()(hidden.float(), chosen, expected).sum().backward()
    experts.half()(hidden, chosen, given).sum().backward()
    assert given.grad is not None
    assert expected.grad is not None
    assert relative_error(given.grad, expected.grad.double()) < 4e-3


def test_biases_of_removed_experts_are_left_to_the_buckets() -> None:
    experts = packed_experts("gpt_oss", rotated=False, removed=True).half()
    hidden, _, _ = routed_in(experts, 1)
    assert not is_done(experts, hidden)


def test_offloaded_experts_are_left_to_the_buckets(mixtral: Any) -> None:
    hidden, _, _ = routed_in(mixtral, 1)
    buckets_of(mixtral)[0].to("meta")
    assert not is_done(mixtral, hidden)


def test_a_kernel_that_is_asked_for_does_its_products(
    mixtral: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, _, _ = routed_in(mixtral, 800)
    assert not is_done(mixtral, hidden)
    monkeypatch.setenv("MCSHARP_KERNEL", "integer_dot")
    assert is_done(mixtral, hidden)
    monkeypatch.setenv("MCSHARP_KERNEL", "chunked")
    assert not is_done(mixtral, hidden)
    monkeypatch.setenv("MCSHARP_KERNEL", "none")
    with pytest.raises(InputError, match="no such kernel"):
        is_done(mixtral, hidden)


def test_what_was_measured_says_for_how_many_tokens(
    mixtral: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCSHARP_CROSSOVERS", str(tmp_path / "crossovers.json"))
    four = 2 * mixtral.num_experts
    hidden, _, _ = routed_in(mixtral, four)
    assert is_done(mixtral, hidden)
    stack = buckets_of(mixtral)[1].stack("down")
    form = (stack.rows, stack.columns, stack.bits, stack.group_size)
    key = Case(*form, 1, torch.float16, "cpu").key()
    crossovers.save("cpu", {key: ((1, "integer_dot"), (4, "dequantise"))})
    assert not is_done(mixtral, hidden)
    assert is_done(mixtral, hidden[: four * 3 // 4])
    crossovers.save("cpu", {key: ((1, "dequantise"),)})
    assert not is_done(mixtral, hidden[:1])
