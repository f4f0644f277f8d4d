"""The folder as it is in other runtimes: onnxruntime-genai, and Node.js without Python.

Skipped where a runtime is not installed. For Node.js: ``npm install --ignore-scripts`` in
``examples/onnx_node``.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from mcsharp_exporters.onnx_model_runner import OnnxModel

import mcsharp_sdk
from mcsharp_sdk.embedded import model_directory

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPT = "Return the number of items"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that comes with the package, as it is."""
    folder = tmp_path_factory.mktemp("embedded") / "onnx"
    mcsharp_sdk.export("onnx_model", model_directory(), folder)
    return folder


@pytest.fixture(scope="module")
def expected(exported: Path) -> list[int]:
    from transformers import AutoTokenizer

    ids = np.array(AutoTokenizer.from_pretrained(exported)(PROMPT)["input_ids"])
    return list(OnnxModel(exported, "cpu").generate(ids, 40))


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def until_end(tokens: list[int], exported: Path) -> list[int]:
    """Tokens up to the first that ends a text."""
    end = json.loads((exported / "genai_config.json").read_text())["model"]["eos_token_id"]
    stops = [tokens.index(stop) for stop in np.atleast_1d(end).tolist() if stop in tokens]
    return tokens[: min(stops) + 1] if stops else tokens


def test_a_loop_of_ones_own_says_the_same(exported: Path, expected: list[int]) -> None:
    tokens, text = example("onnx_model").generate(exported, PROMPT)
    assert tokens == until_end(expected, exported)
    assert text


def test_onnxruntime_genai_says_the_same(exported: Path, expected: list[int]) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    assert example("onnx_genai").stream(exported, PROMPT) == until_end(expected, exported)


def test_onnxruntime_genai_says_the_same_in_a_batch(exported: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    prompts = [PROMPT, "If"]
    model = genai.Model(str(exported))
    tokenizer = genai.Tokenizer(model)

    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    assert len(set(lengths)) == 2

    def run(prompts: list[str], longest: int) -> list[list[int]]:
        """What follows each prompt; onnxruntime-genai fills shorter ones up at their end."""
        settings = genai.GeneratorParams(model)
        settings.set_search_options(
            max_length=longest + 12, batch_size=len(prompts), do_sample=False
        )
        generator = genai.Generator(model, settings)
        generator.append_tokens(tokenizer.encode_batch(prompts))
        while not generator.is_done():
            generator.generate_next_token()
        rows = [generator.get_sequence(row).tolist() for row in range(len(prompts))]
        return [until_end(row[longest:], exported) for row in rows]

    alone = [run([prompt], n)[0] for prompt, n in zip(prompts, lengths, strict=True)]
    assert run(prompts, max(lengths)) == alone


def test_node_says_the_same_without_python(exported: Path, expected: list[int]) -> None:
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    folder = EXAMPLES / "onnx_node"
    if not (folder / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip("onnxruntime-node is not installed: npm install --ignore-scripts there")
    command = ["node", "generate.mjs", str(exported), PROMPT, "40"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0]) == until_end(expected, exported)


def test_node_says_how_it_is_called() -> None:
    if shutil.which("node") is None or not (EXAMPLES / "onnx_node" / "node_modules").is_dir():
        pytest.skip("Node.js or the packages of examples/onnx_node are not installed")
    done = subprocess.run(
        ["node", "generate.mjs"], cwd=EXAMPLES / "onnx_node", capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "usage: node generate.mjs FOLDER PROMPT" in done.stderr


def test_examples_take_a_folder_and_a_prompt(exported: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "onnx_model.py"), str(exported), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[")
