"""The transformers plug-in: with it, ``from_pretrained`` loads and runs compressed models.

transformers imports this module while it is being imported itself, perhaps by one of ours. So what
the methods need is imported when they are called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from mcsharp_sdk.models.config_file import check_layer_count
from mcsharp_sdk.runtime.layout import INDEX_FILE, METHOD, PackedLayout, check_layout_fields


@register_quantization_config(METHOD)
class McSharpConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model; see :mod:`mcsharp_sdk.runtime.layout`."""

    def __init__(self, **settings: Any) -> None:
        check_layout_fields(settings)
        self.__dict__.update(settings)
        self.quant_method: Any = METHOD


@register_quantizer(METHOD)
class McSharpQuantizer(HfQuantizer):
    """Puts packed modules in place before the weights are loaded."""

    requires_calibration = True

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before weight files are looked for: name ours."""
        config.transformers_weights = INDEX_FILE
        check_layer_count(config, Path(str(config.name_or_path)))
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from mcsharp_sdk.runtime.packed_model import pack_modules
        from mcsharp_sdk.runtime.stored_tensors import check_files

        config = self.quantization_config
        pack_modules(model, PackedLayout.from_dict(config.to_dict()))
        if files := kwargs.get("checkpoint_files"):
            check_files(model, files)
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """None: tensors are stored under their names in the module tree."""
        return []

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from mcsharp_sdk.runtime.compressed_model import make_savable
        from mcsharp_sdk.runtime.expert_pruner import ExpertPruner
        from mcsharp_sdk.runtime.modules import ExpertBucket, PackedLinear
        from mcsharp_sdk.runtime.pruned_routing import set_expert_pruning

        model._weight_conversions = []
        for module in model.modules():
            if isinstance(module, PackedLinear | ExpertBucket | ExpertPruner):
                module.requires_grad_(False)
        make_savable(model)
        layout = PackedLayout.from_dict(self.quantization_config.to_dict())
        if layout.pruning is not None:
            set_expert_pruning(model, layout.pruning.mode)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
