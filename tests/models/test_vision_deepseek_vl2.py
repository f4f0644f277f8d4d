"""DeepSeek-VL2 against plain computations, and through calibration to a loadable result."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_deepseek_vl2 import (
    CANDIDATES,
    HEADS,
    HIDDEN,
    PATCH,
    TILE,
    VARIANTS,
    WIDTH,
    config_json,
    save_tiny_deepseek_vl2,
)
from tiny_deepseek_vl2 import tensors as random_tensors
from tiny_vision_models import small_image
from transformers import (
    AutoConfig,
    AutoProcessor,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)
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
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.deepseek_vl2.processing import best_resolution
from mcsharp_sdk.models.source import SourceModel

SIDE = math.ceil(TILE // PATCH / 2)
"""Rows and columns of image tokens in a tile."""


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Which size, and its folder."""
    folder = tmp_path_factory.mktemp(request.param) / "original"
    return request.param, save_tiny_deepseek_vl2(folder, request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_deepseek_vl2(tmp_path_factory.mktemp("small"), "small")


def inputs(folder: Path, text: str = "see <image> here", width: int = 40, height: int = 24) -> Any:
    processor: Any = AutoProcessor.from_pretrained(folder)
    images = [small_image(width, height, seed) for seed in range(text.count("<image>"))]
    return processor(text=[text], images=images)


# The vision side, by hand in float64.


def layer_norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention_by_hand(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    query, key, value = np.split(linear(x, weights, f"{name}.qkv"), 3, axis=-1)
    size = WIDTH // 2
    heads = []
    for head in (slice(0, size), slice(size, WIDTH)):
        scores = softmax(query[:, head] @ key[:, head].T / math.sqrt(size))
        heads.append(scores @ value[:, head])
    return linear(np.concatenate(heads, axis=-1), weights, f"{name}.proj")


def features_by_hand(tile: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """[patches, width] of a tile [3, size, size]."""
    kernel = weights["vision.patch_embed.proj.weight"]
    rows = []
    for top in range(0, TILE, PATCH):
        for left in range(0, TILE, PATCH):
            patch = tile[:, top : top + PATCH, left : left + PATCH]
            rows.append((kernel * patch).sum((1, 2, 3)) + weights["vision.patch_embed.proj.bias"])
    x = np.stack(rows) + weights["vision.pos_embed"][0]
    for block in ("vision.blocks.0", "vision.blocks.1"):
        normed = layer_norm(x, weights, f"{block}.norm1")
        x = x + attention_by_hand(normed, weights, f"{block}.attn")
        inner = linear(layer_norm(x, weights, f"{block}.norm2"), weights, f"{block}.mlp.fc1")
        x = x + linear(tanh_gelu(inner), weights, f"{block}.mlp.fc2")
    return layer_norm(x, weights, "vision.norm")


def projected_by_hand(features: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """[SIDE, SIDE, hidden]; squares of two by two features, zeros beyond the border."""
    side = TILE // PATCH
    grid = np.zeros((2 * SIDE, 2 * SIDE, WIDTH))
    grid[:side, :side] = features.reshape(side, side, WIDTH)
    out = np.zeros((SIDE, SIDE, HIDDEN))
    for row in range(SIDE):
        for column in range(SIDE):
            square = grid[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            joined = [square[i, j, c] for c in range(WIDTH) for i in (0, 1) for j in (0, 1)]
            inner = linear(np.array(joined), weights, "projector.layers.0")
            out[row, column] = linear(exact_gelu(inner), weights, "projector.layers.2")
    return out


def image_tokens_by_hand(
    tiles: np.ndarray, across: int, down: int, weights: dict[str, np.ndarray]
) -> np.ndarray:
    """[tokens, hidden] of one image: overview, separator, tiles; each row ends with a newline."""
    grids = [projected_by_hand(features_by_hand(tile, weights), weights) for tile in tiles]
    newline = weights["image_newline"]
    tokens = []
    for row in grids[0]:
        tokens += [*row, newline]
    tokens.append(weights["view_seperator"])
    for tile_row in range(down):
        for row in range(SIDE):
            for tile_column in range(across):
                tokens += [*grids[1 + tile_row * across + tile_column][row]]
            tokens.append(newline)
    return np.stack(tokens)


@pytest.mark.parametrize(("width", "height"), [(20, 20), (40, 20), (22, 50), (60, 58)])
def test_image_tokens_equal_those_computed_by_hand(small: Path, width: int, height: int) -> None:
    made = inputs(small, width=width, height=height)
    across, down = made["images_spatial_crop"][0].tolist()
    weights = {name: t.double().numpy() for name, t in random_tensors("small").items()}
    tiles = made["pixel_values"].double().numpy()
    expected = image_tokens_by_hand(tiles, across, down, weights)
    with torch.no_grad():
        found = load(small).image_tokens(made["pixel_values"], made["images_spatial_crop"])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


# The text side.


def text_only(folder: Path, variant: str) -> Any:
    """The text model, as transformers loads it from a checkpoint of its own."""
    given = VARIANTS[variant]
    weights = {
        name.removeprefix("language."): tensor
        for name, tensor in random_tensors(variant).items()
        if name.startswith("language.")
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    classes: dict[str, tuple[Any, Any]] = {
        "small": (DeepseekV2Config, DeepseekV2ForCausalLM),
        "base": (DeepseekV3Config, DeepseekV3ForCausalLM),
    }
    config_class, model_class = classes[variant]
    routing = {"routed_scaling_factor": 1.0, "norm_topk_prob": False, **given}
    config = config_class(**{n: v for n, v in routing.items() if n != "model_type"})
    config.save_pretrained(folder)
    return model_class.from_pretrained(folder, experts_implementation="eager").eval()


@pytest.mark.parametrize("variant", ["small", "base"])
@torch.no_grad()
def test_logits_are_those_of_the_text_model_with_image_tokens_put_in(
    variant: str, tmp_path: Path
) -> None:
    folder = save_tiny_deepseek_vl2(tmp_path / "whole", variant)
    model, text = load(folder), text_only(tmp_path / "text", variant)
    made = inputs(folder, "a <image> b <image> c")
    ids = made["input_ids"][0].tolist()
    images = iter(model.image_tokens(made["pixel_values"], made["images_spatial_crop"]))
    embeds = [
        next(images) if token == 128 else text.get_input_embeddings().weight[token] for token in ids
    ]
    assert next(images, None) is None
    expected = text(inputs_embeds=torch.stack(embeds)[None]).logits
    torch.testing.assert_close(model(**made).logits, expected)
    plain = made["input_ids"].clamp(max=127)
    torch.testing.assert_close(model(plain).logits, text(plain).logits)


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def swiglu(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    gate, up, down = (weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    gated = x @ gate.T
    return (gated / (1 + np.exp(-gated)) * (x @ up.T)) @ down.T


def plain_attention(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Causal attention with rotary positions, the halves of a head turned together."""
    size, half = HIDDEN // HEADS, HIDDEN // HEADS // 2
    angles = np.outer(np.arange(len(x)), 10000.0 ** (-np.arange(half) / half))
    query, key, value = (x @ weights[f"{name}.{part}_proj.weight"].T for part in "qkv")

    def turned(head: np.ndarray) -> np.ndarray:
        first, second = head[:, :half], head[:, half:]
        turned = (
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        )
        return np.concatenate(turned, axis=-1)

    outputs = []
    for start in range(0, HIDDEN, size):
        head = slice(start, start + size)
        scores = turned(query[:, head]) @ turned(key[:, head]).T / math.sqrt(size)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        outputs.append(softmax(scores) @ value[:, head])
    return np.concatenate(outputs, axis=-1) @ weights[f"{name}.o_proj.weight"].T


def experts_by_hand(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Softmax over all experts, the best three, not normalised; and the shared experts."""
    out = swiglu(x, weights, f"{name}.shared_experts")
    probabilities = softmax(x @ weights[f"{name}.gate.weight"].T)
    for token, row in enumerate(probabilities):
        for expert in np.argsort(-row)[:3]:
            found = swiglu(x[token], weights, f"{name}.experts.{expert}")
            out[token] += row[expert] * found
    return out


@torch.no_grad()
def test_the_size_with_plain_attention_equals_a_computation_by_hand(tmp_path: Path) -> None:
    folder = save_tiny_deepseek_vl2(tmp_path, "tiny")
    weights = {name: t.double().numpy() for name, t in random_tensors("tiny").items()}
    ids = torch.tensor([[104, 101, 108, 108, 111, 32, 119]])
    x = weights["language.model.embed_tokens.weight"][ids[0]]
    for index in range(3):
        layer = f"language.model.layers.{index}"
        normed = rms_norm(x, weights[f"{layer}.input_layernorm.weight"])
        x = x + plain_attention(normed, weights, f"{layer}.self_attn")
        normed = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"])
        mlp = experts_by_hand if index else swiglu
        x = x + mlp(normed, weights, f"{layer}.mlp")
    normed = rms_norm(x, weights["language.model.norm.weight"])
    expected = normed @ weights["language.lm_head.weight"].T
    np.testing.assert_allclose(load(folder)(ids).logits[0].numpy(), expected, atol=1e-4)


# Images to inputs.


@pytest.mark.parametrize(("width", "height"), [(20, 20), (100, 20), (22, 50), (60, 58)])
def test_the_chosen_resolution_keeps_most_pixels_and_then_wastes_least(
    width: int, height: int
) -> None:
    def value(candidate: list[int]) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -(candidate[0] * candidate[1] - kept)

    chosen = list(best_resolution((width, height), CANDIDATES))
    assert all(value(chosen) >= value(other) for other in CANDIDATES)


def test_tiles_cover_the_image_row_by_row_behind_its_overview(small: Path) -> None:
    processor: Any = AutoProcessor.from_pretrained(small)
    image = small_image(2 * TILE, TILE)
    made = processor(text="<image>", images=image)
    assert made["images_spatial_crop"].tolist() == [[2, 1]]
    pixels = np.asarray(image).transpose(2, 0, 1) / 127.5 - 1
    overview, left, right = made["pixel_values"].numpy()
    np.testing.assert_allclose(left, pixels[:, :, :TILE], atol=1e-5)
    np.testing.assert_allclose(right, pixels[:, :, TILE:], atol=1e-5)
    # The overview is half as high as it is wide; what is above and below is the mean colour.
    assert np.abs(overview[:, : TILE // 4 - 1]).max() < 0.01
    assert np.abs(overview[:, TILE // 4 : -TILE // 4]).max() > 0.3


def test_many_images_are_not_tiled(small: Path) -> None:
    crops = inputs(small, "<image><image><image>", 2 * TILE, TILE)["images_spatial_crop"]
    assert crops.tolist() == [[1, 1]] * 3
    assert inputs(small, "<image><image>", 2 * TILE, TILE)["images_spatial_crop"][0, 0] == 2


@torch.no_grad()
def test_a_padded_batch_gives_what_each_prompt_gives_alone(small: Path) -> None:
    model = load(small)
    processor: Any = AutoProcessor.from_pretrained(small)
    texts, images = ["a <image>b", "only <image> and <image> here"], [small_image(), small_image()]
    third = small_image(60, 20, 4)
    batch = processor(text=texts, images=[[images[0]], [images[1], third]], padding=True)
    together = model(**batch).logits
    for row, (text, own) in enumerate(zip(texts, [[images[0]], [images[1], third]], strict=True)):
        alone = model(**processor(text=text, images=own)).logits[0]
        torch.testing.assert_close(together[row, -len(alone) :], alone, atol=2e-4, rtol=1e-3)


def test_more_images_than_places_are_refused(small: Path) -> None:
    processor: Any = AutoProcessor.from_pretrained(small)
    with pytest.raises(InputError, match="1 of '<image>' for 2 images"):
        processor(text="<image>", images=[small_image(), small_image()])


# What is refused.


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("scoring_func", "sigmoid", "routing by sigmoid with greedy is not supported"),
        ("topk_method", "noaux_tc", "routing by softmax with noaux_tc is not supported"),
        ("norm_topk_prob", True, "norm_topk_prob: True is not supported"),
        ("moe_layer_freq", 2, "moe_layer_freq: 2 is not supported"),
        ("n_routed_experts", None, "a dense model has no experts"),
        ("n_shared_experts", None, "always has shared experts"),
        ("tie_word_embeddings", True, "the head must have its own weight"),
    ],
)
def test_what_transformers_cannot_compute_is_refused_by_name(
    tmp_path: Path, setting: str, value: Any, said: str
) -> None:
    config = config_json("small", **{setting: value})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        SourceModel(tmp_path)


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [
        ("vision_config", "width", {"clip-l-14-224": {"width": 1024}}),
        ("vision_config", "class_token", True),
        ("projector_config", "projector_type", "resampler"),
        ("projector_config", "token_pooling", True),
        ("", "tile_tag", "1D"),
    ],
)
def test_other_vision_towers_are_refused_by_name(
    tmp_path: Path, part: str, setting: str, value: Any
) -> None:
    config = config_json("small")
    (config[part] if part else config)[setting] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{part}.?{setting}"):
        SourceModel(tmp_path)


# Compression.


@pytest.fixture(scope="module")
def folders(checkpoint: tuple[str, Path]) -> tuple[Path, Path]:
    """The original and what text calibration makes of it."""
    _, original = checkpoint
    return original, compress_on_text(original, original.parent)


@pytest.mark.parametrize("text", ["no image at all", "see <image> here"])
@torch.no_grad()
def test_a_loaded_model_equals_the_original_class_with_the_same_weights(
    folders: tuple[Path, Path], text: str
) -> None:
    original, compressed = folders
    model = load(compressed)
    made = inputs(compressed, text)
    expected = written_out(model, original)(**made).logits
    torch.testing.assert_close(model(**made).logits, expected, atol=1e-5, rtol=1e-4)
    assert (expected - load(original)(**made).logits).abs().max() > 1e-3


@pytest.mark.parametrize("text", ["no image at all", "see <image> here"])
def test_a_loaded_model_generates(folders: tuple[Path, Path], text: str) -> None:
    original, compressed = folders
    model, made = load(compressed), inputs(compressed, text)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    generated = model.generate(**made, **settings)
    again = model.generate(**made, **settings, use_cache=False)
    assert generated.shape[1] == made["input_ids"].shape[1] + 4
    assert torch.equal(generated, again)
    assert torch.equal(generated, written_out(model, original).generate(**made, **settings))


def test_the_layout_stays_but_for_packed_tensors(folders: tuple[Path, Path]) -> None:
    original, compressed = folders
    config = json.loads((compressed / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "mcsharp"
    assert config == json.loads((original / "config.json").read_text())
    before, after = stored_tensors(original), stored_tensors(compressed)
    packed = {"experts.", "self_attn.", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    kept = [n for n in before if not any(f"layers.{i}." in n for i in range(3)) or "norm" in n]
    kept += [n for n in before if ".mlp.gate." in n]
    assert len(kept) > 40
    for name in kept:
        assert torch.equal(before[name], after[name]), name
    for name in set(after) - set(before):
        assert any(part in name for part in packed), name


def test_a_saved_model_is_the_same_when_it_is_loaded_again(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    _, compressed = folders
    model = load(compressed)
    model.save_pretrained(tmp_path)
    made = inputs(compressed)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(**made).logits, model(**made).logits)


def test_a_saved_config_describes_the_same_text_model(checkpoint: tuple[str, Path]) -> None:
    _, folder = checkpoint
    config: Any = AutoConfig.from_pretrained(folder)
    again = type(config).from_dict(config.to_dict())
    assert type(again.language_config) is type(config.language_config)
    assert again.to_dict() == config.to_dict()


def test_perplexity_on_text(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, compressed = folders
    text = tmp_path / "text.txt"
    text.write_text("a cat sat on the mat and looked at it.")
    measured = mcsharp_sdk.evaluate(compressed, text=text, window=64).perplexity
    ids = torch.tensor([[ord(c) for c in text.read_text()]])
    with torch.no_grad():
        logits = load(compressed)(input_ids=ids).logits.double()
    nll = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert measured == pytest.approx(float(nll.exp()), rel=1e-4)


def test_statistics_on_text_equal_those_of_the_whole_model(
    checkpoint: tuple[str, Path], tmp_path: Path
) -> None:
    _, original = checkpoint
    calibration = text_calibration(tmp_path)
    check_statistics(original, tmp_path, calibration, [{"input_ids": text_tokens()}])


def test_calibration_on_text_and_pairs_of_image_and_text(
    checkpoint: tuple[str, Path], tmp_path: Path
) -> None:
    _, original = checkpoint
    check_calibration_on_pairs(original, tmp_path)
