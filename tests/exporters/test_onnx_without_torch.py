"""Exports are run where torch, transformers and onnx are not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from mcsharp_exporters.graph_names import DtypeName
from mcsharp_exporters.onnx_model_runner import OnnxModel
from mcsharp_exporters.onnx_routers import export_onnx_routers
from mcsharp_exporters.onnx_runner import BFLOAT16, OnnxRouters
from onnx_models import compressed
from router_cases import LAYER, hidden_states, router_case

import mcsharp_sdk

MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "safetensors", "onnx", "numba"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""

ROUTERS = """
import numpy as np
from mcsharp_exporters.onnx_runner import OnnxRouters

folder, given, found = sys.argv[1:]
routers = OnnxRouters(folder, "cpu")
np.savez(found, *routers(*routers.layers, np.load(given)))
try:
    routers(*routers.layers, [[0.0]])
except ValueError as error:
    assert "not of type list" in str(error)
else:
    raise AssertionError("a list was taken")
"""

MODEL = """
import numpy as np
from mcsharp_exporters.onnx_model_runner import OnnxModel

folder, given, found = sys.argv[1:]
model, ids = OnnxModel(folder, "cpu", threads=1), np.load(given)
np.savez(found, model(ids)[0], list(model.generate(ids[0], 4)))
"""


def without_torch(script: str, folder: Path, given: np.ndarray, scratch: Path) -> list[np.ndarray]:
    """What the script finds, in a process of its own."""
    given_file, found_file = scratch / "given.npy", scratch / "found.npz"
    np.save(given_file, given)
    command = [sys.executable, "-c", MISSING + script, str(folder), str(given_file)]
    subprocess.run([*command, str(found_file)], check=True)
    with np.load(found_file) as found:
        return list(found.values())


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_routers_run(dtype: DtypeName, kind: torch.dtype, tmp_path: Path) -> None:
    folder = tmp_path / "routers"
    export_onnx_routers([router_case("deepseek_v3")], folder, dtype)
    hidden = hidden_states(10, kind)
    found = without_torch(ROUTERS, folder, hidden.numpy(), tmp_path)
    expected = OnnxRouters(folder, "cpu")(LAYER, hidden)
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(found, expected, strict=True))


def test_a_model_runs(tmp_path: Path) -> None:
    source = compressed(tmp_path / "model", "mixtral", num_hidden_layers=1)
    mcsharp_sdk.export("onnx_model", source, tmp_path / "onnx")
    ids = np.arange(6).reshape(1, -1)
    logits, tokens = without_torch(MODEL, tmp_path / "onnx", ids, tmp_path)
    model = OnnxModel(tmp_path / "onnx", "cpu", threads=1)
    assert np.array_equal(logits, model(ids)[0])
    assert tokens.tolist() == list(model.generate(ids[0], 4))


def test_the_number_of_bfloat16_is_that_of_onnx() -> None:
    assert BFLOAT16 == onnx.TensorProto.BFLOAT16
