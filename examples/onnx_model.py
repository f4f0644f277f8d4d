"""Export a compressed model and run it with plain onnxruntime: a loop with a cache of one's own.

Run from a clean checkout after ``make demo``:  .venv/bin/python examples/onnx_model.py
With arguments it runs a folder that is there:  .venv/bin/python examples/onnx_model.py DIR PROMPT
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

import mcsharp_sdk
from mcsharp_sdk.embedded import model_directory

NEW_TOKENS = 40


def main() -> None:
    """Print what follows a prompt."""
    if len(sys.argv) > 1:
        print(*generate(Path(sys.argv[1]), sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        compressed, exported = Path(folder) / "compressed", Path(folder) / "onnx"
        mcsharp_sdk.compress("quickstart", model_directory(), compressed)
        mcsharp_sdk.export("onnx_model", compressed, exported)
        print(*generate(exported, "Return the number of"))


def generate(folder: Path, prompt: str) -> tuple[list[int], str]:
    """The most likely tokens behind a prompt, and their text."""
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    # Before the first token the cache of every layer is empty.
    cache = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), DTYPES[value.type])
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    names = [value.name for value in session.get_outputs()]
    ids = np.array([tokenizer.encode(prompt).ids], np.int64)
    seen, generated = 0, list[int]()
    while len(generated) < NEW_TOKENS:
        seen += ids.shape[1]
        inputs = {"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64), **cache}
        outputs = dict(zip(names, session.run(None, inputs), strict=True))
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        generated.append(int(outputs["logits"][0, -1].argmax()))
        if generated[-1] in np.atleast_1d(config["eos_token_id"]):
            break
        ids = np.array([[generated[-1]]], np.int64)
    return generated, tokenizer.decode(generated)


DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


if __name__ == "__main__":
    main()
