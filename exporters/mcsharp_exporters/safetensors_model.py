"""Exporter ``safetensors``: the compressed model that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field
from torch import Tensor

from mcsharp_exporters.base import Exporter
from mcsharp_exporters.model_card import model_card
from mcsharp_sdk._version import __version__
from mcsharp_sdk.artifacts import (
    QUANTIZED_WEIGHTS,
    TOP_ANY_ROUTER,
    BitMap,
    ExpertStatistics,
    TokenProtectionRule,
    TopAnyTraining,
)
from mcsharp_sdk.data.tokenise import TOKENIZER_FILES
from mcsharp_sdk.report.page import write_report
from mcsharp_sdk.report.training import training_plot

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.models.safetensors_file import StoredTensor
    from mcsharp_sdk.models.source import SourceModel
    from mcsharp_sdk.runtime.layout import PackedLayout

COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json")
"""Files of the original model that belong to the compressed one too."""

REPORT_FILE = "mcsharp_report.json"
TRAINING_PLOT = "top_any_training.svg"

GROUP_SIZE = 128
"""Written where nothing is packed, so that it means nothing."""


class SafetensorsExporter(Exporter):
    """Packed safetensors shards with an index, config, tokenizer, recipe, report and model card."""

    type: Literal["safetensors"] = "safetensors"
    max_shard_size: Annotated[
        float, Field(gt=0, description="Most gigabytes (10^9 bytes) in one weight file.")
    ] = 5.0

    writes_weights: ClassVar[bool] = True
    reads_any: ClassVar[tuple[str, ...]] = (
        QUANTIZED_WEIGHTS,
        TokenProtectionRule.NAME,
        TOP_ANY_ROUTER,
    )

    def run(self, context: RunContext, output: Path) -> None:
        from mcsharp_sdk.models.architecture import auto_class

        layout = model_layout(context)
        self._write_weights(context, layout, output)
        _write_config(context.model, layout, output)
        copy_files(context.model.path, output)
        _write_artifacts(context, output)
        (output / "recipe.yaml").write_text(context.recipe.as_run, encoding="utf-8")
        report = _report(context, layout, output)
        (output / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        model_class = auto_class(context.model.config).__name__
        card = model_card(context.model.path.name, report, context.recipe.as_run, model_class)
        (output / "README.md").write_text(card, encoding="utf-8")
        _write_page(context, output)

    def _write_weights(self, context: RunContext, layout: PackedLayout, output: Path) -> None:
        from mcsharp_sdk.runtime.layout import WEIGHTS_NAME
        from mcsharp_sdk.runtime.saving import ShardWriter

        writer = ShardWriter(output, WEIGHTS_NAME, int(self.max_shard_size * 1e9))
        for name, tensor in outer_tensors(context.model):
            writer.add(name, tensor)
        for index in context.track(range(context.model.topology.num_layers), "writing"):
            for name, tensor in named_layer_tensors(context, layout, index):
                writer.add(name, tensor)
        writer.finish()


AnyTensor: TypeAlias = "Tensor | StoredTensor"


def outer_tensors(model: SourceModel) -> Iterator[tuple[str, AnyTensor]]:
    """What is outside the decoder layers (embeddings, head, vision tower), as it was.

    One module's own tensors are held at a time.
    """
    layers = f"{model.topology.layers_path}."
    of_owner: dict[str, list[str]] = {}
    for name in dict.fromkeys(model.names.memory.values()):
        if name.startswith(layers):
            continue
        if name in model.names.verbatim:
            yield name, model.checkpoint.slice(model.names.verbatim[name])
        else:
            of_owner.setdefault(name.rpartition(".")[0], []).append(name)
    for names in of_owner.values():
        yield from model.stored_tensors(*names)


def model_layout(context: RunContext) -> PackedLayout:
    """How the stages left the model: what is packed, and how it is pruned."""
    from mcsharp_sdk.runtime.layout import PackedLayout

    quantised = context.quantised_layout() or PackedLayout(GROUP_SIZE, {}, {})
    return replace(quantised, pruning=context.pruning_layout())


def named_layer_tensors(
    context: RunContext, layout: PackedLayout, index: int
) -> Iterator[tuple[str, AnyTensor]]:
    """A decoder layer: what stages made from the run directory, the rest from the model."""
    model = context.model
    packed = context.quantised_tensors(index)
    yield from packed.items()
    prefix = f"{model.layer_path(index)}."
    linears = [n for n in model.topology.linears[index] if n in layout.linears]
    replaced = [f"{prefix}{name}.weight" for name in linears]
    if index in layout.experts:
        replaced += model.fused_weights(index)
    copied = {n: t for n, t in _as_stored(model, prefix) if n not in replaced}
    yield from ((name, tensor) for name, tensor in copied.items() if name not in packed)
    for name, tensor in model.stored_tensors(prefix, but_not=[*replaced, *copied]):
        if name not in packed:
            yield name, tensor
    yield from _pruner_tensors(context, layout, index)


def _as_stored(model: SourceModel, prefix: str) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors that can be copied from the original model as they are, in its stored dtype."""
    tree = model.model.state_dict()
    for name, disk in model.names.verbatim.items():
        stored = model.checkpoint.slice(disk)
        usual = stored.dtype == model.stored_dtype and tree[name].dtype == model.dtype
        if usual and name.startswith(prefix):
            yield name, stored


