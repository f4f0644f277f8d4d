"""Exported routers: the same decisions as torch, and files that say what they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from mcsharp_exporters.graph_names import DtypeName
from mcsharp_exporters.graph_nodes import DTYPES
from mcsharp_exporters.onnx_routers import (
    OnnxRoutersExporter,
    export_onnx_routers,
)
from mcsharp_exporters.onnx_runner import OnnxRouters
from mcsharp_exporters.router_graph import router_graph
from mcsharp_exporters.router_manifest import read_manifest
from pydantic import ValidationError
from router_cases import CASES, EXPERTS, HIDDEN, LAYER, TOP_K, hidden_states, router_case
from transformers import AutoModelForCausalLM, AutoTokenizer

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.router_settings import RouterSettings
from mcsharp_sdk.models.routing import Router, Routing, read_router, route
from mcsharp_sdk.partial_folder import partial_folder

SharedPath = Callable[[str], Path]


def as_stored(router: Router, dtype: torch.dtype) -> Router:
    """The router with its weight rounded to ``dtype``, which torch then computes in float32."""
    return replace(router, weight=router.weight.to(dtype).float())


def run(router: Router, hidden: torch.Tensor, folder: Path, dtype: DtypeName) -> Routing:
    export_onnx_routers([router], folder, dtype)
    return OnnxRouters(folder, "cpu")(router.layer, hidden)


def same_rows(found: Routing, expected: Routing) -> torch.Tensor:
    return (found.indices == expected.indices).all(dim=-1) & (found.keep == expected.keep).all(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_onnx_equals_torch_on_1000_random_tokens(
    case: str, dtype: DtypeName, tmp_path: Path
) -> None:
    router = as_stored(router_case(case), DTYPES[dtype].torch)
    hidden = hidden_states(1000, DTYPES[dtype].torch)
    found = run(router, hidden, tmp_path / "out", dtype)
    expected = route(router, hidden.float())
    same = same_rows(found, expected)
    if dtype == "fp32":
        assert same.all()
    assert same.float().mean() >= 0.99
    torch.testing.assert_close(found.weights[same], expected.weights[same], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral-mini", "deepseek-mini"])
def test_onnx_equals_the_transformers_router_on_real_hidden_states(
    name: str, shared_path: SharedPath, tmp_path: Path
) -> None:
    model_dir, text = shared_path(f"models/{name}"), shared_path("data/wikitext2-test.txt")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(model_dir)(text.read_text()[:8000])["input_ids"][:1000]
    gates = {
        layer: module.mlp.gate
        for layer, module in enumerate(model.model.layers)
        if hasattr(module.mlp, "gate")
    }
    seen: dict[int, tuple[torch.Tensor, Routing]] = {}

    def recorder(layer: int) -> Callable[..., None]:
        def record(
            _: object, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, ...]
        ) -> None:
            _, weights, indices = output
            hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
            seen[layer] = (hidden, Routing(indices, weights, torch.ones_like(indices).bool()))

        return record

    for layer, gate in gates.items():
        gate.register_forward_hook(recorder(layer))
    with torch.no_grad():
        model(torch.tensor([tokens]))

    export_onnx_routers((read_router(g, model.config, n) for n, g in gates.items()), tmp_path / "o")
    routers = OnnxRouters(tmp_path / "o", "cpu")
    assert routers.layers == tuple(gates)
    for layer, (hidden, module_says) in seen.items():
        found = routers(layer, hidden)
        ours = route(read_router(gates[layer], model.config, layer), hidden)
        assert same_rows(found, ours).all()
        torch.testing.assert_close(found.weights, ours.weights, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.indices.sort().values, module_says.indices.sort().values)


def test_choice_before_scores_with_a_bias(tmp_path: Path) -> None:
    settings = RouterSettings("gpt_oss", EXPERTS, TOP_K, score_chosen_only=True, logit_bias=True)
    router = Router(0, settings, torch.randn(EXPERTS, HIDDEN), torch.randn(EXPERTS))
    hidden = hidden_states(1000)
    found, expected = run(router, hidden, tmp_path / "out", "fp32"), route(router, hidden)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-6, atol=1e-6)


def test_of_equal_scores_the_lower_index_comes_first(tmp_path: Path) -> None:
    router = Router(0, RouterSettings("mixtral", 6, 3), torch.ones(6, 4))
    found = run(router, torch.randn(5, 4), tmp_path / "out", "fp32")
    assert found.indices.tolist() == [[0, 1, 2]] * 5


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("case", ["mixtral", "deepseek_v2-groups", "deepseek_v3"])
def test_the_token_axis_is_free(case: str, tokens: int, tmp_path: Path) -> None:
    found = run(router_case(case), hidden_states(tokens), tmp_path / "out", "fp32")
    assert [t.shape for t in found] == [(tokens, TOP_K)] * 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_graphs_are_valid_opset_21_and_say_what_they_are(case: str, dtype: DtypeName) -> None:
    router = router_case(case)
    model = router_graph(router, dtype)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 10
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    (weight,) = [t for t in model.graph.initializer if t.name == "router_weight"]
    assert weight.data_type == DTYPES[dtype].onnx
    facts = {p.key: p.value for p in model.metadata_props}
    assert facts["model_type"] == router.settings.model_type
    assert facts["dtype"] == dtype
    assert facts["sdk_version"]
    numbers = ("layer", "experts", "top_k", "hidden_size", "scale", "renormalise", "groups")
    assert [json.loads(facts[n]) for n in numbers] == [
        LAYER,
        EXPERTS,
        TOP_K,
        HIDDEN,
        router.settings.scale,
        router.settings.renormalise,
        router.settings.groups,
    ]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Routers of layers 3 and 7."""
    router = router_case("mixtral")
    export_onnx_routers([replace(router, layer=7), replace(router, layer=3)], tmp_path / "out")
    return tmp_path / "out"


