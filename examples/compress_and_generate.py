"""Compress the embedded model from Python, then let both models continue a text.

Run from a clean checkout after ``make demo``:  .venv/bin/python examples/compress_and_generate.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from mcsharp_sdk import Recipe, compress, evaluate
from mcsharp_sdk.embedded import model_directory

RECIPE = Recipe.from_dict(
    {
        "version": 1,
        "calibration": {"source": "embedded", "sequences": 16, "length": 128},
        "stages": [
            {"type": "ExpertStats", "group_size": 64},
            {"type": "BitAllocation", "target_bits": 2.0},
            {"type": "GPTQQuantize", "group_size": 64},
        ],
    }
)


def main() -> None:
    """Print bits, perplexity and a continuation, before and after."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "compressed"
        compress(RECIPE, model_directory(), output)
        for model in (model_directory(), output):
            found = evaluate(model, window=128, max_tokens=2048)
            print(f"{found.stored_bits:.2f} bits, perplexity {found.perplexity:.1f}")
            print("  " + repr(continued(model, "Return the ")))


def continued(model: Path, start: str) -> str:
    """``start`` and the most likely 16 tokens after it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(start, return_tensors="pt")
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    tokens = loaded.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=16,
        do_sample=False,
    )
    return str(tokenizer.decode(tokens[0]))


if __name__ == "__main__":
    main()
