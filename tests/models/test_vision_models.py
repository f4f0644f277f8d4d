"""Vision-language models: the text tower's experts are compressed, everything else is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vision_models import (
    VISION_FAMILIES,
    image_prompt,
    save_tiny_vision_model,
    small_image,
)
from transformers import AutoProcessor
from vision_runs import (
    check_calibration_on_pairs,
    check_statistics,
    compress_on_text,
    load,
    stored_tensors,
    text_calibration,
    text_tokens,
    written_out,
)

import mcsharp_sdk
from mcsharp_sdk.models.architecture import empty_model, read_config
from mcsharp_sdk.models.source import SourceModel


@pytest.fixture(scope="module", params=VISION_FAMILIES)
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """Family, the original model and the compressed one."""
    folder = tmp_path_factory.mktemp(request.param)
    original = save_tiny_vision_model(folder / "original", request.param)
    return request.param, original, compress_on_text(original, folder)


def prompt(folder: Path, family: str, images: int) -> Any:
    processor: Any = AutoProcessor.from_pretrained(folder)
    if not images:
        return processor.tokenizer("a cat sat on the mat", return_tensors="pt")
    return processor(text=[image_prompt(family)], images=[small_image()], return_tensors="pt")


@pytest.mark.parametrize("images", [0, 1])
@torch.no_grad()
def test_a_loaded_model_equals_the_stock_class_with_the_same_weights(
    folders: tuple[str, Path, Path], images: int
) -> None:
    family, original, compressed = folders
    model = load(compressed)
    inputs = prompt(original, family, images)
    expected = written_out(model, original)(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    assert (expected - load(original)(**inputs).logits).abs().max() > 1e-3


@pytest.mark.parametrize("images", [0, 1])
def test_a_loaded_model_generates(folders: tuple[str, Path, Path], images: int) -> None:
    family, original, compressed = folders
    model = load(compressed)
    inputs = prompt(compressed, family, images)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    generated = model.generate(**inputs, **settings)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 4
    assert torch.equal(generated, written_out(model, original).generate(**inputs, **settings))


def test_what_is_outside_the_decoder_layers_is_kept_bit_for_bit(
    folders: tuple[str, Path, Path],
) -> None:
    _, original, compressed = folders
    source = SourceModel(original)
    before, after = stored_tensors(original), stored_tensors(compressed)
    layers = f"{source.topology.layers_path}."
    outer = {d: m for d, m in source.names.memory.items() if not m.startswith(layers)}
    assert any("vis" in name for name in outer)
    for on_disk, name in outer.items():
        assert torch.equal(before[on_disk], after[name]), name


def test_the_processor_comes_along(folders: tuple[str, Path, Path]) -> None:
    family, original, compressed = folders
    before, after = prompt(original, family, 1), prompt(compressed, family, 1)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_text_perplexity_is_that_of_the_whole_model(folders: tuple[str, Path, Path]) -> None:
    _, _, compressed = folders
    text = ("a cat sat on the mat and looked at the dog. " * 3)[:128]
    file = compressed.parent / "evaluated.txt"
    file.write_text(text)
    measured = mcsharp_sdk.evaluate(compressed, text=file, window=32).perplexity
    ids = torch.tensor([ord(c) for c in text]).view(4, 32)
    with torch.no_grad():
        logits = load(compressed)(input_ids=ids).logits.double()
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])
    assert measured == pytest.approx(float(nll.exp()), rel=1e-4)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_tables_that_are_in_no_checkpoint_are_those_of_a_loaded_model(
    family: str, tmp_path: Path
) -> None:
    original = save_tiny_vision_model(tmp_path, family)
    expected = dict(load(original).named_non_persistent_buffers())
    model = empty_model(read_config(original), torch.float32)
    found = dict(model.named_non_persistent_buffers())
    assert set(found) == set(expected)
    for name, table in expected.items():
        torch.testing.assert_close(found[name], table, msg=name)


def test_ernie_says_once_that_its_vision_experts_are_kept(tmp_path: Path) -> None:
    original = save_tiny_vision_model(tmp_path / "original", "ernie4_5_vl_moe")
    compressed = compress_on_text(original, tmp_path)
    warnings = json.loads((compressed / "mcsharp_report.json").read_text())["warnings"]
    assert len([w for w in warnings if "experts of image tokens" in w]) == 1
    before, after = stored_tensors(original), stored_tensors(compressed)
    kept = [n for n in after if "vision_moe" in n]
    assert kept
    assert sum(after[n].numel() for n in kept if "experts" in n) == sum(
        t.numel() for n, t in before.items() if ".experts." in n and "vision" in group(n)
    )


def group(name: str) -> str:
    """The group that an expert on disk belongs to: the first half of a layer's is for text."""
    number = int(name.split(".experts.")[1].split(".")[0])
    return "text" if number < 4 else "vision"


def test_statistics_on_text_equal_those_of_the_whole_model(
    folders: tuple[str, Path, Path], tmp_path: Path
) -> None:
    _, original, _ = folders
    calibration = text_calibration(tmp_path)
    check_statistics(original, tmp_path, calibration, [{"input_ids": text_tokens()}])


def test_calibration_on_text_and_pairs_of_image_and_text(
    folders: tuple[str, Path, Path], tmp_path: Path
) -> None:
    _, original, _ = folders
    check_calibration_on_pairs(original, tmp_path)
