"""Expert statistics against a plain computation on the full model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_models import PLAIN_FAMILIES, save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from transformers import AutoModelForCausalLM

import mcsharp_sdk
from mcsharp_sdk.artifacts import ExpertStatistics
from mcsharp_sdk.engine.run_directory import LayerStore
from mcsharp_sdk.models.experts import MATRICES, fused_weight, is_experts
from mcsharp_sdk.modifiers.expert_measurement import QUICK_SEARCH
from mcsharp_sdk.modifiers.expert_stats import ExpertStats
from mcsharp_sdk.modifiers.loss_gradients import GRADIENT, LOSS_GRADIENTS
from mcsharp_sdk.quantization import GridSettings, quantise_rtn
from mcsharp_sdk.recipe.schema import Recipe

GROUP = 16
GRID = GridSettings(group_size=GROUP, **QUICK_SEARCH)


def measure(model: Path, text: Path, work: Path, **settings: Any) -> ExpertStatistics:
    run(model, text, work, **settings)
    return ExpertStatistics.load(work / "run" / ExpertStatistics.FILE)


def run(model: Path, text: Path, work: Path, **settings: Any) -> Any:
    calibration = {"source": "text", "path": str(text), "sequences": 6, "length": 32}
    stage = {"type": "ExpertStats", "group_size": GROUP, **settings}
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "calibration": {**calibration, "sampling": "first"},
            "stages": [stage],
            "exports": [],
        }
    )
    return mcsharp_sdk.compress(recipe, model, work / "out", run_dir=work / "run", progress=False)


def tokens_of(text: Path) -> torch.Tensor:
    """The tokens that the calibration takes: the tiny tokenizer's are ASCII codes."""
    return torch.tensor([ord(c) for c in text.read_text()[: 6 * 32]]).view(6, 32)


def full_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


