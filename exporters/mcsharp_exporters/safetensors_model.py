"""Exporter ``safetensors``: the compressed model that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from mcsharp_exporters.base import Exporter
from mcsharp_exporters.model_card import model_card
from mcsharp_exporters.output_folder import copy_files
from mcsharp_exporters.run_tensors import model_layout, named_layer_tensors, outer_tensors
from mcsharp_sdk._version import __version__
from mcsharp_sdk.artifacts import (
    QUANTIZED_WEIGHTS,
    TOP_ANY_ROUTER,
    BitMap,
    ExpertStatistics,
    TokenProtectionRule,
    TopAnyTraining,
)
from mcsharp_sdk.folders import CARD_FILE, RECIPE_FILE, REPORT_FILE
from mcsharp_sdk.report.page import write_report
from mcsharp_sdk.report.training import training_plot

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.models.source import SourceModel
    from mcsharp_sdk.runtime.layout import PackedLayout

TRAINING_PLOT = "top_any_training.svg"


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
        (output / RECIPE_FILE).write_text(context.recipe.as_run, encoding="utf-8")
        report = _report(context, layout, output)
        (output / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        model_class = auto_class(context.model.config).__name__
        card = model_card(context.model.path.name, report, context.recipe.as_run, model_class)
        (output / CARD_FILE).write_text(card, encoding="utf-8")
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
