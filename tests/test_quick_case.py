"""Really trained small models through the whole path: recipe, compression, evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import mcsharp_sdk
from mcsharp_sdk.evaluation.cost import model_cost

RECIPE = """\
version: 1
calibration: {{source: text, path: {text}, sequences: 24, length: 256, sampling: first}}
stages:
  - {{type: ExpertStats, group_size: 64}}
  - {{type: BitAllocation, target_bits: 2.5}}
  - {{type: GPTQQuantize, group_size: 64}}
exports:
  - {{type: safetensors}}
  - {{type: onnx_routers}}
"""


@pytest.mark.parametrize("name", ["mixtral-mini", "deepseek-mini"])
def test_a_trained_model_goes_through_the_whole_path(
    name: str, shared_path: Callable[[str], Path], tmp_path: Path
) -> None:
    model = shared_path(f"models/{name}")
    calibration, evaluation = (
        shared_path(f"data/wikitext2-{part}.txt") for part in ("valid", "test")
    )
    recipe = mcsharp_sdk.Recipe.from_text(RECIPE.format(text=calibration))
    output = mcsharp_sdk.compress(recipe, model, tmp_path / "out", progress=False).output

    before, after = (
        mcsharp_sdk.evaluate(folder, evaluation, window=256, max_tokens=8192)
        for folder in (model, output)
    )
    # These models are under-trained and feel little, so a few percent is all they may lose.
    assert after.perplexity < 1.1 * before.perplexity
    # Experts that no token reached cost nothing at any width, and get the narrowest.
    assert 2.4 < (after.expert_nominal_bits or 0) <= 2.5
    assert after.activated_expert_ratio == 1.0

    cost = model_cost(output)
    files = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    assert cost.weight_bytes == pytest.approx(files, rel=0.01)
    bits = json.loads((output / "bit_allocation.json").read_text())["bits"]
    manifest = json.loads((output / "onnx_routers" / "manifest.json").read_text())
    assert len(manifest["layers"]) == len(bits)
