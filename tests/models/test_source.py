"""Opening models: what is refused, and with what words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.directory import routers_of_directory
from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.models.source import SourceModel


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no config.json"):
        SourceModel(tmp_path)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no mixture-of-experts layer"):
        SourceModel(tmp_path)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(InputError, match="unheard_of"):
        SourceModel(folder)


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "mixtral")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="already quantised"):
        SourceModel(folder)
    with pytest.raises(InputError, match="is quantised by 'gptq': give the original model, or one"):
        list(routers_of_directory(folder))


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_float16_is_computed_in_float32_on_a_cpu_and_stored_as_it_was(
    device: str, tmp_path: Path
) -> None:
    source = SourceModel(save_tiny_model(tmp_path, "mixtral", dtype=torch.float16), device)
    assert source.dtype == torch.float32
    stored = dict(source.stored_tensors("model.norm."))
    assert {t.dtype for t in stored.values()} == {torch.float16}


def test_what_is_float32_in_a_float16_checkpoint_stays_so(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "deepseek_v3", dtype=torch.float16)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    file = Checkpoint.open(folder).info(name).file
    written = torch.linspace(1, 1.001, 8)
    save_file({**load_file(file), name: written}, file, metadata={"format": "pt"})
    stored = dict(SourceModel(folder).stored_tensors("model.layers.1."))
    assert torch.equal(stored.pop(name), written)
    assert {t.dtype for t in stored.values()} == {torch.float16}


def test_routers_are_read_one_at_a_time(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "deepseek_v3")
    layers = [router.layer for router in routers_of_directory(folder)]
    assert layers == [1, 2]


def test_an_infinite_number_in_a_config_is_no_size(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "nemotron_h")
    config = json.loads((folder / "config.json").read_text())
    config["time_step_limit"] = [0.0, float("inf")]  # what NemotronH has if nothing is said
    (folder / "config.json").write_text(json.dumps(config))
    assert "Infinity" in (folder / "config.json").read_text()
    assert SourceModel(folder).topology.moe
