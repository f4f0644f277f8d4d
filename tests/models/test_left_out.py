"""Checkpoints with tensors that transformers has no place for, such as multi-token prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_tokenizer import save_tiny_tokenizer

import mcsharp_sdk
from mcsharp_sdk.evaluation.evaluate import evaluate
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.recipe.schema import Recipe

STAGES: list[dict[str, Any]] = [
    {"type": "ExpertStats", "group_size": 16, "error_tokens": 64, "loss_tokens": 64},
    {"type": "BitAllocation", "target_bits": 2.25},
    {"type": "GPTQQuantize", "group_size": 16},
    {"type": "TopAnyRouter", "scope": "model", "steps": 2, "units": 4},
]

EXTRA: dict[str, dict[str, tuple[int, ...]]] = {
    "qwen3_next": {"mtp.norm.weight": (64,), "mtp.layers.0.mlp.gate.weight": (4, 64)},
    "glm4_moe": {
        "model.layers.46.eh_proj.weight": (64, 128),
        "model.layers.46.mlp.experts.0.gate_proj.weight": (40, 64),
    },
    "mixtral": {"model.layers.1.self_attn.rotary_emb.inv_freq": (8,)},
}
"""Family -> names and shapes of tensors that its loader passes over."""


def saved(folder: Path, family: str, extra: dict[str, tuple[int, ...]]) -> Path:
    tiny_model(family).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **{name: torch.ones(shape) for name, shape in extra.items()}}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors*"))}


@pytest.mark.parametrize("family", EXTRA)
def test_a_model_with_further_tensors_becomes_what_it_becomes_without_them(
    family: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + (i * i + i // 7) % 90) for i in range(4000)))
    calibration = {"source": "text", "path": str(text), "sequences": 4, "length": 32}
    recipe = Recipe.from_dict({"version": 1, "calibration": calibration, "stages": STAGES})
    without, given = (
        saved(tmp_path / name, family, extra)
        for name, extra in (("without", {}), ("given", EXTRA[family]))
    )
    expected = mcsharp_sdk.compress(recipe, without, tmp_path / "expected", progress=False)
    done = mcsharp_sdk.compress(recipe, given, tmp_path / "found", progress=False)
    assert weights(done.output) == weights(expected.output)
    assert done.plan.bytes_after == expected.plan.bytes_after
    more = sum(4 * torch.Size(shape).numel() for shape in EXTRA[family].values())
    assert done.plan.bytes_before == expected.plan.bytes_before + more

    (warning,) = set(done.warnings) - set(expected.warnings)
    assert all(name in warning for name in EXTRA[family])
    assert warning in json.loads((done.output / "mcsharp_report.json").read_text())["warnings"]
    assert evaluate(done.output, text, window=32, max_tokens=64, device="cpu").perplexity > 1


def test_what_is_left_out_is_known_from_headers(tmp_path: Path) -> None:
    source = SourceModel(saved(tmp_path, "glm4_moe", EXTRA["glm4_moe"]))
    assert set(source.names.left_out) == set(EXTRA["glm4_moe"])
    assert set(source.names.memory) == set(source.checkpoint.names) - set(EXTRA["glm4_moe"])
    assert set(source.names.memory.values()) <= set(source.model.state_dict())
