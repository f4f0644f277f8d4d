"""Costs from headers against the model's own parameters and the arithmetic of the stored format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_models import StockBlock, stock_model, watched_blocks
from tiny_models import PLAIN_FAMILIES, save_tiny_model
from tiny_vision_models import save_tiny_vision_model
from transformers import AutoModelForCausalLM
from vision_runs import load, named_blocks

from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.evaluation.cost import ModelCost, model_cost
from mcsharp_sdk.evaluation.stored import role_of
from mcsharp_sdk.models.experts import is_experts
from mcsharp_sdk.models.shards import write_safetensors


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_an_uncompressed_model_is_counted_as_transformers_does(family: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, family, dtype=torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    cost = model_cost(tmp_path)
    assert cost.parameters == sum(p.numel() for p in model.state_dict().values())
    assert not cost.compressed
    assert cost.group_size is None

    experts: list[Any] = [m for m in model.modules() if is_experts(m)]
    in_experts = sum(p.numel() for m in experts for p in m.parameters())
    assert cost.roles["experts"].parameters == in_experts
    assert sorted(map(len, cost.expert_bytes.values())) == sorted(m.num_experts for m in experts)
    assert sum(map(sum, cost.expert_bytes.values())) == pytest.approx(2 * in_experts)

    attention = [layer.self_attn for layer in model.model.layers]
    linears = [m for a in attention for m in a.modules() if isinstance(m, torch.nn.Linear)]
    in_attention = sum(p.numel() for m in linears for p in m.parameters())
    assert cost.roles["attention"].parameters == in_attention
    assert cost.roles["embeddings"].parameters == cost.roles["head"].parameters == 128 * 64
    assert (cost.bits.nominal, cost.bits.stored) == (16, 16)
    assert cost.expert_bits is not None
    assert cost.expert_bits.weights == in_experts


def check_experts(cost: ModelCost, blocks: Sequence[StockBlock]) -> None:
    """Costs of float32 experts are those of the stock modules, which are alike."""
    one = {b.layer: sum(p.numel() for p in b.experts.parameters()) // 4 for b in blocks}
    assert cost.expert_bytes == {layer: (4 * size,) * 4 for layer, size in one.items()}
    assert cost.expert_parameters == {layer: (size,) * 4 for layer, size in one.items()}
    assert cost.roles["experts"].parameters == 4 * sum(one.values())
    assert cost.expert_bits is not None
    assert cost.expert_bits.weights == 4 * sum(one.values())


@pytest.mark.parametrize("family", ["dbrx", "llama4"])
def test_experts_that_are_stacked_otherwise_are_told_apart(family: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, family)
    check_experts(model_cost(tmp_path), watched_blocks(stock_model(tmp_path)))


def test_experts_of_image_tokens_are_no_routed_experts_of_text(tmp_path: Path) -> None:
    save_tiny_vision_model(tmp_path, "ernie4_5_vl_moe")
    model = load(tmp_path)
    cost = model_cost(tmp_path)
    check_experts(cost, [b for name, b in named_blocks(model) if "text_moe" in name])
    seen = ("vision_moe.experts", "vision_tower", "resampler")
    images = sum(p.numel() for n, p in model.named_parameters() if any(part in n for part in seen))
    assert cost.roles["vision"].parameters == images


def test_sizes_on_disk(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "mixtral")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("12345")
    cost = model_cost(tmp_path)
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert cost.directory_bytes == sum(f.stat().st_size for f in files)
    weights = [f for f in files if f.suffix == ".safetensors"]
    assert len(weights) > 1
    assert cost.weight_bytes == sum(f.stat().st_size for f in weights)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_read_per_token(tied: bool, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "mixtral", tie_word_embeddings=tied)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    table = model.get_input_embeddings().weight.numel()
    once = sum(p.numel() for p in model.parameters()) - experts
    row = 0 if tied else table - 64  # a table that is only looked up costs one row
    cost = model_cost(tmp_path)
    assert cost.always_read_bytes == 4 * (once - row)
    assert cost.activated_bytes() == pytest.approx(4 * (once - row + experts * 2 / 4))
    one = {0: [1.0, 0.0, 0.5, 0.0], 1: [0.0] * 4}  # layer 2 did not run
    assert cost.activated_bytes(one) == pytest.approx(4 * (once - row + experts / 3 / 4 * 1.5))


# --- packed models, written by hand from the stored format -----------------------------------

HIDDEN, INNER, GROUP, EXPERTS = 128, 64, 64, 4
WIDTHS = {0: [1, 2, 3, 2], 2: [3, 3, 3, 3]}
LINEARS = {"self_attn.q_proj": 4, "mlp.shared.up_proj": 8}


def packed(rows: int, columns: int, bits: int, *batch: int) -> dict[str, torch.Tensor]:
    groups = columns // GROUP
    return {
        "qweight": torch.zeros(*batch, rows, columns * bits // 8, dtype=torch.uint8),
        "scales": torch.zeros(*batch, rows, groups, dtype=torch.float16),
        "zeros": torch.zeros(*batch, groups, rows * bits // 8, dtype=torch.uint8),
    }


def packed_model(
    folder: Path, stored: Mapping[int, Sequence[int]] = WIDTHS, **settings: Any
) -> Path:
    tensors = {"model.embed_tokens.weight": torch.zeros(100, HIDDEN, dtype=torch.bfloat16)}
    for layer, widths in stored.items():
        for bits in set(widths) - {0}:
            bucket = f"model.layers.{layer}.mlp.experts.width_{bits}"
            shapes = {"gate_up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)}
            for matrix, (rows, columns) in shapes.items():
                parts = packed(rows, columns, bits, widths.count(bits))
                tensors |= {f"{bucket}.{matrix}_{part}": t for part, t in parts.items()}
        for path, bits in LINEARS.items():
            parts = packed(HIDDEN, HIDDEN, bits)
            tensors |= {f"model.layers.{layer}.{path}.{part}": t for part, t in parts.items()}
        gate = torch.zeros(EXPERTS, HIDDEN, dtype=torch.bfloat16)
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = gate
        kept = torch.zeros(HIDDEN, HIDDEN, dtype=torch.bfloat16)
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] = kept
    write_safetensors(folder / "mcsharp.safetensors", tensors)
    layout = {
        "quant_method": "mcsharp",
        "format_version": 1,
        "group_size": GROUP,
        "experts": {str(layer): widths for layer, widths in stored.items()},
        "linears": LINEARS,
        **settings,
    }
    config = {"num_experts_per_tok": 2, "quantization_config": layout}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stored_bits(bits: float) -> float:
    """Codes, one fp16 scale and one packed zero point per group."""
    return bits + 16 / GROUP + bits / GROUP


@pytest.fixture
def cost(tmp_path: Path) -> ModelCost:
    return model_cost(packed_model(tmp_path))


def test_bits_of_packed_weights_follow_the_arithmetic(cost: ModelCost) -> None:
    in_expert = 3 * HIDDEN * INNER
    mean = sum(sum(widths) for widths in WIDTHS.values()) / 8
    assert cost.expert_bits is not None
    assert cost.expert_bits.weights == 8 * in_expert
    assert cost.expert_bits.nominal == pytest.approx(mean)
    assert cost.expert_bits.stored == pytest.approx(stored_bits(mean))
    in_linears = 2 * 2 * HIDDEN * HIDDEN
    everything = 8 * in_expert + in_linears
    overall = (mean * 8 * in_expert + 6 * in_linears) / everything
    assert cost.bits.weights == everything
    assert cost.bits.nominal == pytest.approx(overall)
    assert cost.bits.stored == pytest.approx(stored_bits(overall))
    assert cost.compressed
    assert cost.group_size == GROUP


def test_removed_experts_cost_nothing_and_count_as_0_bits(tmp_path: Path) -> None:
    widths = {0: [2, 0, 3, 0], 2: [0, 0, 0, 0]}
    cost = model_cost(packed_model(tmp_path, widths))
    in_expert = 3 * HIDDEN * INNER
    assert cost.expert_bits is not None
    assert cost.expert_bits.weights == 8 * in_expert
    assert cost.expert_bits.nominal == pytest.approx(5 / 8)
    assert cost.expert_bits.stored == pytest.approx((stored_bits(2) + stored_bits(3)) / 8)
    assert cost.expert_bytes[2] == (0, 0, 0, 0)
    assert cost.roles["experts"].parameters == 2 * in_expert
    expected = [in_expert * (stored_bits(bits) if bits else 0) / 8 for bits in widths[0]]
    assert cost.expert_bytes[0] == pytest.approx(expected)


def test_parameters_do_not_change_by_packing(cost: ModelCost) -> None:
    shares = {role: share.parameters for role, share in cost.roles.items()}
    assert shares == {
        "embeddings": 100 * HIDDEN,
        "experts": 8 * 3 * HIDDEN * INNER,
        "attention": 2 * 2 * HIDDEN * HIDDEN,
        "linears": 2 * HIDDEN * HIDDEN,
        "router": 2 * EXPERTS * HIDDEN,
    }


def test_an_expert_costs_what_its_width_costs(cost: ModelCost) -> None:
    for layer, widths in WIDTHS.items():
        expected = [3 * HIDDEN * INNER * stored_bits(bits) / 8 for bits in widths]
        assert cost.expert_bytes[layer] == pytest.approx(expected)
    frequency = {0: [1.0, 0.5, 0.25, 0.25], 2: [0.5] * 4}
    used = sum(
        f * s for k in WIDTHS for f, s in zip(frequency[k], cost.expert_bytes[k], strict=True)
    )
    assert cost.activated_bytes(frequency) == pytest.approx(cost.always_read_bytes + used)


def test_config_and_tensors_must_agree(tmp_path: Path) -> None:
    wrong = {"0": [1, 2, 2, 2], "2": [3, 3, 3, 3], "3": [2, 2, 2, 2]}
    folder = packed_model(tmp_path, experts=wrong, linears={**LINEARS, "mlp.lost": 4})
    with pytest.raises(InputProblems) as caught:
        model_cost(folder)
    assert [str(problem) for problem in caught.value.problems] == [
        "decoder layer 0: 2 experts of 2 bits are stored, config.json says 3",
        "decoder layer 0: 1 experts of 3 bits are stored, config.json says 0",
        "decoder layer 3: 0 experts of 2 bits are stored, config.json says 4",
        "config.json: says that mlp.lost is packed, but no layer has it so",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "awq"}, "quantised by 'awq'"),
        ({"format_version": 9}, "format_version 9"),
        ({"experts": 3}, "malformed"),
    ],
)
def test_unreadable_packing_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        model_cost(packed_model(tmp_path, **settings))


def test_weights_stored_in_fp8_count_their_scales(tmp_path: Path) -> None:
    weight = torch.zeros(256, 128, dtype=torch.float8_e4m3fn)
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    write_safetensors(
        tmp_path / "model.safetensors", {name: weight, f"{name}_scale_inv": torch.ones(2, 1)}
    )
    config = {"num_experts_per_tok": 1, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    cost = model_cost(tmp_path)
    assert cost.parameters == 256 * 128
    assert cost.bits.nominal == 8
    assert cost.bits.stored == pytest.approx(8 + 64 / (256 * 128))


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_without_a_sound_config_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        model_cost(tmp_path)


def test_experts_without_a_top_k_are_refused(tmp_path: Path) -> None:
    packed_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_experts_per_tok"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="how many experts a token uses"):
        model_cost(tmp_path)


ROLES_OF_KNOWN_NAMES = {
    "model.layers.3.block_sparse_moe.experts.7.w2.weight": "experts",
    "model.layers.3.mlp.experts.gate_up_proj_bias": "experts",
    "model.layers.0.block_sparse_moe.input_linear.weight": "experts",
    "model.layers.0.mlp.experts.width_2.down_zeros": "experts",
    "model.layers.3.block_sparse_moe.gate.weight": "router",
    "model.layers.3.mlp.gate.e_score_correction_bias": "router",
    "model.layers.3.mlp.router.bias": "router",
    "model.layers.3.mlp.shared_expert_gate.weight": "router",
    "model.layers.3.mlp.gate_proj.weight": "linears",
    "model.layers.3.mlp.shared_experts.down_proj.qweight": "linears",
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": "attention",
    "model.layers.3.self_attn.kv_a_layernorm.weight": "other",
    "model.layers.3.self_attn.q_norm.weight": "other",
    "model.layers.3.self_attn.sinks": "attention",
    "model.layers.3.linear_attn.in_proj_qkvz.weight": "attention",
    "model.language_model.layers.3.self_attn.q_proj.weight": "attention",
    "model.visual.blocks.3.attn.qkv.weight": "vision",
    "projector.layers.0.weight": "vision",
    "image_newline": "vision",
    "model.norm.weight": "other",
    "model.embed_tokens.weight": "embeddings",
    "lm_head.weight": "head",
}


@pytest.mark.parametrize(("name", "role"), ROLES_OF_KNOWN_NAMES.items())
def test_roles_of_names_in_the_wild(name: str, role: str) -> None:
    assert role_of(name) == role
