"""Whole evaluations of model folders, against the same weights run plainly by transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_stacks import expert_tensors
from stock_models import stock_model, watched_blocks
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from tiny_vision_models import save_tiny_vision_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from vision_runs import load as load_vision_model
from vision_runs import named_blocks

from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.evaluation.cost import model_cost
from mcsharp_sdk.evaluation.evaluate import evaluate
from mcsharp_sdk.evaluation.inspection import inspect
from mcsharp_sdk.evaluation.text import EMBEDDED_TEXT
from mcsharp_sdk.models.shards import Checkpoint, write_safetensors
from mcsharp_sdk.quantization.grid import pack_weight
from mcsharp_sdk.quantization.round_to_nearest import quantise_rtn
from mcsharp_sdk.quantization.search import GridSettings
from mcsharp_sdk.runtime.layout import PackedLayout

TEXT = "".join(chr(33 + 7 * i * i % 89) for i in range(300))
GROUP = 16
WIDTHS = {0: (1, 2, 3, 2), 1: (3, 3, 2, 2), 2: (2, 2, 2, 2)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    save_tiny_model(folder, "mixtral", initializer_range=0.2)
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def compressed(original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder whose experts are packed, and a stock model with the weights they stand for."""
    folder = tmp_path_factory.mktemp("compressed")
    stock: Any = AutoModelForCausalLM.from_pretrained(original, experts_implementation="eager")
    tensors = {n: t for n, t in stock.state_dict().items() if ".experts." not in n}
    for layer, bits in WIDTHS.items():
        experts = stock.model.layers[layer].mlp.experts
        packed = {}
        for matrix, weight in (("gate_up", experts.gate_up_proj), ("down", experts.down_proj)):
            batch = quantise_rtn(weight.detach(), bits, GridSettings(group_size=GROUP))
            packed[matrix] = [pack_weight(batch.expert(e)) for e in range(4)]
            weight.data.copy_(batch.dequantise())
        tensors |= expert_tensors(f"model.layers.{layer}.mlp.experts", bits, packed)  # type: ignore[arg-type]
    write_sharded(folder, tensors)
    config = json.loads((original / "config.json").read_text())
    config["quantization_config"] = PackedLayout(GROUP, WIDTHS, {}).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    save_tiny_tokenizer(folder)
    return folder, stock


def write_sharded(folder: Path, tensors: dict[str, Tensor]) -> None:
    file = "mcsharp-00001-of-00001.safetensors"
    write_safetensors(folder / file, tensors, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "mcsharp.safetensors.index.json").write_text(json.dumps(index))


@torch.no_grad()
def plain_perplexity(model: Any, tokens: list[int], window: int) -> float:
    losses: list[Tensor] = []
    for start in range(0, len(tokens), window):
        part = torch.tensor(tokens[start : start + window])
        chances = model(input_ids=part[None]).logits[0].double().softmax(-1)
        losses += [-chances[i, part[i + 1]].log() for i in range(len(part) - 1)]
    return math.exp(torch.stack(losses).mean())


