"""Tiny random vision-language MoE models with processors, and images, made by the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from stock_models import stir
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AriaProcessor,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeProcessor,
    Glm4vMoeConfig,
    Glm4vProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
)
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VOCABULARY = 160
"""128 ASCII characters, and room for the special tokens behind them."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""``IMAGE`` stands for the family's own image marker."""


@dataclass(frozen=True)
class VisionFamily:
    """One family of vision-language models.

    Attributes
    ----------
    settings : of its tiny config.
    image : what stands for an image in a prompt.
    special_tokens : role -> token, in the order of their ids from 128.
    make_processor : its processor, given the tokenizer.
    """

    settings: Mapping[str, Any]
    image: str
    special_tokens: Mapping[str, str]
    make_processor: Callable[[Any], Any]


class _WithoutVideos(ProcessorMixin):
    """A processor of transformers for images alone: what is for videos needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        for role in _ROLES:
            if hasattr(tokenizer, role):
                setattr(self, role, getattr(tokenizer, role))
                setattr(self, f"{role}_id", getattr(tokenizer, f"{role}_id"))
        ProcessorMixin.__init__(self, image_processor, tokenizer, **kwargs)


_ROLES = (
    *("image_token", "image_start_token", "image_end_token"),
    *("video_token", "video_start_token", "video_end_token"),
    *("vision_start_token", "vision_end_token"),
)


class ImageOnlyQwen3VLProcessor(_WithoutVideos, Qwen3VLProcessor):
    """Qwen3-VL's."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


class ImageOnlyGlm4vProcessor(_WithoutVideos, Glm4vProcessor):
    """GLM-4.5V's."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.video_start_id = tokenizer.video_start_token_id
        self.video_end_id = tokenizer.video_end_token_id


class ImageOnlyErnieProcessor(_WithoutVideos, Ernie4_5_VLMoeProcessor):
    """ERNIE 4.5 VL's."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        return ProcessorMixin.save_pretrained(self, *args, **kwargs)


_SIZE = {"shortest_edge": 64, "longest_edge": 1024}


def _qwen3_vl_processor(tokenizer: Any) -> Any:
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=_SIZE)
    return ImageOnlyQwen3VLProcessor(images, tokenizer)


def _glm4v_processor(tokenizer: Any) -> Any:
    settings: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "size": _SIZE}
    images = Glm4vImageProcessorPil(**settings)
    return ImageOnlyGlm4vProcessor(images, tokenizer)


def _ernie_processor(tokenizer: Any) -> Any:
    images = Ernie4_5_VLMoeImageProcessorPil(patch_size=4, merge_size=2, size=_SIZE)
    return ImageOnlyErnieProcessor(images, tokenizer)


def _aria_processor(tokenizer: Any) -> Any:
    images = AriaImageProcessorPil(max_image_size=490, min_image_size=336)
    return AriaProcessor(images, tokenizer, size_conversion={490: 8, 980: 16})


_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "out_hidden_size": 64,
}

VISION_FAMILIES: dict[str, VisionFamily] = {
    "qwen3_vl_moe": VisionFamily(
        settings={
            "text_config": {
                **_TEXT,
                "moe_intermediate_size": 40,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [4, 2, 2],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                **_VISION,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            "image_token_id": 128,
            "video_token_id": 129,
            "vision_start_token_id": 130,
            "vision_end_token_id": 131,
        },
        image="<|vision_start|><|image_pad|><|vision_end|>",
        special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
        make_processor=_qwen3_vl_processor,
    ),
    "glm4v_moe": VisionFamily(
        settings={
            "text_config": {
                **_TEXT,
                "moe_intermediate_size": 40,
                "n_routed_experts": 8,
                "num_experts_per_tok": 3,
                "n_group": 2,
                "topk_group": 1,
                "routed_scaling_factor": 1.5,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 1, 1],
                    "partial_rotary_factor": 0.5,
                },
            },
            "vision_config": {**_VISION, "image_size": 32, "attention_bias": False},
            "image_token_id": 128,
            "video_token_id": 129,
            "image_start_token_id": 130,
            "image_end_token_id": 131,
            "video_start_token_id": 132,
            "video_end_token_id": 133,
        },
        image="<|begin_of_image|><|image|><|end_of_image|>",
        special_tokens={
            "image_token": "<|image|>",
            "video_token": "<|video|>",
            "image_start_token": "<|begin_of_image|>",
            "image_end_token": "<|end_of_image|>",
            "video_start_token": "<|begin_of_video|>",
            "video_end_token": "<|end_of_video|>",
        },
        make_processor=_glm4v_processor,
    ),
    "aria": VisionFamily(
        settings={
            "text_config": {
                **_TEXT,
                "intermediate_size": 40,
                "moe_num_experts": 4,
                "moe_topk": 2,
                "moe_num_shared_experts": 1,
            },
            "vision_config": {
                "model_type": "idefics3_vision",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 490,
                "patch_size": 98,
            },
            "projector_patch_to_query_dict": {25: 8, 100: 16},
            "image_token_index": 128,
        },
        image="<|img|>",
        special_tokens={"image_token": "<|img|>"},
        make_processor=_aria_processor,
    ),
    "ernie4_5_vl_moe": VisionFamily(
        settings={
            "text_config": {
                **_TEXT,
                "moe_intermediate_size": [40, 24],
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_num_shared_experts": 1,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [3, 3, 2],
                },
            },
            "vision_config": {k: v for k, v in _VISION.items() if k != "out_hidden_size"},
            "image_token_id": 128,
            "video_token_id": 129,
            "image_start_token_id": 130,
            "image_end_token_id": 131,
            "video_start_token_id": 132,
            "video_end_token_id": 133,
        },
        image="<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>",
        special_tokens={
            "image_token": "<|image@placeholder|>",
            "video_token": "<|video@placeholder|>",
            "image_start_token": "<|IMAGE_START|>",
            "image_end_token": "<|IMAGE_END|>",
            "video_start_token": "<|VIDEO_START|>",
            "video_end_token": "<|VIDEO_END|>",
        },
        make_processor=_ernie_processor,
    ),
}
"""Model type -> its row."""


def vision_config(family: str) -> Any:
    """Config of a tiny model."""
    return AutoConfig.for_model(family, **VISION_FAMILIES[family].settings)


def character_tokenizer(special_tokens: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """One token per ASCII character, its code, and special tokens behind them."""
    words = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(special_tokens.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=dict(special_tokens), unk_token="?"
    )


def save_tiny_vision_model(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Save a random model of a family with its processor, in several shards."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(vision_config(family), dtype=dtype)
    stir(model)
    model.save_pretrained(folder, max_shard_size="100KB")
    row = VISION_FAMILIES[family]
    processor = row.make_processor(character_tokenizer(row.special_tokens))
    processor.chat_template = CHAT_TEMPLATE.replace("IMAGE", row.image)
    processor.save_pretrained(folder)
    return folder


def small_image(width: int = 40, height: int = 24, seed: int = 0) -> Image.Image:
    """A picture of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_prompt(family: str, text: str = "What is this? ") -> str:
    """A prompt with one image."""
    return text + VISION_FAMILIES[family].image + " It is"


for _config, _processor in (
    (Qwen3VLMoeConfig, ImageOnlyQwen3VLProcessor),
    (Glm4vMoeConfig, ImageOnlyGlm4vProcessor),
    (Ernie4_5_VLMoeConfig, ImageOnlyErnieProcessor),
):
    AutoProcessor.register(_config, _processor, exist_ok=True)
