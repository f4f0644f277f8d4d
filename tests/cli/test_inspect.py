"""mcsharp inspect, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import save_tiny_model

from mcsharp_sdk.cli import main


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main.run([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


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


def test_a_compressed_model_shows_its_widths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mcsharp_sdk.models.source import SourceModel
    from mcsharp_sdk.runtime.hf_quantizer import pack_modules
    from mcsharp_sdk.runtime.layout import PackedLayout

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


def test_kernels_are_shown_for_every_matrix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mcsharp_sdk.models.source import SourceModel
    from mcsharp_sdk.runtime.hf_quantizer import pack_modules
    from mcsharp_sdk.runtime.layout import PackedLayout

    save_tiny_model(tmp_path / "original", "mixtral")
    layout = PackedLayout(32, dict.fromkeys(range(3), (1, 2, 3, 2)), {"self_attn.q_proj": 4})
    model = SourceModel(tmp_path / "original").model
    pack_modules(model, layout)
    save_packed(model, tmp_path / "packed", layout.to_dict())
    monkeypatch.setenv("MCSHARP_KERNEL", "chunked")
    assert run("inspect", tmp_path / "packed", "--kernels", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    numbers = {entry["matrix"]: entry["count"] for entry in found["matrices"]}
    assert numbers["model.layers.*.mlp.experts.width_2.gate_up"] == 3 * 2
    assert numbers["model.layers.*.self_attn.q_proj"] == 3
    assert len(numbers) == 3 * 2 + 1
    kernels = {name for entry in found["matrices"] for name in entry["kernels"].values()}
    assert kernels == {"chunked"}
    assert run("inspect", tmp_path / "packed", "--kernels") == 0
    assert "self_attn.q_proj" in capsys.readouterr().out
    monkeypatch.setenv("MCSHARP_KERNEL", "quickest")
    assert run("inspect", tmp_path / "packed", "--kernels") == 2
    assert "MCSHARP_KERNEL=quickest: no such kernel" in capsys.readouterr().err


def test_kernels_of_a_model_that_is_not_compressed_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", model, "--kernels") == 2
    assert "has no packed matrices: it is not compressed" in capsys.readouterr().err
