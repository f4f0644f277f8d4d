"""Export the routers of the embedded model and compare them with torch on random hidden states.

Run from a clean checkout after ``make demo``:  .venv/bin/python examples/onnx_routers.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from mcsharp_exporters.onnx_runner import OnnxRouters
from transformers import AutoModelForCausalLM

import mcsharp_sdk
from mcsharp_sdk.embedded import model_directory
from mcsharp_sdk.models.routing import read_router, route


def main() -> None:
    """Print, layer by layer, how many tokens get the same experts from both."""
    model = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "routers"
        mcsharp_sdk.export("onnx_routers", model_directory(), output)
        routers = OnnxRouters(output)
    print(f"{len(routers.layers)} routers on {routers.provider}")
    for layer in routers.layers:
        router = read_router(model.model.layers[layer].mlp.gate, model.config, layer)
        hidden = torch.randn(1000, router.hidden_size)
        found, expected = routers(layer, hidden), route(router, hidden)
        same = (found.indices == expected.indices).all(dim=-1).float().mean().item()
        error = (found.weights - expected.weights).abs().max().item()
        print(f"layer {layer}: {same:.1%} of tokens alike, weights within {error:.0e}")


if __name__ == "__main__":
    main()
