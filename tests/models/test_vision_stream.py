"""Layer by layer, image–text pairs give what the whole model gives, for every family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_deepseek_vl2 import save_tiny_deepseek_vl2
from tiny_vision_models import VISION_FAMILIES, image_prompt, save_tiny_vision_model, small_image
from torch import Tensor
from transformers import AutoProcessor
from vision_runs import load

from mcsharp_sdk.data.calibration_set import CalibrationSet, SampleGroup
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import stream_layers


def save(folder: Path, family: str) -> Path:
    """A tiny model with its processor."""
    if family in VISION_FAMILIES:
        return save_tiny_vision_model(folder, family)
    return save_tiny_deepseek_vl2(folder)


def image_inputs(folder: Path, family: str, width: int, height: int) -> dict[str, Tensor]:
    """A prompt with an image."""
    text = image_prompt(family) if family in VISION_FAMILIES else "see <image> here"
    processor: Any = AutoProcessor.from_pretrained(folder)
    made = processor(text=[text], images=[small_image(width, height)], return_tensors="pt")
    return {name: tensor for name, tensor in made.items() if name != "attention_mask"}


def hidden_states(model: Any, path: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What each decoder layer of the whole model gets, [sequences, length, hidden]."""
    seen: list[Tensor] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    layers = model.get_submodule(path)
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", [*VISION_FAMILIES, "deepseek_vl_v2"])
@torch.no_grad()
def test_streamed_pairs_of_image_and_text_equal_a_run_of_the_whole_model(
    family: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, family)
    tokens = torch.randint(33, 127, (3, 17), generator=torch.Generator().manual_seed(1))
    given: list[dict[str, Tensor]] = [
        image_inputs(folder, family, 40, 24),
        {"input_ids": tokens},
        image_inputs(folder, family, 24, 60),
    ]
    calibration = CalibrationSet(tuple(SampleGroup(inputs) for inputs in given), ("pairs",))
    source, whole = SourceModel(folder), load(folder)
    expected = [hidden_states(whole, source.topology.layers_path, inputs) for inputs in given]
    for layer in stream_layers(source, calibration):
        for batch, found in enumerate(layer.inputs.hidden):
            wanted = expected[batch][layer.index]
            near = 1e-5 * float(wanted.abs().max())
            torch.testing.assert_close(found, wanted, atol=near, rtol=0)
    assert layer.index == len(expected[0]) - 1
