"""Every family from its checkpoint to a compressed model that generates, against stock models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, Capability
from mcsharp_exporters.onnx_routers import export_onnx_routers
from mcsharp_exporters.onnx_runner import OnnxRouters
from pruned_models import pruning_layout
from stock_models import StockBlock, pruned, set_weight, stir, stock_model, watched_blocks
from tiny_models import tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import mcsharp_sdk
from mcsharp_sdk.artifacts import LayerStatistics
from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.engine.model_fit import check_model
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.directory import routers_of_directory
from mcsharp_sdk.models.experts import MATRICES
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import stream_layers
from mcsharp_sdk.models.streamed_layer import StreamedLayer
from mcsharp_sdk.modifiers.expert_measurement import QUICK_SEARCH, ExpertMeasurement
from mcsharp_sdk.quantization.grid import PackedWeight, dequantise_packed
from mcsharp_sdk.quantization.round_to_nearest import quantise_rtn
from mcsharp_sdk.quantization.search import GridSettings
from mcsharp_sdk.recipe.schema import Recipe
from mcsharp_sdk.runtime.modules import ExpertBucket, PackedLinear
from mcsharp_sdk.runtime.pruned_routing import install_pruning
from mcsharp_sdk.runtime.received_attention import NAME as RECEIVING
from mcsharp_sdk.runtime.received_attention import AttentionTap, TokenBatch, attach_tap

GROUP = 16
GRID = GridSettings(group_size=GROUP, **QUICK_SEARCH)
TEXT = "the quick brown fox jumps over the lazy dog. " * 40
SIGMOID = {"minimax_m2", "deepseek_v3", "glm4_moe", "dots1", "nemotron_h", "llama4"}


@dataclass(frozen=True)
class Case:
    """A family with its folders, each made when it is first asked for."""

    family: str
    folder: Path

    @cached_property
    def original(self) -> Path:
        model = tiny_model(self.family, initializer_range=0.1)
        stir(model)
        model.save_pretrained(self.folder / "original", max_shard_size="60KB")
        save_tiny_tokenizer(self.folder / "original")
        return self.folder / "original"

    @cached_property
    def widths(self) -> dict[str, list[int]]:
        """Decoder layer -> widths of its experts, all different ones."""
        model = tiny_model(self.family)
        return {
            str(b.layer): [1 + (e + b.layer) % 4 for e in range(b.num_experts)]
            for b in watched_blocks(model)
        }

    @cached_property
    def compressed(self) -> Path:
        bits = self.folder / "bits.json"
        bits.write_text(json.dumps({"version": 1, "bits": self.widths}))
        stages = [{"type": "GPTQQuantize", "bits": str(bits), "group_size": GROUP}]
        if "prune" not in FAMILIES[self.family].refuses:
            stages.append({"type": "TokenProtection", "metric": "none"})
        output = self.folder / "compressed"
        mcsharp_sdk.compress(self.recipe(stages), self.original, output, progress=False)
        return output

    def recipe(self, stages: list[dict[str, Any]], **more: Any) -> Recipe:
        text = self.folder / "text.txt"
        text.write_text(TEXT)
        calibration = {"source": "text", "path": str(text), "sequences": 4, "length": 32}
        return Recipe.from_dict(
            {"version": 1, "calibration": calibration, "stages": stages, **more}
        )

    @cached_property
    def loaded(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.compressed).eval()
        model.set_expert_pruning("off")
        return model

    @cached_property
    def dequantised(self) -> Any:
        """The stock model with the packed weights of the compressed one written out."""
        stock = stock_model(self.original)
        blocks = {b.layer: b for b in watched_blocks(stock)}
        with torch.no_grad():
            for name, module in self.loaded.named_modules():
                if isinstance(module, PackedLinear):
                    weight = PackedWeight(module.qweight, module.scales, module.zeros)
                    linear = stock.get_submodule(name)
                    linear.weight.copy_(unpacked(weight, module, module.in_features))
                if isinstance(module, ExpertBucket):
                    layer = next(int(p) for p in name.split(".") if p.isdigit())
                    write_bucket(module, blocks[layer])
        return stock


def unpacked(weight: PackedWeight, module: PackedLinear | ExpertBucket, columns: int) -> Tensor:
    return dequantise_packed(
        weight.qweight,
        weight.scales,
        weight.zeros,
        bits=module.bits,
        group_size=module.group_size,
        columns=columns,
        dtype=torch.float32,
    )


def write_bucket(bucket: ExpertBucket, block: StockBlock) -> None:
    for slot, expert in enumerate(bucket.experts):
        for matrix, views in zip(MATRICES, block.weights(expert), strict=True):
            packed = bucket.stack(matrix).matrix(slot)
            set_weight(views, unpacked(packed.weight, bucket, packed.columns))


def those_with(capability: Capability) -> list[str]:
    return [name for name, row in FAMILIES.items() if capability not in row.refuses]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return cache(lambda family: Case(family, tmp_path_factory.mktemp(family)))


def tokens(sequences: int = 4, length: int = 21) -> Tensor:
    return torch.randint(1, 128, (sequences, length), generator=torch.Generator().manual_seed(1))


def streamed(folder: Path) -> Iterator[StreamedLayer]:
    return stream_layers(SourceModel(folder), CalibrationSet.of_tokens(tokens()))


@torch.no_grad()
def logits(model: nn.Module, given: Tensor) -> Tensor:
    return model(given, use_cache=False).logits


def close(found: Tensor, expected: Tensor, near: float = 1e-5) -> None:
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=near * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_streamed_run_equals_a_run_of_the_full_model(
    family: str, case: Callable[[str], Case]
) -> None:
    original = case(family).original
    with torch.no_grad():
        expected = stock_model(original)(tokens(), output_hidden_states=True, use_cache=False)
    for layer in streamed(original):
        close(torch.cat(layer.inputs.hidden), expected.hidden_states[layer.index])
    assert layer.index == len(expected.hidden_states) - 2


@pytest.mark.parametrize("family", those_with("statistics"))
def test_statistics_equal_a_plain_computation_on_the_full_model(
    family: str, case: Callable[[str], Case]
) -> None:
    original = case(family).original
    measurement = ExpertMeasurement((2,), "rtn", GROUP, 10**6, True)
    measured = [
        measurement.of_layer(layer) for layer in streamed(original) if layer.moe is not None
    ]
    stock = stock_model(original)
    blocks = watched_blocks(stock)
    logits(stock, tokens())
    assert [statistics.layer for statistics in measured] == [block.layer for block in blocks]
    for statistics, block in zip(measured, blocks, strict=True):
        check_statistics(family, statistics, block)


@torch.no_grad()
def check_statistics(family: str, found: LayerStatistics, block: StockBlock) -> None:
    chosen = block.routing > 0
    np.testing.assert_array_equal(found.activation_count, chosen.sum(0))
    scores = block.logits.double()
    scores = scores.sigmoid() if family in SIGMOID else scores.softmax(-1)
    expected = (scores * chosen).sum(0)
    np.testing.assert_allclose(found.routing_weight_sum, expected, rtol=1e-4)
    before = block.experts(*block.arguments)
    assert found.drop_error is not None
    for expert in range(block.num_experts):
        changed = (output_with(block, expert, rounded) - before).norm()
        np.testing.assert_allclose(found.quant_error[2][expert], changed, rtol=1e-3)
        lost = (output_with(block, expert, torch.zeros_like) - before).norm()
        np.testing.assert_allclose(found.drop_error[expert], lost, rtol=1e-3)


def rounded(weight: Tensor) -> Tensor:
    return quantise_rtn(weight[None], [2], GRID).dequantise()[0]


def output_with(block: StockBlock, expert: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """What the experts return to their last call, if the weights of this one are changed."""
    views = block.weights(expert)
    own = [torch.cat(parts).clone() for parts in views]
    for parts, weight in zip(views, own, strict=True):
        set_weight(parts, change(weight))
    output = block.experts(*block.arguments)
    for parts, weight in zip(views, own, strict=True):
        set_weight(parts, weight)
    return output


@pytest.mark.parametrize("family", those_with("compress"))
def test_a_compressed_model_holds_every_expert_at_its_width(
    family: str, case: Callable[[str], Case]
) -> None:
    compressed = case(family).compressed
    settings = json.loads((compressed / "config.json").read_text())["quantization_config"]
    assert settings["experts"] == case(family).widths
    assert len({width for widths in settings["experts"].values() for width in widths}) == 4
    assert settings["linears"]


@pytest.mark.parametrize("family", those_with("load"))
def test_a_loaded_model_equals_the_stock_class_with_dequantised_weights(
    family: str, case: Callable[[str], Case]
) -> None:
    made = case(family)
    buckets = [m for m in made.loaded.modules() if isinstance(m, ExpertBucket)]
    assert sum(len(b.experts) for b in buckets) == sum(map(len, made.widths.values()))
    expected = logits(made.dequantised, tokens())
    close(logits(made.loaded, tokens()), expected, near=1e-4)
    # The weights matter: those of the original give something else.
    assert not torch.allclose(expected, logits(stock_model(made.original), tokens()), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("family", those_with("load"))
def test_a_loaded_model_is_one_graph_for_a_compiler(
    family: str, case: Callable[[str], Case]
) -> None:
    loaded = case(family).loaded
    torch.compiler.reset()
    compiled: Any = torch.compile(loaded, backend="eager", fullgraph=True)
    close(logits(compiled, tokens()), logits(loaded, tokens()), near=1e-5)


@pytest.mark.parametrize("family", those_with("generate"))
def test_a_loaded_model_generates_what_the_stock_class_does(
    family: str, case: Callable[[str], Case]
) -> None:
    made = case(family)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = made.loaded.generate(tokens(2, 9), **settings)
    assert found.shape == (2, 15)
    assert torch.equal(found, made.dequantised.generate(tokens(2, 9), **settings))


@pytest.mark.parametrize("family", those_with("prune"))
def test_a_pruned_model_equals_the_stock_class_with_routing_weights_set_to_zero(
    family: str, case: Callable[[str], Case]
) -> None:
    made = case(family)
    settings = json.loads((made.compressed / "config.json").read_text())["quantization_config"]
    thresholds = {int(layer): t for layer, t in settings["pruning"]["rule"]["thresholds"].items()}
    whole = logits(made.loaded, tokens())
    made.loaded.set_expert_pruning("rule")
    try:
        found = logits(made.loaded, tokens())
    finally:
        made.loaded.set_expert_pruning("off")
    blocks = watched_blocks(made.dequantised)
    with pruned(blocks, thresholds) as lost:
        expected = logits(made.dequantised, tokens())
    assert len(lost) == len(blocks)
    assert [share > 0 for share in lost] == [bool(thresholds[block.layer]) for block in blocks]
    close(found, expected, near=1e-4)
    assert not torch.allclose(found, whole, atol=1e-3)


@pytest.mark.parametrize("family", those_with("onnx_routers"))
def test_exported_routers_choose_as_those_of_the_stock_class(
    family: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    export_onnx_routers(SourceModel(case(family).original).routers(), tmp_path / "routers")
    exported = OnnxRouters(tmp_path / "routers", provider="cpu")
    stock = stock_model(case(family).original)
    blocks = watched_blocks(stock)
    logits(stock, tokens())
    assert exported.layers == tuple(block.layer for block in blocks)
    for block in blocks:
        assert block.hidden is not None
        found = exported(block.layer, block.hidden)
        dense = torch.zeros_like(block.routing).scatter_(1, found.indices, found.weights)
        close(dense, block.routing)


KEPT: dict[str, set[str]] = {
    "qwen3_next": {"linear_attn.in_proj_ba"},
    "jamba": {"mamba.x_proj", "mamba.dt_proj"},
    "nemotron_h": {
        *("mixer.in_proj", "mixer.out_proj"),
        *("mixer.fc1_latent_proj", "mixer.fc2_latent_proj"),
    },
}
"""Family -> linear layers beside routers that are kept as they are."""


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_but_routers_and_those_listed_are_packed(
    family: str, case: Callable[[str], Case]
) -> None:
    made = case(family)
    layers = re.compile(r"(?:model\.layers|transformer\.blocks)\.\d+\.(.*)")
    found = [layers.fullmatch(n) for n, m in made.loaded.named_modules() if type(m) is nn.Linear]
    kept = {match[1] for match in found if match}
    steering = {"mlp.gate.wg", "mlp.router", "mlp.shared_expert_gate"}
    assert kept - steering == KEPT.get(family, set())


@pytest.mark.parametrize("family", ["hunyuan_v1_moe", "ernie4_5_moe", "dbrx"])
def test_routers_are_rounded_wherever_their_weight_is(
    family: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    made = case(family)
    stage = {"type": "GPTQQuantize", "bits": 4, "group_size": GROUP, "router_bits": 4}
    mcsharp_sdk.compress(made.recipe([stage]), made.original, tmp_path / "out", progress=False)
    stored = {router.layer: router for router in routers_of_directory(tmp_path / "out")}
    for router in SourceModel(made.original).routers():
        rounded = quantise_rtn(router.weight[None], [4], GridSettings(group_size=GROUP))
        close(stored[router.layer].weight, rounded.dequantise()[0])


STAGES: dict[Capability, dict[str, Any]] = {
    "statistics": {"stages": [{"type": "ExpertStats"}]},
    "compress": {"stages": [{"type": "GPTQQuantize", "bits": 2}]},
    "prune": {"stages": [{"type": "TokenProtection"}]},
    "onnx_routers": {"stages": [], "exports": [{"type": "onnx_routers"}]},
}
"""What to ask for where it is refused; loading and generating go with compressing."""


@pytest.mark.parametrize(
    ("family", "capability"),
    [(name, c) for name, row in FAMILIES.items() for c in row.refuses if c in STAGES],
)
def test_what_a_family_cannot_do_is_refused_before_any_work(
    family: str, capability: Capability, case: Callable[[str], Case]
) -> None:
    made = case(family)
    with pytest.raises(InputError, match=re.escape(FAMILIES[family].refuses[capability])):
        mcsharp_sdk.plan(made.recipe(**STAGES[capability]), made.original)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_attends_where_a_run_tells_what_attention_its_tokens_receive(
    family: str, case: Callable[[str], Case]
) -> None:
    stock, found = stock_model(case(family).original), SourceModel(case(family).original).topology
    taps = [AttentionTap(TokenBatch(), wanted=True) for _ in range(found.num_layers)]
    for layer, tap in zip(stock.get_submodule(found.layers_path), taps, strict=True):
        attach_tap(layer, tap)
    if type(stock)._supports_sdpa:
        stock.set_attn_implementation(RECEIVING)
    logits(stock, tokens())
    assert {layer: block.attends for layer, block in found.moe.items()} == {
        layer: taps[layer].take() is not None for layer in found.moe
    }


@pytest.mark.parametrize("family", those_with("prune"))
def test_ranking_tokens_by_attention_is_refused_before_any_work_where_some_layer_has_none(
    family: str, case: Callable[[str], Case]
) -> None:
    made = case(family)
    refused: list[dict[str, Any]] = [{}, {"metric": "drop_insignificant"}]
    taken: list[dict[str, Any]] = [{"metric": "variance"}, {"metric": "none"}, {"protect_ratio": 0}]
    for settings in refused + taken:
        recipe = made.recipe([{"type": "TokenProtection", **settings}], exports=[])
        if settings in taken or not FAMILIES[family].unranked:
            check_model(recipe, made.original)
            continue
        with pytest.raises(InputError, match=r"stages\[0\].metric: .* no softmax attention"):
            check_model(recipe, made.original)


def test_pruning_that_a_config_asks_of_such_a_family_is_refused(
    case: Callable[[str], Case],
) -> None:
    source = SourceModel(case("llama4").original)
    layout = pruning_layout(source.topology, "rule", "none")
    with pytest.raises(InputError, match=re.escape(FAMILIES["llama4"].refuses["prune"])):
        install_pruning(source.model, source.topology, layout)
