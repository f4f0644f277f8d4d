"""Stream text from an exported model with onnxruntime-genai.

pip install onnxruntime-genai
Run from a clean checkout after ``make demo``:  .venv/bin/python examples/onnx_genai.py
With arguments it runs a folder that is there:  .venv/bin/python examples/onnx_genai.py DIR PROMPT
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

import mcsharp_sdk
from mcsharp_sdk.embedded import model_directory

NEW_TOKENS = 40


def main() -> None:
    """Print what follows a prompt, as it comes."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        print("onnxruntime-genai is not installed: pip install onnxruntime-genai")
        return
    if len(sys.argv) > 1:
        stream(Path(sys.argv[1]), sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as folder:
        compressed, exported = Path(folder) / "compressed", Path(folder) / "onnx"
        mcsharp_sdk.compress("quickstart", model_directory(), compressed)
        mcsharp_sdk.export("onnx_model", compressed, exported)
        stream(exported, "Return the number of")


def stream(folder: Path, prompt: str) -> list[int]:
    """Print the text behind a prompt piece by piece; its tokens."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    ids = tokenizer.encode(prompt)
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + NEW_TOKENS, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(ids)
    text, generated = tokenizer.create_stream(), list[int]()
    while not generator.is_done():
        generator.generate_next_token()
        generated.append(int(generator.get_next_tokens()[0]))
        print(text.decode(generated[-1]), end="", flush=True)
    print()
    return generated


if __name__ == "__main__":
    main()
