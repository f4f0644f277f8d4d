"""The runner: providers, inputs, and folders that must not be trusted."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mcsharp_exporters.onnx_model_runner import OnnxModel
from mcsharp_exporters.onnx_routers import export_onnx_routers
from mcsharp_exporters.onnx_runner import OnnxRouters
from mcsharp_exporters.router_pruning import ModelPruning, RouterPruning
from router_cases import EXPERTS, HIDDEN, LAYER, TOP_K, hidden_states, router_case

from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.runtime.pruning_layout import PruningLayout, RulePruning

CUDA_IS_THERE = "CUDAExecutionProvider" in onnxruntime.get_available_providers()

FILE = f"router_layer_{LAYER:05d}.onnx"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export_onnx_routers([router_case("deepseek_v3")], tmp_path / "out")
    return tmp_path / "out"


def test_numpy_in_numpy_out_and_the_same_as_torch(folder: Path) -> None:
    routers = OnnxRouters(folder, "cpu")
    hidden = hidden_states(10)
    arrays = routers(LAYER, hidden.numpy()[::-1])
    assert (arrays.indices, arrays.weights, arrays.keep) == tuple(arrays)
    assert [a.dtype for a in arrays] == [np.int64, np.float32, np.bool_]
    for array, tensor in zip(arrays, routers(LAYER, hidden.flip(0)), strict=True):
        assert np.array_equal(array, tensor.numpy())


def test_the_provider_that_runs_is_named(folder: Path) -> None:
    assert OnnxRouters(folder, "cpu").provider == "CPUExecutionProvider"
    routers = OnnxRouters(folder)
    assert routers.provider == routers._sessions[LAYER].get_providers()[0]


@pytest.mark.skipif(CUDA_IS_THERE, reason="needs an onnxruntime without CUDA")
def test_a_fallback_is_warned_of_or_refused(folder: Path) -> None:
    with pytest.warns(UserWarning, match="CUDA is not there: routers run on CPUExecutionProvider"):
        OnnxRouters(folder, "cuda")
    with pytest.raises(RunError, match=r"no CUDA.*mcsharp_sdk\[gpu\]"):
        OnnxRouters(folder, "cuda", allow_fallback=False)


@pytest.mark.skipif(not CUDA_IS_THERE, reason="needs onnxruntime-gpu")
def test_cuda_runs_or_says_that_it_does_not(folder: Path) -> None:
    try:
        routers = OnnxRouters(folder, "cuda", allow_fallback=False)
    except RunError:
        with pytest.warns(UserWarning, match="CUDA is not there"):
            assert OnnxRouters(folder, "cuda").provider == "CPUExecutionProvider"
        return
    assert routers.provider == "CUDAExecutionProvider"
    found, expected = (r(LAYER, hidden_states(100)) for r in (routers, OnnxRouters(folder, "cpu")))
    assert torch.equal(found.indices, expected.indices)


def test_an_unknown_provider_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="auto, cuda or cpu"):
        OnnxRouters(folder, "tpu")  # type: ignore[arg-type]


def test_without_onnxruntime_it_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RunError, match=r"pip install 'mcsharp_sdk\[cpu\]'"):
        OnnxRouters(folder)


def test_two_builds_side_by_side_are_warned_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            distribution(name)
        except PackageNotFoundError:
            info = tmp_path / "site" / f"{name.replace('-', '_')}-1.0.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.warns(UserWarning, match="both installed"):
        OnnxRouters(folder, "cpu")


@pytest.mark.parametrize(
    ("layer", "hidden", "message"),
    [
        (9, torch.zeros(1, HIDDEN), "layer 9 has no exported router; layers are 1"),
        (LAYER, torch.zeros(1, HIDDEN + 1), r"\[tokens, 64\], got float32 \[1, 65\]"),
        (LAYER, torch.zeros(1, 1, HIDDEN), r"got float32 \[1, 1, 64\]"),
        (LAYER, torch.zeros(1, HIDDEN).bfloat16(), "takes float32 .* got bfloat16"),
        (LAYER, np.zeros((1, HIDDEN)), "takes float32 .* got float64"),
        (LAYER, [[0.0] * HIDDEN], "hidden states are a torch tensor or a numpy array.* list"),
        (LAYER, torch.full((1, HIDDEN), torch.nan), "give weights that are NaN"),
    ],
)
def test_bad_inputs_are_explained(folder: Path, layer: int, hidden: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnnxRouters(folder, "cpu")(layer, hidden)


@pytest.fixture
def ruled(tmp_path: Path) -> OnnxRouters:
    """Routers that drop all but the first expert of each token, unless it is protected."""
    router = router_case("mixtral")
    rule = RulePruning("attention", 0.1, 0.0, {LAYER: (1.0,) * (TOP_K - 1)})
    model = ModelPruning(PruningLayout("rule", rule), lambda layer: {})
    pruning = RouterPruning("rule", model)
    export_onnx_routers([router], tmp_path / "ruled", pruning=pruning)
    return OnnxRouters(tmp_path / "ruled", "cpu")


def test_protected_tokens_keep_all_experts(ruled: OnnxRouters) -> None:
    hidden, protected = hidden_states(10), torch.arange(10) % 3 == 0
    kept = ruled(LAYER, hidden, protected).keep.sum(-1)
    assert torch.equal(kept, torch.where(protected, TOP_K, 1))
    every_other = np.tile(protected.numpy(), (2, 1)).T.reshape(-1)[::2]  # not contiguous
    arrays = ruled(LAYER, hidden.numpy(), every_other)
    assert np.array_equal(arrays[2].sum(-1), kept.numpy())


def test_no_token_is_protected_unless_it_is_said(ruled: OnnxRouters) -> None:
    hidden = hidden_states(10)
    assert ruled(LAYER, hidden).keep.sum(-1).tolist() == [1] * 10
    found = ruled(LAYER, hidden)
    assert found.weights[~found.keep].tolist() == [0.0] * 10 * (TOP_K - 1)
    assert found.indices.max() < EXPERTS


@pytest.mark.parametrize(
    ("protected", "message"),
    [
        (torch.zeros(4).bool(), r"bool of shape \[3\], .* got bool \[4\]"),
        (torch.zeros(3, 1).bool(), r"got bool \[3, 1\]"),
        (torch.zeros(3), r"got float32 \[3\]"),
        (np.zeros(3, np.int64), r"got int64 \[3\]"),
    ],
)
def test_bad_protection_is_explained(ruled: OnnxRouters, protected: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"router of layer {LAYER} takes protected .*{message}"):
        ruled(LAYER, torch.zeros(3, HIDDEN), protected)
    with pytest.raises(InputError, match=r"protected tokens are a torch tensor.* list"):
        ruled(LAYER, torch.zeros(3, HIDDEN), [False] * 3)  # type: ignore[call-overload]


def test_routers_that_protect_nothing_say_so(folder: Path) -> None:
    with pytest.raises(InputError, match="exported with pruning 'off', not 'rule' or 'both'"):
        OnnxRouters(folder, "cpu")(LAYER, torch.zeros(3, HIDDEN), torch.zeros(3).bool())


def test_folders_of_version_1_are_still_read(folder: Path) -> None:
    """They were written before there was pruning."""
    hidden = hidden_states(20)
    now = OnnxRouters(folder, "cpu")(LAYER, hidden)
    graph = onnx.load(folder / FILE)
    old = ("pruning", "thresholds", "network_units", "format_version")
    facts = {p.key: p.value for p in graph.metadata_props if p.key not in old}
    onnx.helper.set_model_props(graph, facts)
    data = graph.SerializeToString()
    (folder / FILE).write_bytes(data)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["pruning"]
    manifest["version"] = 1
    for name in ("thresholds", "network_units"):
        del manifest["layers"][0][name]
    _entry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))(manifest)
    path.write_text(json.dumps(manifest))
    routers = OnnxRouters(folder, "cpu")
    assert routers.pruning == "off"
    assert all(map(torch.equal, routers(LAYER, hidden), now))


Change = Callable[[dict[str, Any]], None]


def _entry(**changes: Any) -> Change:
    return lambda manifest: manifest["layers"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_entry(file="../secret.onnx"), r"layers\.0\.file"),
        (_entry(file="/etc/passwd"), r"layers\.0\.file"),
        (_entry(file="sub/router_layer_00001.onnx"), r"layers\.0\.file"),
        (_entry(file="router_layer_00001.onnx\n"), r"layers\.0\.file"),
        (_entry(file="router_layer_00002.onnx"), r"router_layer_00002\.onnx: missing"),
        (_entry(sha256="0" * 64), rf"{FILE}: its SHA-256"),
        (_entry(bytes=1), rf"{FILE}: has \d+ bytes, manifest\.json says 1"),
        (_entry(layer=4), rf"{FILE}: its layer is 1, manifest\.json says 4"),
        (_entry(hidden_size=65), rf"{FILE}: its hidden_size is 64"),
        (lambda m: m.update(dtype="bf16"), rf"{FILE}: its dtype is fp32"),
        (_entry(layer=-1), r"layers\.0\.layer"),
        (_entry(more=1), r"layers\.0\.more"),
        (lambda m: m.update(version=3), "version"),
        (lambda m: m.update(pruning="rule"), rf"{FILE}: its pruning is off, .* says rule"),
        (lambda m: m.update(pruning="some"), "pruning"),
        (_entry(inputs={"protected": ["tokens"]}), rf"{FILE}: its inputs"),
        (lambda m: m.update(format="other"), "format"),
        (lambda m: m.update(layers=[]), "layers"),
        (lambda m: m.update(layers=m["layers"] * 2), "twice"),
    ],
)
def test_a_doctored_manifest_is_refused(folder: Path, change: Change, message: str) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        OnnxRouters(folder, "cpu")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"layers": 3}', "\ud800", "[" * 100_000])
def test_a_broken_manifest_is_an_error_that_names_it(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=r"manifest\.json"):
        OnnxRouters(folder, "cpu")


def test_a_folder_of_routers_is_no_model(folder: Path) -> None:
    with pytest.raises(InputError, match="is not an ONNX model: open it with OnnxRouters of"):
        OnnxModel(folder)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.manifest\.json"):
        OnnxRouters(tmp_path / "nowhere")


def test_a_changed_file_is_refused_by_name(folder: Path) -> None:
    data = bytearray((folder / FILE).read_bytes())
    data[-1] ^= 1
    (folder / FILE).write_bytes(data)
    with pytest.raises(InputError, match=rf"{FILE}: its SHA-256 is not the one in manifest"):
        OnnxRouters(folder, "cpu")


def test_a_file_that_onnxruntime_cannot_open_is_named(folder: Path) -> None:
    data = b"no protobuf"
    (folder / FILE).write_bytes(data)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    _entry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=rf"{FILE}: onnxruntime cannot open it"):
        OnnxRouters(folder, "cpu")
