"""Whether a recipe fits a model, and several processes can share it: told from headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mcsharp_sdk.data.calibration import ImageTextSource
from mcsharp_sdk.data.calibration_set import FEWER
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.architecture import reads_images
from mcsharp_sdk.models.routing import router_settings
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.modifiers.expert_stats import ExpertStats
from mcsharp_sdk.modifiers.token_protection import TokenProtection
from mcsharp_sdk.pruning.importance import ATTENTION
from mcsharp_sdk.recipe.consistency import place
from mcsharp_sdk.recipe.document import Location
from mcsharp_sdk.recipe.schema import Recipe

Misfit = tuple[Location, str]


def check_model(recipe: Recipe, model: str | os.PathLike[str] | SourceModel) -> None:
    """Check that a recipe fits a model.

    Raises
    ------
    InputProblems
        With everything that does not fit, each with its place in the recipe.
    """
    source = model if isinstance(model, SourceModel) else SourceModel(Path(model))
    misfits = [
        *_stage_misfits(recipe, source),
        *_routing_misfits(recipe, source),
        *_export_misfits(recipe, source),
        *_calibration_misfits(recipe, source),
        *_attention_misfits(recipe),
    ]
    if misfits:
        raise recipe.error(misfits)


def _stage_misfits(recipe: Recipe, source: SourceModel) -> Iterator[Misfit]:
    for position, stage in enumerate(recipe.stages):
        for problem in stage.check_blocks(source.topology.moe):
            yield place(("stages", position), problem), problem.message


def _routing_misfits(recipe: Recipe, source: SourceModel) -> Iterator[Misfit]:
    try:
        routers = {layer: router_settings(source.config, layer) for layer in source.topology.moe}
    except InputError as error:
        for position, stage in enumerate(recipe.stages):
            if stage.reads_routing:
                yield ("stages", position), str(error)
        for position, exporter in enumerate(recipe.exports):
            if exporter.reads_routing:
                yield ("exports", position), str(error)
        return
    for position, stage in enumerate(recipe.stages):
        if stage.reads_routing:
            for problem in stage.check_routers(routers):
                yield place(("stages", position), problem), problem.message


def _export_misfits(recipe: Recipe, source: SourceModel) -> Iterator[Misfit]:
    for position, exporter in enumerate(recipe.exports):
        for problem in exporter.check_model(source.config):
            yield place(("exports", position), problem), problem.message


def _calibration_misfits(recipe: Recipe, source: SourceModel) -> Iterator[Misfit]:
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    for index, settings in enumerate(recipe.sources):
        location = recipe.source_location(index)
        if limit and settings.length > limit:
            message = f"{settings.length} tokens are more than the model's {limit} positions"
            yield (*location, "length"), message
        if isinstance(settings, ImageTextSource) and not reads_images(source.config):
            message = f"{source.config.model_type} reads no images: calibrate it on text"
            yield (*location, "source"), message
    if any(isinstance(settings, ImageTextSource) for settings in recipe.sources):
        for position, stage in enumerate(recipe.stages):
            if isinstance(stage, ExpertStats) and stage.loss_tokens:
                message = "gradients of the loss are measured on text alone: give 'loss_tokens: 0'"
                yield ("stages", position, "loss_tokens"), message
            ranks = isinstance(stage, TokenProtection) and stage.rule.importance is not None
            if ranks and source.topology.kept_experts:
                message = (
                    "tokens of images go to other experts in this model, so importance within a "
                    "sequence is not known: calibrate on text, or give 'metric: none'"
                )
                yield ("stages", position, "metric"), message


def _attention_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """Sequences of one token, where tokens are ranked by the attention of later ones."""
    rules = [stage.rule for stage in recipe.stages if isinstance(stage, TokenProtection)]
    metrics = [rule.metric for rule in rules if rule.importance == ATTENTION]
    for index, settings in enumerate(recipe.sources if metrics else ()):
        if settings.length == 1:
            yield (
                (*recipe.source_location(index), "length"),
                f"TokenProtection with metric {metrics[0]!r} ranks the tokens of a sequence by the "
                "attention that they receive, and one token alone has nothing to be ranked "
                "against: give 2 or more, or another metric, such as 'metric: variance'",
            )


def check_shared(recipe: Recipe, processes: int) -> None:
    """InputProblems if so many processes cannot share the stages of a recipe."""
    misfits: list[Misfit] = [
        (("stages", position), reason)
        for position, stage in enumerate(recipe.stages)
        if (reason := stage.why_not_shared()) is not None
    ]
    sequences = sum(source.sequences for source in recipe.sources)
    if recipe.sources and sequences < processes:
        fewer = FEWER.format(sequences=sequences, processes=processes)
        misfits.append((("calibration",), fewer))
    if misfits:
        raise recipe.error(misfits)
