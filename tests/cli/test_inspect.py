"""mcsharp inspect, as a user calls it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from tiny_models import save_tiny_model

from mcsharp_sdk.models.shards import Checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "deepseek_v3")


def test_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", model, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == 3
    assert found["experts_per_layer"] == {"1": 8, "2": 8}
    assert found["top_k"] == 3
    assert found["router"]["scoring"] == "sigmoid"
    assert found["supported"] is True
    assert found["compressed"] is False
    assert found["nominal_bits"] == found["stored_bits"] == 32
    assert found["parameters"] == sum(s["parameters"] for s in found["roles"].values())


def test_people_get_tables(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", model) == 0
    shown = capsys.readouterr().out
    parts = ("deepseek_v3", "3, 2 with experts", "8 per layer, 3 per token", "correction bias")
    for part in (*parts, "1 of 2 groups", "not compressed", "attention", "embeddings"):
        assert part in shown


def test_experts_that_the_config_does_not_have_are_told_by_the_names_of_tensors(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert run("inspect", other) == 0
    shown = capsys.readouterr().out
    assert "8 per layer by the names of tensors; the config has none" in shown
    assert "per token" not in shown.split("parameters")[0]
    assert run("inspect", model, "--json") == 0
    assert json.loads(capsys.readouterr().out)["experts_by_name"] is False


def test_a_dense_model_has_no_experts_whatever_its_config_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = save_tiny_model(tmp_path, "qwen3_moe", mlp_only_layers=[0, 1, 2])
    assert run("inspect", dense, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["experts_per_layer"], found["experts_by_name"]) == ({}, False)


def test_a_compressed_model_shows_its_widths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mcsharp_sdk.models.source import SourceModel
    from mcsharp_sdk.runtime.layout import PackedLayout
    from mcsharp_sdk.runtime.packed_model import pack_modules

    save_tiny_model(tmp_path / "original", "mixtral")
    layout = PackedLayout(16, {0: (1, 2, 3, 2), 1: (3, 3, 2, 2), 2: (2,) * 4}, {})
    model = SourceModel(tmp_path / "original").model
    pack_modules(model, layout)
    save_packed(model, tmp_path / "packed", layout.to_dict())
    assert run("inspect", tmp_path / "packed") == 0
    shown = capsys.readouterr().out
    for part in ("1 2 3 2", "groups of 16", "2.167 nominal", "it is already"):
        assert part in shown


def save_packed(model: object, folder: Path, layout: dict[str, object]) -> None:
    """Tensors of the right names, shapes and dtypes; inspection reads no values."""
    import torch

    from mcsharp_sdk.models.shards import write_safetensors

    folder.mkdir()
    assert isinstance(model, torch.nn.Module)
    tensors = {n: torch.zeros_like(t, device="cpu") for n, t in model.state_dict().items()}
    write_safetensors(folder / "mcsharp.safetensors", tensors)
    model.config.save_pretrained(folder)  # type: ignore[union-attr,operator]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": layout}))


def test_a_folder_without_weights_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    assert run("inspect", tmp_path) == 2
    assert "no safetensors weights" in capsys.readouterr().err


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A model with packed experts and one packed linear in each of three layers."""
    import torch

    from mcsharp_sdk.models.source import SourceModel
    from mcsharp_sdk.runtime.layout import PackedLayout
    from mcsharp_sdk.runtime.packed_model import pack_modules

    save_tiny_model(tmp_path / "original", "mixtral", dtype=torch.bfloat16)
    layout = PackedLayout(32, dict.fromkeys(range(3), (1, 2, 3, 2)), {"self_attn.q_proj": 4})
    model = SourceModel(tmp_path / "original").model
    pack_modules(model, layout)
    save_packed(model, tmp_path / "packed", layout.to_dict())
    return tmp_path / "packed"


