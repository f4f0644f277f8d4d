"""DeepSeek-VL2: a vision transformer, a projector and a DeepSeek text model of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    DeepseekV2ForCausalLM,
    DeepseekV3ForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2PreTrainedModel

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.deepseek_vl2.configuration import DeepseekVLV2Config
from mcsharp_sdk.models.deepseek_vl2.text_config import PlainAttentionConfig
from mcsharp_sdk.models.deepseek_vl2.vision import Projector, VisionTransformer


class PlainAttentionForCausalLM(DeepseekV2ForCausalLM):  # type: ignore[misc]
    """DeepSeek-V2 with plain multi-head attention, which transformers has for DeepSeek-OCR-2."""

    config_class = PlainAttentionConfig

    def __init__(self, config: PlainAttentionConfig) -> None:
        DeepseekV2PreTrainedModel.__init__(self, config)
        self.model = DeepseekOcr2TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def text_model(config: Any) -> Any:
    """The text model with its head, empty."""
    if isinstance(config, PlainAttentionConfig):
        return PlainAttentionForCausalLM(config)
    if config.model_type == "deepseek_v3":
        return DeepseekV3ForCausalLM(config)
    return DeepseekV2ForCausalLM(config)


class DeepseekVLV2ForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The whole model. Tensors are named as in checkpoints."""

    config_class = DeepseekVLV2Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = False
    _no_split_modules = ["DeepseekV2DecoderLayer", "DeepseekV3DecoderLayer", "VisionBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DeepseekVLV2Config) -> None:
        super().__init__(config)
        projector: Any = config.projector_config
        self.vision = VisionTransformer(config.vision_config)
        self.projector = Projector(projector)
        self.image_newline = nn.Parameter(torch.zeros(projector.n_embed))
        self.view_seperator = nn.Parameter(torch.zeros(projector.n_embed))
        self.language = text_model(config.language_config)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """The token embedding."""
        return self.language.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding."""
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The head."""
        return self.language.get_output_embeddings()

    def get_decoder(self) -> Any:
        """The text model without its head."""
        return self.language.model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            for vector in (self.image_newline, self.view_seperator):
                nn.init.normal_(vector, std=len(vector) ** -0.5)
        elif isinstance(module, VisionTransformer):
            nn.init.normal_(module.pos_embed, std=0.02)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
        images_seq_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits, as the text model returns them.

        Parameters
        ----------
        input_ids : int64 [B, L]
        pixel_values : [tiles, 3, size, size], of all images of the batch in order: each one's
            overview, then its tiles row by row. None without images.
        images_spatial_crop : int64 [images, 2], tiles across and down.
        images_seq_mask : bool [B, L], where image tokens stand.
        others : of the text model.

        Raises
        ------
        InputError
            If the images do not fill the marked places.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if images_spatial_crop is None or images_seq_mask is None:
                raise InputError("pixel_values need images_spatial_crop and images_seq_mask")
            images = self.image_tokens(pixel_values, images_spatial_crop)
            inputs_embeds = place_images(inputs_embeds, images, images_seq_mask)
        return self.language(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def image_tokens(self, pixel_values: Tensor, images_spatial_crop: Tensor) -> Tensor:
        """Vectors of all images, [tokens, n_embed], in order.

        Parameters
        ----------
        pixel_values, images_spatial_crop : as ``forward`` takes them.
        """
        tiles = self.projector(self.vision(pixel_values.to(self.dtype)))
        side = round(tiles.shape[1] ** 0.5)
        grids = tiles.view(len(tiles), side, side, -1)
        counts = [1 + int(across * down) for across, down in images_spatial_crop]
        if sum(counts) != len(tiles):
            raise InputError(
                f"images_spatial_crop speaks of {sum(counts)} tiles, overviews included, "
                f"but there are {len(tiles)} in pixel_values"
            )
        parts: list[Tensor] = []
        for views, (across, down) in zip(grids.split(counts), images_spatial_crop, strict=True):
            overview = self._with_newlines(views[0])
            local = self._with_newlines(join_tiles(views[1:], int(across), int(down)))
            separator = self.view_seperator[None]
            head = self.config.global_view_pos == "head"
            parts += [overview, separator, local] if head else [local, separator, overview]
        return torch.cat(parts)

    def _with_newlines(self, grid: Tensor) -> Tensor:
        """A grid [h, w, n_embed] row by row, a newline behind each row: [h·(w + 1), n_embed]."""
        newlines = self.image_newline.expand(len(grid), 1, -1)
        return torch.cat([grid, newlines], dim=1).flatten(0, 1)

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """As transformers calls it at loading.

        Without a ``generation_config.json`` it asks ``config.json`` what ends a text, but not its
        ``language_config``, which says so.
        """
        given = self.generation_config
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[misc]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(given, name))

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers calls it: images are needed until their keys are in the cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("pixel_values", "images_spatial_crop", "images_seq_mask"):
                inputs[name] = None
        return inputs


def join_tiles(tiles: Tensor, across: int, down: int) -> Tensor:
    """Put tiles [across·down, s, s, n_embed], row by row, together: [down·s, across·s, n_embed]."""
    side = tiles.shape[1]
    split = tiles.view(down, across, side, side, -1).transpose(1, 2)
    return split.reshape(down * side, across * side, -1)


def place_images(embeds: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Put image vectors in the marked places of token embeddings.

    Parameters
    ----------
    embeds : [B, L, n_embed]
    images : [tokens, n_embed]
    mask : bool [B, l]; tokens behind l are none of an image.

    Raises
    ------
    InputError
        If the number of marked places is not that of the vectors.
    """
    marked = int(mask.sum())
    if marked != len(images):
        raise InputError(f"the images have {len(images)} tokens, but {marked} places are marked")
    places = F.pad(mask.to(embeds.device), (0, embeds.shape[1] - mask.shape[1]))
    return embeds.masked_scatter(places.unsqueeze(-1), images.to(embeds.device, embeds.dtype))


AutoModelForImageTextToText.register(
    DeepseekVLV2Config, DeepseekVLV2ForConditionalGeneration, exist_ok=True
)
