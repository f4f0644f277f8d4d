"""From texts and images to the inputs of DeepSeek-VL2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.auto.processing_auto import AutoProcessor
from transformers.processing_utils import ProcessorMixin

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.deepseek_vl2.configuration import DeepseekVLV2Config

MOST_TILED_IMAGES = 2
"""Prompts with more images than this have them as one tile each."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|User|>: {% endif %}"
    "{% if message['role'] == 'assistant' %}<|Assistant|>: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


class DeepseekVLV2Processor(ProcessorMixin):  # type: ignore[misc]
    """Cuts images into tiles and gives them their places in the text.

    It has the name that checkpoints ask for in ``processor_config.json``, and takes the settings
    that stand there.

    Parameters
    ----------
    tokenizer : with ``image_token`` as one of its tokens.
    candidate_resolutions : widths and heights in pixels that an image may be brought to, all of
        them multiples of the first one's width, the side of a tile.
    patch_size, downsample_ratio : of the vision transformer and the projector.
    image_mean, image_std : per colour, of pixels from 0 to 1.
    normalize : whether pixels are shifted and scaled by them.
    image_token : what stands for an image in a text.

    Raises
    ------
    InputError
        If the tokenizer lacks the image token.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        candidate_resolutions: Sequence[Sequence[int]] = ((384, 384),),
        patch_size: int = 14,
        downsample_ratio: int = 2,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        normalize: bool = True,
        image_token: str = "<image>",
        chat_template: str | None = None,
        **unused: Any,
    ) -> None:
        self.candidate_resolutions = [list(pair) for pair in candidate_resolutions]
        self.patch_size = patch_size
        self.downsample_ratio = downsample_ratio
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.normalize = normalize
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise InputError(f"the tokenizer has no token {image_token!r}")
        tokenizer.padding_side = "left"  # for generation
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.candidate_resolutions[0][0]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of the model.

        Parameters
        ----------
        images : one PIL image or a list of them, or a list of lists, for all texts in order.
        text : one text or a list of them; each ``image_token`` in them is one image.
        return_tensors : ``pt``.
        kwargs : of the tokenizer, e.g. ``padding=True``.

        Raises
        ------
        InputError
            If there are more or fewer images than image tokens.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        waiting = _flat(images)
        wanted = sum(t.count(self.image_token) for t in texts)
        if wanted != len(waiting):
            raise InputError(
                f"the text has {wanted} of {self.image_token!r} for {len(waiting)} images"
            )
        tiles: list[Tensor] = []
        crops: list[tuple[int, int]] = []
        expanded = []
        for one in texts:
            first, *rest = one.split(self.image_token)
            own, waiting = waiting[: len(rest)], waiting[len(rest) :]
            for image, behind in zip(own, rest, strict=True):
                crop, cut = self._cut(image, tiled=len(own) <= MOST_TILED_IMAGES)
                crops.append(crop)
                tiles += cut
                first += self.image_token * self.num_image_tokens(*crop) + behind
            expanded.append(first)
        encoded = self.tokenizer(expanded, return_tensors=return_tensors, **kwargs)
        data = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if tiles:
            data["pixel_values"] = torch.stack(tiles)
            data["images_spatial_crop"] = torch.tensor(crops)
            data["images_seq_mask"] = data["input_ids"] == self.image_token_id
        return BatchFeature(data)

    def num_image_tokens(self, across: int, down: int) -> int:
        """Tokens of an image in so many tiles: overview, separator, tiles, and ends of rows."""
        side = math.ceil(self.tile_size // self.patch_size / self.downsample_ratio)
        return side * (side + 1) + 1 + down * side * (across * side + 1)

    def _cut(self, image: Any, tiled: bool) -> tuple[tuple[int, int], list[Tensor]]:
        """Tiles across and down, and the pixels of the overview and of each tile."""
        size = self.tile_size
        image = image.convert("RGB")
        width, height = (
            best_resolution(image.size, self.candidate_resolutions) if tiled else (size, size)
        )
        views = [self._padded(image, size, size)]
        whole = self._padded(image, width, height)
        for top in range(0, height, size):
            for left in range(0, width, size):
                views.append(whole.crop((left, top, left + size, top + size)))
        return (width // size, height // size), [self._pixels(view) for view in views]

    def _padded(self, image: Any, width: int, height: int) -> Any:
        """The image scaled to fit, in the middle of the mean colour."""
        from PIL import ImageOps

        colour = tuple(int(255 * part) for part in self.image_mean)
        return ImageOps.pad(image, (width, height), color=colour)

    def _pixels(self, view: Any) -> Tensor:
        """float32 [3, size, size]."""
        pixels = torch.from_numpy(np.array(view, dtype=np.float32)).permute(2, 0, 1) / 255
        if not self.normalize:
            return pixels
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.image_mean, self.image_std))
        return (pixels - mean) / std

    @property
    def model_input_names(self) -> list[str]:
        """What ``__call__`` returns."""
        return [
            *("input_ids", "attention_mask"),
            *("pixel_values", "images_spatial_crop", "images_seq_mask"),
        ]


def best_resolution(size: tuple[int, int], candidates: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The candidate that keeps most of an image's pixels, and of these the smallest.

    Parameters
    ----------
    size : width and height of the image.
    candidates : widths and heights; of equally good ones the first is taken.
    """

    def kept_and_lost(candidate: Sequence[int]) -> tuple[int, int]:
        scale = min(candidate[0] / size[0], candidate[1] / size[1])
        scaled = int(size[0] * scale) * int(size[1] * scale)
        kept = min(scaled, size[0] * size[1])
        return kept, kept - candidate[0] * candidate[1]

    width, height = max(candidates, key=kept_and_lost)
    return width, height


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [image for one in images for image in _flat(one)]


AutoProcessor.register(DeepseekVLV2Config, DeepseekVLV2Processor, exist_ok=True)