def test_kernels_are_shown_for_every_matrix(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCSHARP_KERNEL", "chunked")
    assert run("inspect", packed, "--kernels", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    numbers = {entry["matrix"]: entry["count"] for entry in found["matrices"]}
    assert numbers["model.layers.*.mlp.experts.width_2.gate_up"] == 3 * 2
    assert numbers["model.layers.*.self_attn.q_proj"] == 3
    assert len(numbers) == 3 * 2 + 1
    kernels = {name for entry in found["matrices"] for name in entry["kernels"].values()}
    assert kernels == {"chunked"}
    assert {entry["chosen"] for entry in found["matrices"]} == {"MCSHARP_KERNEL"}
    assert run("inspect", packed, "--kernels") == 0
    assert "self_attn.q_proj" in capsys.readouterr().out
    monkeypatch.setenv("MCSHARP_KERNEL", "quickest")
    assert run("inspect", packed, "--kernels") == 2
    assert "MCSHARP_KERNEL=quickest: no such kernel" in capsys.readouterr().err


def test_kernels_are_measured_kept_and_gone_by_from_then_on(
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mcsharp_sdk.kernels import measuring

    file = tmp_path / "crossovers.json"
    monkeypatch.setenv("MCSHARP_CROSSOVERS", str(file))

    def shown(*options: str) -> dict[str, Any]:
        assert run("inspect", packed, "--kernels", "--device", "cpu", "--json", *options) == 0
        return dict(json.loads(capsys.readouterr().out))

    assert {m["chosen"] for m in shown()["matrices"]} == {"built in"}
    monkeypatch.setattr(measuring, "ROUNDS", 2)
    measured = shown("--measure")
    assert {m["chosen"] for m in measured["matrices"]} == {"measured"}
    assert shown() == measured
    assert {m["chosen"] for m in shown("--dtype", "float32")["matrices"]} == {"built in"}
    (kept,) = json.loads(file.read_text())["devices"].values()
    by_shape = {(m["rows"], m["columns"], m["bits"]): m["kernels"] for m in measured["matrices"]}
    assert len(kept) == len(by_shape)
    for (rows, columns, bits), kernels in by_shape.items():
        (steps,) = (s for key, s in kept.items() if key.startswith(f"{rows} x {columns}, {bits} "))
        for tokens, kernel in kernels.items():
            assert kernel == [name for first, name in steps if first <= int(tokens)][-1]


def test_measuring_into_a_file_of_something_else_is_refused_before_anything_is_timed(
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    monkeypatch.setenv("MCSHARP_CROSSOVERS", str(tmp_path / "notes.json"))
    assert run("inspect", packed, "--kernels", "--measure") == 2
    assert "notes.json" in capsys.readouterr().err
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'
    assert run("inspect", packed, "--measure") == 2
    assert "--measure, --device and --dtype go with --kernels" in capsys.readouterr().err


def test_on_a_gpu_experts_are_shown_by_layers(
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mcsharp_sdk.evaluation import kernel_choice
    from mcsharp_sdk.kernels import crossovers, gpu_dense

    monkeypatch.setattr(kernel_choice, "choose_device", lambda name: "cuda")
    monkeypatch.setattr(kernel_choice, "missing_support", lambda device: "")
    monkeypatch.setattr(crossovers, "hardware", lambda device: "A GPU")
    monkeypatch.setattr(kernel_choice, "hardware", lambda device: "A GPU")
    monkeypatch.setenv("MCSHARP_CROSSOVERS", str(tmp_path / "crossovers.json"))
    found = kernel_choice.kernel_choices(packed)
    assert [m.matrix for m in found.matrices] == ["model.layers.*.self_attn.q_proj"]
    (layers,) = found.layers
    assert (layers.layers, layers.widths, layers.chosen) == (3, (1, 2, 3), "built in")
    assert (layers.tilings[1], layers.tilings[256]) == ("gemv", "gemm")
    assert layers.tilings[4096] == "gemm"
    with monkeypatch.context() as patch:
        patch.setattr(gpu_dense, "fits", lambda case: True)
        (layers,) = kernel_choice.kernel_choices(packed).layers
        assert (layers.tilings[256], layers.tilings[4096]) == ("gemm", "dense")
    (case,) = kernel_choice.products_of(packed).layers
    assert (case.experts, case.slots, case.rows) == (4, 2, 2 * case.intermediate)
    crossovers.save("cuda", {case.key(): ((1, "gemv_32"), (16, "gemm_16"))})
    (layers,) = kernel_choice.kernel_choices(packed).layers
    assert layers.chosen == "measured"
    assert (layers.tilings[8], layers.tilings[16]) == ("gemv_32", "gemm_16")
    assert run("inspect", packed, "--kernels") == 0
    assert "all of a layer at once" in capsys.readouterr().out


def test_kernels_of_a_model_that_is_not_compressed_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", model, "--kernels") == 2
    assert "has no packed matrices: it is not compressed" in capsys.readouterr().err


def test_verifying_names_what_is_not_a_number(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", model, "--verify") == 0
    told = capsys.readouterr().out
    assert "all finite" in told
    assert "no SHA256SUMS" in told
    assert run("inspect", model, "--verify", "--json") == 0
    verified = json.loads(capsys.readouterr().out)["verified"]
    assert (verified["compressed"], verified["checksums"]) == (False, 0)

    broken = shutil.copytree(model, tmp_path / "broken")
    name = "model.layers.1.mlp.gate.weight"
    info = Checkpoint.open(broken).info(name)
    content = bytearray(info.file.read_bytes())
    content[info.offset : info.offset + 4] = struct.pack("<f", float("nan"))
    info.file.write_bytes(content)
    assert run("inspect", broken, "--verify") == 2
    assert f"{info.file.name}: {name}: 1 numbers are NaN" in capsys.readouterr().err
