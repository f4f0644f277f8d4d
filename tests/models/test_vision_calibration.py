"""Calibration on images: what reaches the decoder layers, and what compression makes of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from tiny_vision_models import VISION_FAMILIES, save_tiny_vision_model, small_image
from torch import Tensor
from vision_runs import compress, load

from mcsharp_sdk.data import image_text
from mcsharp_sdk.data.calibration import ImageTextSource
from mcsharp_sdk.data.calibration_set import CalibrationSet, SampleGroup
from mcsharp_sdk.data.gathering import gather
from mcsharp_sdk.engine.model_fit import check_model
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.embedding import embed
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import stream_layers
from mcsharp_sdk.recipe.schema import Recipe

TEXTS = ("A cat on a mat.", "Noise", "What colour is the sky over the port?")


def write_pairs(folder: Path, texts: Sequence[str] = TEXTS) -> Path:
    """Pairs with images of several sizes."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, text in enumerate(texts):
        small_image(40 + 30 * number, 24 + 20 * number, number).save(
            folder / "images" / f"{number}.png"
        )
        rows.append({"image": f"images/{number}.png", "text": text})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def mixed(model: Path, pairs: Path) -> CalibrationSet:
    """Pairs between two texts of different lengths."""
    settings = ImageTextSource(path=pairs, sequences=3, length=512)
    images = gather([settings], model, SourceModel(model).config)
    generator = torch.Generator().manual_seed(1)
    short, long = (
        SampleGroup({"input_ids": torch.randint(1, 128, size, generator=generator)}, 1)
        for size in ((2, 9), (3, 30))
    )
    return CalibrationSet((short, *images.groups, long), ("pairs", "text"))


@pytest.fixture(scope="module", params=VISION_FAMILIES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, CalibrationSet]:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny_vision_model(folder / "model", request.param)
    return request.param, model, mixed(model, write_pairs(folder / "data"))


@torch.no_grad()
def test_streamed_hidden_states_equal_the_full_models(
    case: tuple[str, Path, CalibrationSet],
) -> None:
    _, folder, calibration = case
    model, source = load(folder), SourceModel(folder)
    layers = model.get_submodule(source.topology.layers_path)
    before: dict[int, list[Tensor]] = {index: [] for index in range(len(layers))}
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: before[index].append(
                (args[0] if args else kwargs["hidden_states"]).clone()
            ),
            with_kwargs=True,
        )
    for group in calibration.groups:
        model(**group.inputs, use_cache=False)
    for layer in stream_layers(source, calibration):
        for found, expected in zip(layer.inputs.hidden, before[layer.index], strict=True):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert all(tensor.is_meta for tensor in source.model.parameters())


def test_what_qwen3_vl_adds_between_layers_is_kept_for_image_tokens_alone(
    tmp_path: Path,
) -> None:
    folder = save_tiny_vision_model(tmp_path / "model", "qwen3_vl_moe")
    source = SourceModel(folder)
    calibration = mixed(folder, write_pairs(tmp_path / "data"))
    inputs = embed(source, calibration)
    image = source.config.image_token_id
    assert {batch for batch, _ in inputs.additions} == {1, 2, 3}
    for (batch, layer), added in inputs.additions.items():
        tokens = calibration.groups[batch].tokens[0]
        assert torch.equal(added.rows, (tokens == image).nonzero().squeeze(1))
        assert layer in (1, 2)


def test_a_model_that_does_not_only_add_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_tiny_vision_model(tmp_path / "model", "qwen3_vl_moe")
    source = SourceModel(folder)
    text_model: Any = source.model.get_submodule("model.language_model")
    own = text_model._deepstack_process
    text_model._deepstack_process = lambda hidden, *rest: own(hidden, *rest) * 2
    with pytest.raises(InputError, match="qwen3_vl_moe.* decoder layer 1 other than by adding"):
        embed(source, mixed(folder, write_pairs(tmp_path / "data")))


@torch.no_grad()
def test_a_model_calibrated_on_images_and_text_generates(
    case: tuple[str, Path, CalibrationSet], tmp_path: Path
) -> None:
    family, folder, calibration = case
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    pairs = write_pairs(tmp_path / "data")
    sources = [
        {"source": "image_text", "path": str(pairs), "sequences": 3, "length": 512},
        {"source": "text", "path": str(tmp_path / "text.txt"), "sequences": 4, "length": 32},
    ]
    stages = [{"type": "ExpertStats", "quantizer": "rtn", "group_size": 16}]
    output = compress(folder, tmp_path, sources, stages)
    images = [group for group in calibration.groups if group.has_images]
    generated = load(output).generate(**images[0].inputs, max_new_tokens=2, min_new_tokens=2)
    assert generated.shape[1] == images[0].tokens.shape[1] + 2
    statistics = json.loads((output / "expert_statistics.json").read_text())
    for layer in statistics["layers"]:
        by_source = {one["source"]: one for one in layer["sources"]}
        assert set(by_source) == {"pairs.jsonl", "text.txt"}
        assert by_source["text.txt"]["tokens"] == 4 * 32
        tokens = sum(group.tokens.numel() for group in images)
        # ERNIE routes the tokens of images to experts of their own.
        assert by_source["pairs.jsonl"]["tokens"] == tokens - (
            _vision_tokens(images) if family == "ernie4_5_vl_moe" else 0
        )


def _vision_tokens(groups: Sequence[SampleGroup]) -> int:
    return sum(int(group.inputs["moe_mm_token_type_ids"].bool().sum()) for group in groups)


