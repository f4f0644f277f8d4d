"""What of a vision-language model must stay as it is on disk, whatever its config leaves out."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_deepseek_vl2 import save_tiny_deepseek_vl2
from tiny_vision_models import VISION_FAMILIES, save_tiny_vision_model, small_image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vision_runs import compress_on_text, stored_tensors

import mcsharp_sdk
from mcsharp_sdk.models.source import SourceModel

BOTH_PLACES = ("dtype", "torch_dtype")


def with_dtype_of_the_whole_only(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in BOTH_PLACES:
            part.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    return folder


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_dtype_may_be_stated_for_the_whole_model_only(family: str, tmp_path: Path) -> None:
    original = save_tiny_vision_model(tmp_path, family, dtype=torch.bfloat16)
    assert SourceModel(with_dtype_of_the_whole_only(original)).dtype == torch.bfloat16


def test_tensors_of_another_dtype_than_the_text_models_keep_it(tmp_path: Path) -> None:
    original = tmp_path / "original"
    save_tiny_vision_model(original, "qwen3_vl_moe", dtype=torch.bfloat16)
    for file in original.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if ".visual." in name:
                tensors[name] = tensors[name].float() + 2**-20
        save_file(tensors, file, {"format": "pt"})
    before, after = stored_tensors(original), stored_tensors(compress_on_text(original, tmp_path))
    vision = [name for name in before if ".visual." in name]
    assert len(vision) > 20
    for name in vision:
        assert after[name].dtype == torch.float32, name
        assert torch.equal(after[name], before[name]), name


def test_deepseek_vl2_stops_at_the_end_that_its_text_config_names(tmp_path: Path) -> None:
    folder = save_tiny_deepseek_vl2(tmp_path, "small")
    config = json.loads((folder / "config.json").read_text())
    config["language_config"] |= {"bos_token_id": 3, "eos_token_id": 7}
    (folder / "config.json").write_text(json.dumps(config))
    assert not (folder / "generation_config.json").exists()
    settings = AutoModelForImageTextToText.from_pretrained(folder).generation_config
    assert (settings.bos_token_id, settings.eos_token_id) == (3, 7)


@torch.no_grad()
def test_a_vision_tower_that_waits_on_disk_gives_the_same_logits(tmp_path: Path) -> None:
    folder = save_tiny_deepseek_vl2(tmp_path / "model", "small")
    processor: Any = AutoProcessor.from_pretrained(folder)
    inputs = processor(text="see <image> here", images=small_image())
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    parts = ("image_newline", "view_seperator", "projector", "language")
    places = {"vision": "disk", **dict.fromkeys(parts, "cpu")}
    offloaded = AutoModelForImageTextToText.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "disk"
    ).eval()
    assert any(p.is_meta for p in offloaded.vision.parameters())
    assert torch.equal(offloaded(**inputs).logits, whole(**inputs).logits)


def test_every_package_is_in_the_distribution() -> None:
    """``import transformers`` behind ``import mcsharp_sdk`` needs them all."""
    root = Path(mcsharp_sdk.__file__).parent
    settings = tomllib.loads((root.parent / "pyproject.toml").read_text())
    found = {
        ".".join((root.name, *file.parent.relative_to(root).parts))
        for file in root.rglob("__init__.py")
    }
    assert found <= set(settings["tool"]["setuptools"]["packages"])
