"""Compress vision-language models in tests, and read what comes out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from stock_models import StockBlock, set_weight, watched_blocks
from tiny_vision_models import small_image
from transformers import AutoModelForImageTextToText, AutoProcessor

import mcsharp_sdk
from mcsharp_sdk.artifacts import ExpertStatistics
from mcsharp_sdk.models.experts import MATRICES
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.quantization.grid import PackedWeight, dequantise_packed
from mcsharp_sdk.recipe.schema import Recipe
from mcsharp_sdk.runtime.modules import ExpertBucket, PackedLinear

SEQUENCES, LENGTH = 8, 32
TEXT = "the quick brown fox jumps over the lazy dog. " * 40


def text_calibration(folder: Path) -> dict[str, Any]:
    """The first characters of ``TEXT``."""
    file = folder / "text.txt"
    file.write_text(TEXT)
    size = {"sequences": SEQUENCES, "length": LENGTH, "sampling": "first"}
    return {"source": "text", "path": str(file), **size}


def text_tokens() -> torch.Tensor:
    """The tokens of that calibration, int64 [sequences, length]: a character is its code."""
    codes = [ord(character) for character in TEXT[: SEQUENCES * LENGTH]]
    return torch.tensor(codes).view(SEQUENCES, LENGTH)


CAPTIONS = ("a red thing beside a blue one", "nothing but noise", "three cats and a dog")


def pairs(folder: Path) -> tuple[list[Image.Image], dict[str, Any]]:
    """Images, and the calibration on pairs of them and ``CAPTIONS``, saved in a folder."""
    images = [small_image(40 + 12 * i, 24 + 16 * i, seed=i) for i in range(len(CAPTIONS))]
    rows = []
    for number, (image, caption) in enumerate(zip(images, CAPTIONS, strict=True)):
        image.save(folder / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "text": caption}))
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    path, count = str(folder / "pairs.jsonl"), len(images)
    source = {"source": "image_text", "path": path, "sequences": count, "length": 512}
    return images, source


def pair_inputs(model: Path, images: Sequence[Image.Image]) -> list[Any]:
    """What the model's own processor makes of these images and ``CAPTIONS``."""
    processor: Any = AutoProcessor.from_pretrained(model)
    made = []
    for image, caption in zip(images, CAPTIONS, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": caption}]
        text = processor.apply_chat_template([{"role": "user", "content": content}])
        made.append(processor(text=[text], images=[image], return_tensors="pt"))
    return made


def check_calibration_on_pairs(model: Path, folder: Path) -> Path:
    """Calibrate on text and on pairs: statistics are right, and the result loads and answers.

    Returns the compressed model's folder.
    """
    images, source = pairs(folder)
    inputs = [{"input_ids": text_tokens()}, *pair_inputs(model, images)]
    calibration = [text_calibration(folder), source]
    output = check_statistics(model, folder, calibration, inputs)
    compressed = load(output)
    with torch.no_grad():
        for each in inputs:
            expected = written_out(compressed, model)(**each).logits
            found = compressed(**each).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    answer = compressed.generate(**inputs[-1], max_new_tokens=3, min_new_tokens=3)
    assert answer.shape[1] == inputs[-1]["input_ids"].shape[1] + 3
    return output


def compress_on_text(model: Path, folder: Path) -> Path:
    """Compress at mixed widths, calibrated on text."""
    return compress(model, folder, text_calibration(folder))


@torch.no_grad()
def check_statistics(model: Path, folder: Path, calibration: Any, inputs: Sequence[Any]) -> Path:
    """Statistics of a calibration equal those that the whole model gives on the same inputs.

    Returns the compressed model's folder.
    """
    stage = {"type": "ExpertStats", "group_size": 16}
    output = compress(model, folder, calibration, [stage])
    found = ExpertStatistics.load(output / ExpertStatistics.FILE).layers
    stock = load(model)
    blocks = [block for name, block in named_blocks(stock) if "vision_moe" not in name]
    counts = {block.layer: torch.zeros(block.num_experts) for block in blocks}
    for each in inputs:
        stock(**each, use_cache=False)
        for block in blocks:
            chosen = block.arguments[1].flatten()
            counts[block.layer] += torch.bincount(chosen, minlength=block.num_experts)
    assert {layer.layer for layer in found} == set(counts)
    for layer in found:
        expected = counts[layer.layer].double().numpy()
        np.testing.assert_array_equal(layer.activation_count, expected)
    return output


def compress(
    model: Path, folder: Path, calibration: Any, stages: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Compress at mixed widths, behind other stages."""
    experts = SourceModel(model).topology.experts_per_layer()
    widths = {
        str(layer): [(1, 2, 3, 4)[(expert + layer) % 4] for expert in range(count)]
        for layer, count in experts.items()
    }
    bits = folder / "bits.json"
    bits.write_text(json.dumps({"version": 1, "bits": widths}))
    quantise = {"type": "GPTQQuantize", "bits": str(bits), "group_size": 16}
    recipe = Recipe.from_dict(
        {"version": 1, "calibration": calibration, "stages": [*stages, quantise]}
    )
    return mcsharp_sdk.compress(recipe, model, folder / "out", progress=False).output


def load(folder: Path) -> Any:
    """The whole model."""
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def dequantised(weight: PackedWeight, bits: int, group: int, columns: int) -> torch.Tensor:
    """float32 [rows, columns]."""
    return dequantise_packed(
        weight.qweight,
        weight.scales,
        weight.zeros,
        bits=bits,
        group_size=group,
        columns=columns,
        dtype=torch.float32,
    )


@torch.no_grad()
def written_out(compressed: Any, original: Path) -> Any:
    """The stock model with the packed weights written out."""
    stock = load(original)
    blocks = dict(named_blocks(stock))
    for name, module in compressed.named_modules():
        if isinstance(module, PackedLinear):
            packed = PackedWeight(module.qweight, module.scales, module.zeros)
            weight = dequantised(packed, module.bits, module.group_size, module.in_features)
            stock.get_submodule(name).weight.copy_(weight)
        elif isinstance(module, ExpertBucket):
            block = blocks[name.rpartition(".")[0]]
            for slot, expert in enumerate(module.experts):
                for matrix, views in zip(MATRICES, block.weights(expert), strict=True):
                    part = module.stack(matrix).matrix(slot)
                    weight = dequantised(part.weight, part.bits, part.group_size, part.columns)
                    set_weight(views, weight)
    return stock


def named_blocks(model: Any) -> Iterator[tuple[str, StockBlock]]:
    """Path of the experts -> their block."""
    names = {id(module): name for name, module in model.named_modules()}
    for block in watched_blocks(model):
        yield names[id(block.experts)], block


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor, of all weight files of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found