def test_a_text_model_refuses_images_before_any_work(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    save_tiny_tokenizer(folder)
    pairs = write_pairs(tmp_path / "data")
    calibration = [{"source": "embedded"}, {"source": "image_text", "path": str(pairs)}]
    stages = [{"type": "ExpertStats", "loss_tokens": 64}]
    recipe = Recipe.from_dict(
        {"version": 1, "calibration": calibration, "stages": stages, "exports": []}
    )
    with pytest.raises(
        InputError, match=r"calibration\[1\].source: mixtral reads no images"
    ) as told:
        check_model(recipe, folder)
    assert "stages[0].loss_tokens: gradients of the loss are measured on text" in str(told.value)


@pytest.mark.parametrize("family", ["ernie4_5_vl_moe", "qwen3_vl_moe"])
def test_ranking_tokens_is_refused_where_those_of_images_go_to_other_experts(
    family: str, tmp_path: Path
) -> None:
    folder = save_tiny_vision_model(tmp_path / "model", family)
    images = [{"source": "image_text", "path": str(write_pairs(tmp_path / "data")), "length": 512}]

    def check(calibration: Any, **settings: Any) -> None:
        stages = [{"type": "TokenProtection", **settings}]
        parts = {"version": 1, "calibration": calibration, "stages": stages, "exports": []}
        check_model(Recipe.from_dict(parts), folder)

    for settings in ({"metric": "none"}, {"protect_ratio": 0}):
        check(images, **settings)
    check({"source": "embedded", "length": 64})
    if family == "qwen3_vl_moe":
        check(images)
    else:
        with pytest.raises(InputError, match=r"stages\[0\].metric: tokens of images go to other"):
            check(images)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "../secret.png", "text": "x"}, "below the file's own folder"),
        ({"image": "images/../../secret.png", "text": "x"}, "below the file's own folder"),
        ({"image": "/etc/passwd", "text": "x"}, "below the file's own folder"),
        ({"image": "link.png", "text": "x"}, "leads out of"),
        ({"image": "linked/secret.png", "text": "x"}, "leads out of"),
        ({"image": "gone.png", "text": "x"}, "there is no image"),
        ({"image": "a\0b", "text": "x"}, "cannot be looked up|there is no image"),
        ({"image": "images/0.png"}, "field 'text' must be a text; there is 'image'"),
        ({"image": 3, "text": "x"}, "field 'image' must be a text"),
        ({"image": "images/0.png", "text": "\ud83d"}, "field 'text' has half a character"),
        ([1], "is a JSON list"),
    ],
)
def test_a_bad_pair_is_refused_with_its_line(row: Any, reason: str, tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "data")
    small_image().save(tmp_path / "secret.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path)
    file.write_text(file.read_text() + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=reason) as caught:
        image_text.read_pairs(ImageTextSource(path=file, sequences=4))
    assert str(caught.value).startswith(f"{file}:5: ")


def test_too_few_pairs_are_told(tmp_path: Path) -> None:
    settings = ImageTextSource(path=write_pairs(tmp_path / "data"), sequences=4)
    with pytest.raises(InputError, match="has 3 pairs, but 4 are asked for; set 'sequences: 3'"):
        image_text.read_pairs(settings)


def test_a_long_text_is_cut_but_never_an_image(tmp_path: Path) -> None:
    folder = save_tiny_vision_model(tmp_path / "model", "qwen3_vl_moe")
    file = write_pairs(tmp_path / "data", ["y" * 400])
    config = SourceModel(folder).config
    whole = image_text_inputs(folder, file, 2048, config)
    tokens = whole["input_ids"][0]
    end = int((tokens == config.image_token_id).nonzero()[-1]) + 1
    cut = image_text_inputs(folder, file, end, config)
    assert torch.equal(cut["input_ids"][0], tokens[:end])
    for name in set(whole) - {"input_ids"}:
        same_length = whole[name].shape == whole["input_ids"].shape
        assert torch.equal(cut[name], whole[name][:, :end] if same_length else whole[name]), name
    with pytest.raises(InputError, match=r"pairs.jsonl:1: has \d+ tokens, and \d+ do not hold"):
        image_text_inputs(folder, file, end - 1, config)


def image_text_inputs(folder: Path, file: Path, length: int, config: Any) -> Any:
    settings = ImageTextSource(path=file, sequences=1, length=length)
    return gather([settings], folder, config).groups[0].inputs


def test_a_broken_image_is_refused_with_its_line(tmp_path: Path) -> None:
    folder = save_tiny_vision_model(tmp_path / "model", "qwen3_vl_moe")
    file = write_pairs(tmp_path / "data", ["a"])
    (file.parent / "images" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"pairs.jsonl:1: image .*0.png cannot be read"):
        image_text_inputs(folder, file, 512, SourceModel(folder).config)


def test_without_pillow_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(InputError, match=r"needs Pillow: pip install 'mcsharp_sdk\[vision\]'"):
        image_text.load_processor(tmp_path)


def test_without_a_chat_template_the_image_stands_before_the_text() -> None:
    pair = image_text.Pair(Path("a.png"), "words", "pairs.jsonl:1")
    processor = SimpleNamespace(image_token="<image>", chat_template=None)
    assert image_text._prompt(pair, processor) == "<image>words"
    with pytest.raises(InputError, match="neither a chat template nor an image token"):
        image_text._prompt(pair, SimpleNamespace())
