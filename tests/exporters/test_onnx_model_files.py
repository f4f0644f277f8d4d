"""Loading an exported folder: damage is found and named, and wrong calls are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mcsharp_exporters.onnx_model_runner import OnnxModel
from onnx_models import compressed

import mcsharp_sdk
from mcsharp_sdk.errors import InputError


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    source = compressed(folder / "model", "mixtral", num_hidden_layers=1)
    mcsharp_sdk.export("onnx_model", source, folder / "onnx")
    return folder / "onnx"


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "copy"))


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def move(file: Path) -> None:
    file.rename(file.parent.parent / file.name)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "corrupted": (flip_a_bit, "damaged: its SHA-256 is not the one in manifest.json"),
    "truncated": (cut, "cut short: .* bytes, manifest.json says"),
    "moved": (move, "missing; "),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", "genai_config.json"])
def test_damage_is_found_and_named(folder: Path, file: str, damage: str) -> None:
    harm, message = DAMAGE[damage]
    harm(folder / file)
    with pytest.raises(InputError, match=f"{file}: {message}"):
        OnnxModel(folder, "cpu")
    with pytest.raises(InputError, match=f"{file}: {message}"):
        mcsharp_sdk.evaluate(folder)


def test_moved_weights_are_missed_with_advice(folder: Path) -> None:
    move(folder / "model.onnx.data")
    with pytest.raises(InputError, match="keep both in the same folder"):
        OnnxModel(folder, "cpu")


def test_sizes_alone_are_compared_on_request(folder: Path) -> None:
    flip_a_bit(folder / "model.onnx.data")
    OnnxModel(folder, "cpu", hashes=False)
    cut(folder / "model.onnx.data")
    with pytest.raises(InputError, match="cut short"):
        OnnxModel(folder, "cpu", hashes=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "version"),
        ({"files": []}, "files"),
        ({"files": [{"file": "../secret", "bytes": 1, "sha256": "0" * 64}] * 2}, "files.0.file"),
        ({"precision": "fp64"}, "precision"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        OnnxModel(folder, "cpu")


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the manifest of an ONNX model"):
        OnnxModel(tmp_path)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.zeros((1, 0), np.int64), None, "tokens are integers"),
        (np.zeros((1, 3)), None, "tokens are integers"),
        (np.array([[5, 128]]), None, "token 128 is none of the model's 128"),
        (np.array([[5, -1]]), None, "token -1 is none"),
        (np.ones((1, 200), np.int64), None, "200 tokens are more than 128 positions"),
        (np.ones((2, 3), np.int64), np.array([[0, 1, 1]] * 2), "padded at their end"),
        (np.ones((2, 3), np.int64), np.ones((2, 4)), "do not go with a mask"),
    ],
)
def test_wrong_tokens_are_refused(intact: Path, ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnnxModel(intact, "cpu")(ids, mask=mask)


def test_a_batch_that_goes_on_in_pieces_is_refused(intact: Path) -> None:
    model = OnnxModel(intact, "cpu")
    ids = np.ones((2, 3), np.int64)
    _, cache = model(ids)
    with pytest.raises(InputError, match="at once, or token by token"):
        model(ids, cache)