def test_an_uncompressed_model(original: Path, text: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(original)
    result = evaluate(original, text, window=64, device="cpu")
    codes = [ord(letter) for letter in TEXT]
    assert result.perplexity == pytest.approx(plain_perplexity(stock, codes, 64), rel=1e-5)
    assert (result.tokens, result.window, result.windows) == (300, 64, 5)
    assert (result.nominal_bits, result.stored_bits, result.expert_stored_bits) == (32, 32, 32)
    assert result.activated_expert_ratio == 1.0
    assert result.activated_expert_ratio_per_layer == {0: 1.0, 1: 1.0, 2: 1.0}
    assert result.parameters == stock.num_parameters()
    assert (result.device, result.dtype, result.text) == ("cpu", "float32", str(text))
    assert not result.compressed
    assert json.loads(json.dumps(result.to_json()))["perplexity"] == result.perplexity


def test_a_compressed_model_equals_the_weights_it_stands_for(
    compressed: tuple[Path, Any], original: Path, text: Path
) -> None:
    folder, stock = compressed
    result = evaluate(folder, text, window=100, device="cpu")
    codes = [ord(letter) for letter in TEXT]
    assert result.perplexity == pytest.approx(plain_perplexity(stock, codes, 100), rel=1e-4)
    assert result.compressed
    mean = sum(map(sum, WIDTHS.values())) / 12
    assert result.nominal_bits == result.expert_nominal_bits == pytest.approx(mean)
    assert result.stored_bits == pytest.approx(mean + 16 / GROUP + mean / GROUP, rel=0.01)
    assert result.activated_expert_ratio == 1.0
    unpacked = evaluate(original, text, window=100, max_tokens=100, device="cpu")
    assert result.bytes < unpacked.bytes
    assert result.activated_bytes_per_token is not None
    assert unpacked.activated_bytes_per_token is not None
    assert result.activated_bytes_per_token < unpacked.activated_bytes_per_token


def test_measured_bytes_follow_the_experts_used(compressed: tuple[Path, Any], text: Path) -> None:
    folder, stock = compressed
    chosen: dict[int, list[Tensor]] = {layer: [] for layer in WIDTHS}
    for layer, found in chosen.items():
        gate = stock.model.layers[layer].mlp.gate
        gate.register_forward_hook(lambda _m, _a, out, found=found: found.append(out[2]))
    plain_perplexity(stock, [ord(letter) for letter in TEXT], 100)
    sizes = {"gate_up": (192, 64), "down": (64, 96)}
    routed = 0.0
    for layer, bits in WIDTHS.items():
        counts = torch.cat(chosen[layer]).reshape(-1).bincount(minlength=4).tolist()
        for width, count in zip(bits, counts, strict=True):
            for rows, columns in sizes.values():
                groups = columns // GROUP
                size = rows * (columns * width // 8 + 2 * groups) + groups * rows * width // 8
                routed += size * count / len(TEXT)
    once = sum(p.numel() for n, p in stock.named_parameters() if ".experts." not in n)
    once -= stock.get_input_embeddings().weight.numel() - 64  # one row of the table is read
    result = evaluate(folder, text, window=100, device="cpu")
    assert result.activated_bytes_per_token == pytest.approx(4 * once + routed)


@pytest.mark.parametrize("family", ["dbrx", "llama4", "ernie4_5_vl_moe"])
def test_originals_whose_experts_lie_otherwise_read_their_share(
    family: str, text: Path, tmp_path: Path
) -> None:
    if family == "ernie4_5_vl_moe":
        model = load_vision_model(save_tiny_vision_model(tmp_path, family))
        blocks = [block for name, block in named_blocks(model) if "text_moe" in name]
    else:
        blocks = watched_blocks(stock_model(save_tiny_model(tmp_path, family)))
        save_tiny_tokenizer(tmp_path)
    routed = sum(p.numel() for block in blocks for p in block.experts.parameters()) // 2
    result = evaluate(tmp_path, text, window=64, max_tokens=64, device="cpu")
    once = model_cost(tmp_path)
    assert result.activated_expert_ratio == 1.0
    assert result.activated_bytes_per_token == once.always_read_bytes + 4 * routed
    assert result.activated_parameters_per_token == once.always_read_parameters + routed


def test_max_tokens_and_the_default_window(original: Path, text: Path) -> None:
    result = evaluate(original, text, max_tokens=150, device="cpu")
    assert (result.tokens, result.window, result.windows) == (150, 128, 2)  # 128 positions


def test_the_embedded_text_is_the_default(original: Path) -> None:
    result = evaluate(original, max_tokens=40, device="cpu")
    assert (result.text, result.tokens) == (EMBEDDED_TEXT, 40)


def test_half_precision_is_widened_on_a_cpu_unless_asked_for(tmp_path: Path, text: Path) -> None:
    save_tiny_model(tmp_path, "mixtral", dtype=torch.float16)
    save_tiny_tokenizer(tmp_path)
    for device in ("cpu", "cpu:0"):
        assert evaluate(tmp_path, text, max_tokens=8, device=device).dtype == "float32"
    for dtype in ("bfloat16", torch.bfloat16):
        found = evaluate(tmp_path, text, max_tokens=8, device="cpu", dtype=dtype)
        assert found.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "predicts nothing"),
        ({"window": 64.0}, "window is a whole number, not 64.0"),
        ({"max_tokens": "64"}, "max_tokens is a whole number, not '64'"),
        ({"dtype": torch.float64}, "dtype 'float64' is not known"),
        ({"window": 500}, "longer than the model's 128 positions"),
        ({"max_tokens": 1}, "max_tokens is 1"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"dtype": "int7"}, "dtype 'int7' is not known"),
        ({"text": "absent.txt"}, r"absent\.txt"),
    ],
)
def test_bad_settings_are_refused(
    settings: dict[str, Any], message: str, original: Path, text: Path
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(original, **{"text": text, "device": "cpu", **settings})


def test_a_text_of_one_token_is_refused(original: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(InputError, match="short.txt has fewer than 2 tokens"):
        evaluate(original, tmp_path / "short.txt", device="cpu")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, text: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        evaluate(tmp_path, text)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, text: Path) -> None:
    save_tiny_model(tmp_path, "mixtral")
    with pytest.raises(InputError, match="no tokenizer"):
        evaluate(tmp_path, text)


def test_a_tokenizer_of_another_model_is_refused(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(original, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 90}))
    (tmp_path / "text.txt").write_text("xyz")
    with pytest.raises(InputError, match="token 122 occurs, but the model knows 0 to 89"):
        evaluate(folder, tmp_path / "text.txt")


