"""The network that says how many experts a token keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mcsharp_sdk.pruning import KEEP_ALL_BIAS, TopAnyNetwork, keep_mask, kept_counts, soft_keep
from mcsharp_sdk.pruning.top_any import gumbel_noise

HIDDEN, TOP_K, UNITS, TOKENS = 10, 4, 6, 5


def network() -> TopAnyNetwork:
    torch.manual_seed(0)
    made = TopAnyNetwork(HIDDEN, TOP_K, UNITS)
    torch.nn.init.normal_(made.second.weight)
    return made


def test_it_has_two_float32_layers_under_their_stored_names() -> None:
    shapes = {name: tuple(p.shape) for name, p in TopAnyNetwork(8, 3, 5).named_parameters()}
    assert shapes == {
        "first.weight": (5, 11),
        "first.bias": (5,),
        "second.weight": (3, 5),
        "second.bias": (3,),
    }
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert {p.dtype for p in TopAnyNetwork(8, 3, 5).parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_new_network_keeps_everything() -> None:
    hidden, weights = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K)
    logits = TopAnyNetwork(HIDDEN, TOP_K, UNITS)(hidden, weights)
    assert torch.equal(logits, torch.tensor([[0, 0, 0, KEEP_ALL_BIAS]]).expand(TOKENS, -1))
    assert keep_mask(logits, weights).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_follow_the_definition(dtype: torch.dtype) -> None:
    made = network()
    hidden, weights = torch.randn(TOKENS, HIDDEN).to(dtype), torch.rand(TOKENS, TOP_K).to(dtype)
    found = made(hidden, weights)
    assert found.dtype == torch.float32
    for t in range(TOKENS):
        x, w = hidden[t].float(), weights[t].float().sort(descending=True).values
        seen = torch.cat([F.rms_norm(x, (HIDDEN,), eps=1e-6), w / w.sum()])
        inner = made.first.weight @ seen + made.first.bias
        expected = made.second.weight @ (inner * inner.sigmoid()) + made.second.bias
        torch.testing.assert_close(found[t], expected)


def test_neither_scale_of_the_weights_nor_order_of_the_slots_matters() -> None:
    made = network()
    hidden, weights = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K)
    shuffled = 2.5 * weights[:, torch.randperm(TOP_K)]
    torch.testing.assert_close(made(hidden, shuffled), made(hidden, weights))


@given(
    st.lists(
        st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=3, max_size=3), min_size=1, max_size=4
    ),
    st.permutations([0.5, 0.3, 0.3]),
)
def test_the_mask_keeps_the_largest_weights_up_to_the_best_count(
    logits: list[list[float]], weights: list[float]
) -> None:
    order = sorted(range(3), key=lambda slot: (-weights[slot], slot))
    counts = [1 + row.index(max(row)) for row in logits]
    expected = [[slot in order[:count] for slot in range(3)] for count in counts]
    assert kept_counts(torch.tensor(logits)).tolist() == counts
    routed = torch.tensor([weights] * len(logits))
    assert keep_mask(torch.tensor(logits), routed).tolist() == expected


def test_without_noise_the_soft_mask_is_the_hard_one() -> None:
    logits, weights = torch.randn(50, TOP_K), torch.rand(50, TOP_K).sort(descending=True).values
    soft = soft_keep(logits, 0.7, noise=torch.zeros(50, TOP_K))
    assert torch.equal(soft, keep_mask(logits, weights).float())


def test_its_gradient_is_that_of_the_sums_of_chances() -> None:
    logits, noise = torch.randn(TOKENS, TOP_K), torch.randn(TOKENS, TOP_K)
    factor = torch.randn(TOKENS, TOP_K)
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (soft_keep(one, 0.5, noise=noise) * factor).sum().backward()
    chances = ((other + noise) / 0.5).softmax(-1)
    sums = torch.stack([chances[:, i:].sum(-1) for i in range(TOP_K)], dim=-1)
    (sums * factor).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    assert one.grad is not None
    assert one.grad.abs().sum() > 0


def test_samples_have_the_chances_of_the_logits_and_repeat_by_seed() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0]).expand(20000, -1)
    noises = [gumbel_noise(logits, torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*noises)
    kept = soft_keep(logits, 1.0, noise=noises[0]).sum(-1).long()
    counts = kept.bincount(minlength=4)[1:] / 20000
    assert counts.tolist() == pytest.approx(logits[0].softmax(-1).tolist(), abs=0.015)