def _pruner_tensors(
    context: RunContext, layout: PackedLayout, index: int
) -> Iterator[tuple[str, Tensor]]:
    """The top-any network of a decoder layer, if it has one."""
    from mcsharp_sdk.runtime.pruning_layout import PRUNER

    learned = layout.pruning.learned if layout.pruning is not None else None
    if learned is None or index not in learned.layers:
        return
    model = context.model
    path = f"{model.layer_path(index)}.{model.topology.moe[index].experts}.{PRUNER}"
    for name, tensor in context.layers(TOP_ANY_ROUTER).tensors(index).items():
        yield f"{path}.{name}", tensor


def _write_artifacts(context: RunContext, output: Path) -> None:
    for kind in (ExpertStatistics, BitMap, TokenProtectionRule, TopAnyTraining):
        if context.directory.has(kind):
            context.read(kind).save(output / kind.FILE)
    if context.directory.has(TopAnyTraining):
        plot = training_plot(context.read(TopAnyTraining))
        (output / TRAINING_PLOT).write_text(plot, encoding="utf-8")


def _write_page(context: RunContext, output: Path) -> None:
    """The report as a page. A picture that cannot be drawn must not cost hours of work."""
    try:
        write_report(output)
    except Exception as error:
        context.report.warn(
            f"the page of the report could not be written ({type(error).__name__}: {error}); the "
            "model is complete, and 'mcsharp report' tries again"
        )


def _write_config(model: SourceModel, layout: PackedLayout, output: Path) -> None:
    """The original's config with the layout, and with the dtype where it does not say any."""
    from mcsharp_sdk.models.architecture import named_dtype, read_config

    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = layout.to_dict()
    if named_dtype(read_config(model.path)) is None:
        config["dtype"] = str(model.stored_dtype).removeprefix("torch.")
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_files(source: Path, output: Path) -> None:
    """Copy tokenizer, chat template and the like from one model folder to another."""
    for pattern in COPIED_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, output / file.name)


def _report(context: RunContext, layout: PackedLayout, output: Path) -> dict[str, Any]:
    from mcsharp_sdk.evaluation.cost import cost_facts, model_cost

    before, after = model_cost(context.model.path), model_cost(output)
    bits = (
        {"nominal_bits": after.bits.nominal, "stored_bits": after.bits.stored}
        if layout.packs
        else {}
    )
    pruning = {"pruning": layout.pruning.mode} if layout.pruning is not None else {}
    return {
        "sdk_version": __version__,
        "model": context.model.path.name,
        "bytes_before": before.weight_bytes,
        "bytes_after": after.weight_bytes,
        "before": cost_facts(before),
        "after": cost_facts(after),
        **bits,
        **pruning,
        **context.report.to_dict(),
    }