def test_missing_weights_are_never_made_up(original: Path, tmp_path: Path, text: Path) -> None:
    checkpoint = Checkpoint.open(original)
    name = "model.layers.1.self_attn.q_proj.weight"
    kept = {n: checkpoint.read(n) for n in checkpoint.names if n != name}
    for file in original.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, tmp_path)
    write_safetensors(tmp_path / "model.safetensors", kept, {"format": "pt"})
    with pytest.raises(InputError, match=f"lacks 1 tensors of its architecture: {name}"):
        evaluate(tmp_path, text, device="cpu")


def test_a_damaged_shard_is_found_before_loading(
    original: Path, tmp_path: Path, text: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(original, folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(InputProblems, match=f"{shard.name}.*truncated"):
        evaluate(folder, text)


def test_mixtral_mini_has_its_known_perplexity(shared_path: Callable[[str], Path]) -> None:
    result = evaluate(
        shared_path("models/mixtral-mini"),
        shared_path("data/wikitext2-test.txt"),
        window=256,
        max_tokens=64 * 256,
        device="cpu",
    )
    assert result.perplexity == pytest.approx(100.3, abs=0.2)
    assert result.parameters == 17_448_192


# --- inspection ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "moe_layers", "experts", "top_k"),
    [("mixtral", {0, 1, 2}, 4, 2), ("deepseek_v3", {1, 2}, 8, 3)],
)
def test_inspection_of_an_original(
    family: str, moe_layers: set[int], experts: int, top_k: int, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path, family)
    found = inspect(tmp_path)
    assert found.model_type == family
    assert found.layers == 3
    assert found.experts_per_layer == dict.fromkeys(sorted(moe_layers), experts)
    assert found.top_k == top_k
    assert found.router is not None
    assert found.router.scoring == ("sigmoid" if family == "deepseek_v3" else "softmax")
    assert found.unsupported == ""
    assert found.widths is None
    assert json.loads(json.dumps(found.to_json()))["supported"] is True


def test_inspection_of_a_compressed_model(compressed: tuple[Path, Any]) -> None:
    folder, stock = compressed
    found = inspect(folder)
    assert found.widths == WIDTHS
    assert found.linear_widths == {}
    assert found.cost.parameters == stock.num_parameters()
    assert found.to_json()["group_size"] == GROUP


def test_a_dense_model_is_described_and_named_unsupported(tmp_path: Path, text: Path) -> None:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    save_tiny_tokenizer(tmp_path)
    found = inspect(tmp_path)
    assert found.layers == 2
    assert found.experts_per_layer == {}
    assert "no mixture-of-experts layer" in found.unsupported
    result = evaluate(tmp_path, text, max_tokens=50, device="cpu")
    assert result.expert_nominal_bits is None
    assert result.activated_expert_ratio == 1.0
    assert result.activated_expert_ratio_per_layer == {}
