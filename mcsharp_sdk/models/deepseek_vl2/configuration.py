"""``config.json`` of DeepSeek-VL2, read and checked."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

# From where they stand: this module is loaded while transformers is still being imported.
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from mcsharp_sdk.errors import InputProblems, Problem

PROJECTORS = ("identity", "linear", "mlp_gelu", "downsample_mlp_gelu")


class DeepseekVLV2VisionConfig(PreTrainedConfig):
    """A SigLIP vision transformer; the defaults are those of checkpoints that leave a setting out.

    Attributes
    ----------
    width, layers, heads, mlp_ratio : of the transformer.
    image_size, patch_size : sides of a tile and of a patch, in pixels.
    global_pool : ``map`` if the checkpoint holds a pooling head (which is not used).
    """

    model_type = "vision"
    base_config_key = "vision_config"

    image_size: int = 384
    patch_size: int = 16
    width: int | dict[str, Any] = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float | int = 4
    global_pool: str = "map"
    class_token: bool = False
    ignore_head: bool = True


class DeepseekVLV2ProjectorConfig(PreTrainedConfig):
    """What takes image features to the text model's width, ``n_embed``."""

    model_type = "mlp_projector"
    base_config_key = "projector_config"

    projector_type: str = "downsample_mlp_gelu"
    input_dim: int = 1152
    n_embed: int = 2048
    depth: int = 2
    mlp_ratio: int = 1
    downsample_ratio: int = 2
    token_pooling: bool = False


class DeepseekVLV2Config(PreTrainedConfig):
    """The whole model.

    Attributes
    ----------
    vision_config, projector_config, language_config : of its parts.
    tile_tag : ``2D``: rows of image tokens end with a token of their own.
    global_view_pos : whether the overview of an image comes before its tiles (``head``) or after.
    candidate_resolutions : widths and heights that images are brought to before they are cut.

    Raises
    ------
    InputProblems
        With every setting that is not supported.
    """

    model_type = "deepseek_vl_v2"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": DeepseekVLV2VisionConfig,
        "projector_config": DeepseekVLV2ProjectorConfig,
        "language_config": PreTrainedConfig,
    }
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    projector_config: dict[str, Any] | PreTrainedConfig | None = None
    language_config: dict[str, Any] | PreTrainedConfig | None = None
    tile_tag: str = "2D"
    global_view_pos: str = "head"
    candidate_resolutions: list[Any] | tuple[Any, ...] = ((384, 384),)
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # Registers the model's class. Earlier, transformers may not be there as a whole.
        import_module("mcsharp_sdk.models.deepseek_vl2.modeling")
        from mcsharp_sdk.models.deepseek_vl2.text_config import text_config

        if not isinstance(self.language_config, PreTrainedConfig):
            self.language_config = text_config(self.language_config or {})
        super().__post_init__(**kwargs)
        if problems := self._problems():
            raise InputProblems("config.json", problems)
        if self.dtype is None:
            self.dtype = self.get_text_config().dtype

    def _problems(self) -> list[Problem]:
        vision: Any = self.vision_config
        projector: Any = self.projector_config
        checks = [
            ("vision_config.width", isinstance(vision.width, int), "one vision transformer"),
            ("vision_config.class_token", not vision.class_token, "none (false)"),
            ("vision_config.ignore_head", vision.ignore_head, "features without the head (true)"),
            ("projector_config.token_pooling", not projector.token_pooling, "none (false)"),
            (
                "projector_config.projector_type",
                projector.projector_type in PROJECTORS,
                ", ".join(PROJECTORS),
            ),
            ("tile_tag", self.tile_tag == "2D", "'2D'"),
            ("global_view_pos", self.global_view_pos in ("head", "tail"), "'head' and 'tail'"),
        ]
        return [
            Problem(name, f"is not one that is supported; supported: {supported}")
            for name, fine, supported in checks
            if not fine
        ]

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        """The text model's."""
        return self.language_config

    def to_diff_dict(self) -> dict[str, Any]:
        """All settings: what may be left out differs between the layout and transformers."""
        return self.to_dict()


AutoConfig.register(DeepseekVLV2Config.model_type, DeepseekVLV2Config, exist_ok=True)