@torch.no_grad()
def block_error(experts: Any, expert: int, width: int, arguments: tuple[Any, ...]) -> float:
    """Change of a block's output when one expert is rounded to nearest, by running the block."""
    before = experts(*arguments)
    own = {m: fused_weight(experts, m)[expert].clone() for m in MATRICES}
    for matrix in MATRICES:
        rounded = quantise_rtn(own[matrix][None], [width], GRID)
        fused_weight(experts, matrix)[expert] = rounded.dequantise()[0]
    after = experts(*arguments)
    for matrix in MATRICES:
        fused_weight(experts, matrix)[expert] = own[matrix]
    return float((after - before).norm())


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_statistics_equal_a_plain_computation_on_the_full_model(
    family: str, text: Path, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model", family)
    save_tiny_tokenizer(folder)
    measured = measure(folder, text, tmp_path, mode="released")

    model = full_model(folder)
    calls: dict[int, tuple[Any, ...]] = {}
    for index, layer in enumerate(model.model.layers):
        for module in filter(is_experts, layer.modules()):
            module.register_forward_pre_hook(
                lambda _, arguments, index=index: calls.setdefault(index, arguments)
            )
    with torch.no_grad():
        model(tokens_of(text), use_cache=False)

    assert [s.layer for s in measured.layers] == sorted(calls)
    for statistics in measured.layers:
        arguments = calls[statistics.layer]
        experts = next(filter(is_experts, model.model.layers[statistics.layer].modules()))
        chosen = arguments[1]
        counts = [int((chosen == e).sum()) for e in range(experts.num_experts)]
        np.testing.assert_array_equal(statistics.activation_count, counts)
        for width in (1, 2, 3):
            expected = [block_error(experts, e, width, arguments) for e in range(len(counts))]
            np.testing.assert_allclose(statistics.quant_error[width], expected, rtol=1e-3)


def test_routing_weights_are_those_before_renormalisation(text: Path, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    save_tiny_tokenizer(folder)
    measured = measure(folder, text, tmp_path, mode="released")
    model = full_model(folder)
    logits: list[torch.Tensor] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *a: logits.append(a[2][0]))
    with torch.no_grad():
        model(tokens_of(text), use_cache=False)
    probabilities = logits[0].double().softmax(-1)
    top = probabilities.topk(2)
    expected = torch.zeros(4, dtype=torch.float64)
    expected.index_add_(0, top.indices.flatten(), top.values.flatten())
    np.testing.assert_allclose(measured.layers[0].routing_weight_sum, expected, rtol=1e-5)


def test_gptq_errors_are_below_those_of_rounding(text: Path, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    save_tiny_tokenizer(folder)
    gptq = measure(folder, text, tmp_path / "gptq")
    rounded = measure(folder, text, tmp_path / "rtn", quantizer="rtn")
    for a, b in zip(gptq.layers, rounded.layers, strict=True):
        np.testing.assert_array_equal(a.activation_count, b.activation_count)
        for width in (2, 3):
            assert a.quant_error[width].sum() < b.quant_error[width].sum()
        assert (a.quant_error[3] < a.quant_error[1]).all()
        assert a.drop_error is not None
        assert (a.drop_error > a.quant_error[3]).all()


def test_model_errors_equal_a_plain_computation_on_the_full_model(
    text: Path, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    save_tiny_tokenizer(folder)
    measured = measure(folder, text, tmp_path, mode="paper", bits=[2], error_tokens=64)
    assert ExpertStats(mode="paper").scope == "model"
    model = full_model(folder)
    last: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, arguments: last.append(arguments[0]))

    @torch.no_grad()
    def run() -> torch.Tensor:
        model(tokens_of(text)[:2], use_cache=False)
        return last.pop()

    reference = run()
    for layer in range(3):
        experts = model.model.layers[layer].mlp.experts
        for expert in range(4):
            own = {m: fused_weight(experts, m)[expert].clone() for m in MATRICES}
            with torch.no_grad():
                for matrix in MATRICES:
                    rounded = quantise_rtn(own[matrix][None], [2], GRID)
                    fused_weight(experts, matrix)[expert] = rounded.dequantise()[0]
                change = float((run() - reference).norm())
                for matrix in MATRICES:
                    fused_weight(experts, matrix)[expert] = 0
                drop = float((run() - reference).norm())
                for matrix in MATRICES:
                    fused_weight(experts, matrix)[expert] = own[matrix]
            found = measured.layers[layer]
            assert found.drop_error is not None
            assert found.quant_error[2][expert] == pytest.approx(change, rel=1e-3)
            assert found.drop_error[expert] == pytest.approx(drop, rel=1e-3)


def test_model_errors_of_bfloat16_weights_are_those_of_the_same_weights_in_float32(
    text: Path, tmp_path: Path
) -> None:
    stored = save_tiny_model(tmp_path / "bf16", "mixtral", dtype=torch.bfloat16)
    full_model(stored).save_pretrained(tmp_path / "fp32")
    found = []
    for folder in (stored, tmp_path / "fp32"):
        save_tiny_tokenizer(folder)
        work = folder / "work"
        found.append(measure(folder, text, work, mode="paper", bits=[3, 4], error_tokens=64))
    for rounded, exact in zip(found[0].layers, found[1].layers, strict=True):
        assert rounded.drop_error is not None
        assert exact.drop_error is not None
        np.testing.assert_allclose(rounded.drop_error, exact.drop_error, rtol=1e-4)
        for width in (3, 4):
            found_errors, expected = rounded.quant_error[width], exact.quant_error[width]
            np.testing.assert_allclose(found_errors, expected, rtol=1e-4)


def test_experts_that_no_token_reaches_on_which_model_errors_are_measured_are_named(
    text: Path, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral", num_local_experts=24)
    save_tiny_tokenizer(folder)
    done = run(folder, text, tmp_path, mode="paper", bits=[2], error_tokens=32)
    calls = block_calls(full_model(folder), text)
    named = [warning for warning in done.warnings if "all errors are 0 for experts" in warning]
    expected = []
    for layer, (_, chosen, _) in calls.items():
        few, all_of_them = (set(c.flatten().tolist()) for c in (chosen[:32], chosen))
        unreached = ", ".join(map(str, sorted(all_of_them - few)))
        expected.append(
            (f"layer {layer}: ", "none of the first 32 tokens reach", f": {unreached};")
        )
        assert unreached
    assert len(named) == len(expected)
    for warning, words in zip(named, expected, strict=True):
        assert all(word in warning for word in words)
    assert "'error_tokens'" in named[0]


@torch.no_grad()
def block_calls(model: Any, text: Path) -> dict[int, tuple[Any, ...]]:
    """Decoder layer -> what its experts are called with."""
    calls: dict[int, tuple[Any, ...]] = {}
    for index, layer in enumerate(model.model.layers):
        for module in filter(is_experts, layer.modules()):
            module.register_forward_pre_hook(
                lambda _, arguments, index=index: calls.update({index: arguments})
            )
    model(tokens_of(text), use_cache=False)
    return calls


@torch.no_grad()
def changes_of_weights(experts: Any, width: int) -> dict[str, torch.Tensor]:
    """Matrix -> (E,) squared norms of what rounding to nearest changes."""
    found: dict[str, torch.Tensor] = {}
    for matrix in MATRICES:
        weights = fused_weight(experts, matrix)
        rounded = quantise_rtn(weights, [width] * len(weights), GRID).dequantise()
        found[matrix] = (rounded - weights).double().square().sum((1, 2))
    return found


def test_hessian_errors_are_mean_curvature_times_change_of_the_weights(
    text: Path, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    save_tiny_tokenizer(folder)
    measured = measure(folder, text, tmp_path, mode="released", bits=[2])
    model = full_model(folder)
    calls = block_calls(model, text)
    for statistics in measured.layers:
        hidden, index, _ = calls[statistics.layer]
        experts = model.model.layers[statistics.layer].mlp.experts
        change = changes_of_weights(experts, 2)
        for expert in range(4):
            x = hidden[(index == expert).any(-1)]
            inner = experts._apply_gate(x @ experts.gate_up_proj[expert].T)
            expected = sum(
                float(change[m][expert])
                * 2
                * float(rows.detach().double().square().sum())
                / rows.shape[1]
                for m, rows in (("gate_up", x), ("down", inner))
            )
            assert statistics.hessian_error[2][expert] == pytest.approx(expected, rel=1e-3)


def test_block_cosines_are_those_of_the_decoder_layers(text: Path, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral", initializer_range=0.2)
    save_tiny_tokenizer(folder)
    measured = measure(folder, text, tmp_path, mode="released", bits=[2], block_scores=True)
    with torch.no_grad():
        states = full_model(folder)(tokens_of(text), output_hidden_states=True).hidden_states
    for statistics in measured.layers[:2]:  # behind the last the final norm is applied
        one, other = (states[statistics.layer + step].double() for step in (0, 1))
        cosines = torch.nn.functional.cosine_similarity(one, other, dim=-1)
        assert statistics.block_cosine == pytest.approx(float(cosines.mean()), abs=1e-5)
        # What the predictor says of the second half is closer to it than chance.
        assert statistics.predicted_block_cosine is not None
        half = float(cosines.flatten()[len(cosines.flatten()) // 2 :].mean())
        assert statistics.predicted_block_cosine == pytest.approx(half, abs=0.05)


def gradients_of_the_full_model(model: Any, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    """Layer -> gradient at its block's output of the loss of tokens drawn from the prediction."""
    outputs: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_: Any, __: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs[index] = output

        return hook

    for index, layer in enumerate(model.model.layers):
        for module in filter(is_experts, layer.modules()):
            module.register_forward_hook(keep(index))
    logits = model(tokens, use_cache=False).logits.flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return {index: output.grad for index, output in outputs.items()}  # type: ignore[misc]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_loss_gradients_are_those_of_the_full_model(
    family: str, text: Path, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model", family, initializer_range=0.1)
    save_tiny_tokenizer(folder)
    measured = measure(folder, text, tmp_path, mode="released", bits=[2], loss_tokens=70)
    store = LayerStore(tmp_path / "run" / LOSS_GRADIENTS)
    expected = gradients_of_the_full_model(full_model(folder), tokens_of(text)[:2])
    assert sorted(expected) == [s.layer for s in measured.layers]
    for statistics in measured.layers:
        gradient = expected[statistics.layer]
        found = store.tensors(statistics.layer)[GRADIENT]
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5)
        assert statistics.loss_sensitivity == pytest.approx(
            float(gradient.double().square().mean()), rel=1e-3
        )


def test_the_loss_hessian_is_the_trace_of_the_fisher_matrix(text: Path, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral", initializer_range=0.1)
    save_tiny_tokenizer(folder)
    settings = {"mode": "released", "bits": [2], "hessian": "loss", "loss_tokens": 192}
    measured = measure(folder, text, tmp_path, **settings)
    gradients = gradients_of_the_full_model(full_model(folder), tokens_of(text))
    model = full_model(folder)
    calls = block_calls(model, text)
    layer, expert = 1, 2
    hidden, index, weights = calls[layer]
    experts = model.model.layers[layer].mlp.experts
    change = changes_of_weights(experts, 2)
    traces = {"gate_up": 0.0, "down": 0.0}
    for token, slot in (index == expert).nonzero().tolist():
        first = experts.gate_up_proj[expert].detach().requires_grad_()
        second = experts.down_proj[expert].detach().requires_grad_()
        output = experts._apply_gate(hidden[token][None] @ first.T) @ second.T
        (output[0] * weights[token, slot]).backward(gradients[layer][token])
        traces["gate_up"] += float(first.grad.double().square().sum())  # type: ignore[union-attr]
        traces["down"] += float(second.grad.double().square().sum())  # type: ignore[union-attr]
    expected = sum(
        traces[m] * float(change[m][expert]) / fused_weight(experts, m)[expert].numel()
        for m in MATRICES
    )
    assert measured.layers[layer].hessian_error[2][expert] == pytest.approx(expected, rel=1e-3)


def test_a_loss_hessian_without_gradients_is_refused() -> None:
    with pytest.raises(ValidationError, match="give 'loss_tokens: 2048'"):
        ExpertStats.model_validate({"hessian": "loss"})
