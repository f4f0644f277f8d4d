"""Run a pruned mixture-of-experts block with its router in onnxruntime and its packed experts here.

A small model is compressed and given a pruning rule; its routers become ONNX graphs that carry the
rule. Then each block is computed twice on a text: by the model, and from the graph's answer.

Run from a clean checkout after ``make demo``:  .venv/bin/python examples/onnx_pruned_block.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from mcsharp_exporters.onnx_runner import OnnxRouters
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import mcsharp_sdk
from mcsharp_sdk.embedded import model_directory
from mcsharp_sdk.pruning import most_important, token_importance

METRIC, PROTECTED_SHARE = "variance", 0.05
"""What makes a token important, and how many tokens keep all experts. Unlike ``attention`` this
metric looks at nothing but the router's own input, so that it is computed in two lines below."""

RECIPE = mcsharp_sdk.Recipe.from_dict(
    {
        "version": 1,
        "calibration": {"source": "embedded", "sequences": 8, "length": 128},
        "stages": [
            {"type": "ExpertStats", "group_size": 64},
            {"type": "BitAllocation", "target_bits": 2.0},
            {"type": "GPTQQuantize", "group_size": 64},
            {"type": "TokenProtection", "metric": METRIC, "protect_ratio": PROTECTED_SHARE},
        ],
    }
)
TEXT = "Return the number of items in the list. Raise an error if the argument is not a sequence. "


def main() -> None:
    """Print, layer by layer, the share of experts that is computed and how far both are apart."""
    with tempfile.TemporaryDirectory() as folder:
        compressed, exported = Path(folder) / "compressed", Path(folder) / "routers"
        mcsharp_sdk.compress(RECIPE, model_directory(), compressed)
        mcsharp_sdk.export("onnx_routers", compressed, exported, pruning="rule")
        routers = OnnxRouters(exported)
        model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32).eval()
        tokens = AutoTokenizer.from_pretrained(compressed)(TEXT * 5, return_tensors="pt").input_ids
    print(f"{len(routers.layers)} routers with pruning '{routers.pruning}' on {routers.provider}")
    seen = blocks_of(model, tokens)
    model.set_expert_pruning("off")  # from here on the graphs prune
    for layer in routers.layers:
        hidden, expected = seen[layer]
        experts = model.model.layers[layer].mlp.experts
        output, computed = run_block(routers, layer, experts, hidden)
        error = ((output - expected).norm() / expected.norm()).item()
        print(f"layer {layer}: {computed:.1%} of the experts, relative difference {error:.0e}")


@torch.no_grad()
def run_block(
    routers: OnnxRouters, layer: int, experts: nn.Module, hidden: Tensor
) -> tuple[Tensor, float]:
    """A block's output for one sequence, and the share of the chosen experts that it computed.

    Parameters
    ----------
    hidden : (tokens, hidden) float32, what the block gets.
    """
    valid = torch.ones(1, len(hidden), dtype=torch.bool)
    importance = token_importance(METRIC, hidden[None], None, valid)
    protected = most_important(importance, valid, PROTECTED_SHARE)[0]
    indices, weights, keep = routers(layer, hidden, protected)
    # The number behind the last expert marks a slot that is not computed.
    indices = indices.masked_fill(~keep, experts.num_experts)  # type: ignore[arg-type]
    return experts(hidden, indices, weights), keep.float().mean().item()


@torch.no_grad()
def blocks_of(model: Any, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> what its mixture-of-experts block gets and gives, both (tokens, hidden)."""
    seen = {}
    for layer, decoder in enumerate(model.model.layers):

        def keep(_: nn.Module, given: tuple[Tensor], made: Tensor, layer: int = layer) -> None:
            seen[layer] = (given[0].flatten(0, -2), made.flatten(0, -2))

        decoder.mlp.register_forward_hook(keep)
    model(tokens, use_cache=False)
    return seen


if __name__ == "__main__":
    main()
