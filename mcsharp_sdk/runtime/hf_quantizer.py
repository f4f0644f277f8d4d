"""The transformers plug-in: with it, ``from_pretrained`` loads and runs compressed models."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from mcsharp_sdk.checked_files import write_checksums
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.config_file import MOST_LAYERS, check_layer_count
from mcsharp_sdk.models.normal_form import normalise
from mcsharp_sdk.models.topology import read_topology
from mcsharp_sdk.runtime.layout import FIELDS, INDEX_FILE, METHOD, WEIGHTS_NAME, PackedLayout
from mcsharp_sdk.runtime.modules import PackedLinear, pack_experts_module
from mcsharp_sdk.runtime.pruned_routing import (
    ExpertPruner,
    expert_pruning,
    install_pruning,
    set_expert_pruning,
)
from mcsharp_sdk.runtime.pruning_layout import PruningMode
from mcsharp_sdk.runtime.saving import rename_weight_files
from mcsharp_sdk.runtime.stored_tensors import check_files


@register_quantization_config(METHOD)
class McSharpConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model; see :mod:`mcsharp_sdk.runtime.layout`."""

    def __init__(self, **settings: Any) -> None:
        self.quant_method: Any = METHOD
        for name in FIELDS & settings.keys():
            setattr(self, name, settings[name])


@register_quantizer(METHOD)
class McSharpQuantizer(HfQuantizer):
    """Puts packed modules in place before the weights are loaded."""

    requires_calibration = True

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before weight files are looked for: name ours."""
        config.transformers_weights = INDEX_FILE
        check_layer_count(config, MOST_LAYERS, Path(str(config.name_or_path)))
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        pack_modules(model, PackedLayout.from_dict(config.to_dict()))
        if files := kwargs.get("checkpoint_files"):
            check_files(model, files)
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """None: tensors are stored under their names in the module tree."""
        return []

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model._weight_conversions = []
        for module in model.modules():
            if isinstance(module, PackedLinear | ExpertPruner):
                module.requires_grad_(False)
        make_savable(model)
        layout = PackedLayout.from_dict(self.quantization_config.to_dict())
        if layout.pruning is not None:
            set_expert_pruning(model, layout.pruning.mode)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def pack_modules(model: Any, layout: PackedLayout) -> None:
    """Replace the modules that ``layout`` names by packed ones, in place, with empty tensors.

    If the model is to prune its experts, it gets pruners, switched off.

    Raises
    ------
    InputError
        If the layout does not fit the model: other layers, experts or linears.
    """
    normalise(model)
    topology = read_topology(model, model.config)
    if layout.pruning is not None:
        install_pruning(model, topology, layout.pruning)
    if layout.experts and set(layout.experts) != set(topology.moe):
        raise InputError(
            f"quantization_config has experts in decoder layers {sorted(layout.experts)}, "
            f"but the model in {sorted(topology.moe)}"
        )
    found: set[str] = set()
    for index, layer in enumerate(model.get_submodule(topology.layers_path)):
        for name in topology.linears[index]:
            if name in layout.linears:
                found.add(name)
                _pack_linear(layer, name, layout)
        if index in layout.experts:
            block = topology.moe[index]
            bits = layout.experts[index]
            if len(bits) != block.num_experts:
                raise InputError(
                    f"quantization_config gives {len(bits)} widths to the {block.num_experts} "
                    f"experts of decoder layer {index}"
                )
            experts = layer.get_submodule(block.experts)
            pack_experts_module(experts, bits, layout.group_size, rotated=layout.rotated)
    if missing := sorted(set(layout.linears) - found):
        raise InputError(f"quantization_config names linears that the model lacks: {missing}")


def _pack_linear(layer: nn.Module, name: str, layout: PackedLayout) -> None:
    linear: Any = layer.get_submodule(name)
    packed = PackedLinear(
        linear.in_features,
        linear.out_features,
        layout.linears[name],
        layout.group_size,
        linear.bias,
    )
    layer.set_submodule(name, packed)


class CompressedModelMixin:
    """What a compressed model does differently from its stock class."""

    @property
    def expert_pruning(self) -> PruningMode:
        """How it prunes its experts now: ``off``, ``rule``, ``learned`` or ``both``."""
        return expert_pruning(self)

    def set_expert_pruning(self, mode: str) -> None:
        """Choose how it prunes its experts from now on; no weight is loaded again.

        Parameters
        ----------
        mode : ``off``, ``rule``, ``learned`` or ``both``, as far as the model has data for it. See
            :mod:`mcsharp_sdk.runtime.pruned_routing`.

        Raises
        ------
        InputError
            If the model has no data for this mode, or its attention implementation cannot tell
            what the mode needs.
        """
        set_expert_pruning(self, mode)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save under the file names of compressed models, so that it can be loaded again.

        Raises
        ------
        InputError
            With ``push_to_hub=True``: save first, then upload the folder.
        """
        if kwargs.pop("push_to_hub", False):
            raise InputError("save the compressed model first, then upload its folder")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            super().save_pretrained(temporary, **kwargs)  # type: ignore[misc]
            rename_weight_files(Path(temporary), WEIGHTS_NAME)
            files = sorted(Path(temporary).iterdir())
            for file in files:
                shutil.move(file, folder / file.name)
            write_checksums(folder, [file.name for file in files])


_SAVABLE_CLASSES: dict[type, type] = {}


def make_savable(model: Any) -> None:
    """Give a loaded compressed model its own ``save_pretrained``; the class keeps its name."""
    original = type(model)
    if issubclass(original, CompressedModelMixin):
        return
    if original not in _SAVABLE_CLASSES:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
        _SAVABLE_CLASSES[original] = type(
            original.__name__, (CompressedModelMixin, original), names
        )
    model.__class__ = _SAVABLE_CLASSES[original]