def test_the_manifest_describes_the_files(exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert (manifest["opset"], manifest["ir_version"], manifest["dtype"]) == (21, 10, "fp32")
    names = [entry["file"] for entry in manifest["layers"]]
    assert names == ["router_layer_00003.onnx", "router_layer_00007.onnx"]
    assert sorted(p.name for p in exported.iterdir()) == ["manifest.json", *names]
    for entry in manifest["layers"]:
        data = (exported / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["bytes"] == len(data)
        assert entry["inputs"] == {"hidden_states": ["tokens", HIDDEN]}
        assert set(entry["outputs"]) == {"topk_indices", "topk_weights", "keep_mask"}
        assert entry["settings"] == asdict(router_case("mixtral").settings)


def test_the_same_routers_give_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    router = router_case("mixtral")
    export_onnx_routers([replace(router, layer=3), replace(router, layer=7)], tmp_path / "again")
    for path in exported.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_what_is_there_is_not_touched(exported: Path) -> None:
    before = (exported / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="is there already"):
        export_onnx_routers([router_case("olmoe")], exported)
    assert (exported / "manifest.json").read_bytes() == before
    (exported / "thesis.tex").write_text("work of years")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        export_onnx_routers([router_case("olmoe")], exported, overwrite=True)
    assert (exported / "thesis.tex").exists()


def test_overwriting_replaces_the_whole_folder(exported: Path) -> None:
    export_onnx_routers([router_case("olmoe")], exported, overwrite=True)
    assert [entry.layer for entry in read_manifest(exported).layers] == [LAYER]
    assert len(list(exported.iterdir())) == 2
    assert [p.name for p in exported.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_onnx_routers([router_case("olmoe")], tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").exists()


def _breaking_off(router: Router) -> Iterator[Router]:
    yield router
    raise OSError("the disk went away")


def test_what_a_killed_export_left_goes_with_the_next_and_no_two_write_the_same(
    tmp_path: Path,
) -> None:
    with partial_folder(tmp_path / "out"), pytest.raises(InputError, match="is in use by another"):
        export_onnx_routers([router_case("olmoe")], tmp_path / "out")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "router_000.onnx").write_text("half")
    (tmp_path / ".out.lock").touch()
    export_onnx_routers([router_case("olmoe")], tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_behind_by_an_error(tmp_path: Path) -> None:
    router = router_case("mixtral")
    faults = {
        "two routers of layer 1": iter([router, router]),
        "no router to export": iter([]),
        "disk went away": _breaking_off(router),
    }
    for message, routers in faults.items():
        with pytest.raises((InputError, OSError), match=message):
            export_onnx_routers(routers, tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_weights_beyond_the_range_of_fp16_are_refused(tmp_path: Path) -> None:
    router = router_case("mixtral")
    large = replace(router, weight=router.weight * 1e6)
    with pytest.raises(InputError, match="layer 1: weights do not fit into fp16"):
        export_onnx_routers([large], tmp_path / "out", "fp16")
    broken = replace(router, weight=router.weight / 0)
    with pytest.raises(InputError, match="layer 1: weights are not finite"):
        export_onnx_routers([broken], tmp_path / "out", "fp32")


def test_the_exporter_writes_the_model_s_routers_into_its_folder(tmp_path: Path) -> None:
    context: Any = SimpleNamespace(
        routers=lambda: iter([router_case("mixtral")]), pruning_layout=lambda: None
    )
    OnnxRoutersExporter(type="onnx_routers", dtype="bf16").run(context, tmp_path)
    assert OnnxRouters(tmp_path / "onnx_routers", "cpu").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "settings", [{"dtype": "fp8"}, {"folder": "../up"}, {"fold": "x"}, {"pruning": "on"}]
)
def test_bad_settings_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        OnnxRoutersExporter.model_validate({"type": "onnx_routers", **settings})
