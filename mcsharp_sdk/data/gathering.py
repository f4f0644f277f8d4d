"""The calibration set of a recipe's sources, made with a model's own tokenizer and processor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mcsharp_sdk.data.calibration import Calibration, DatasetSource, ImageTextSource, TextSource
from mcsharp_sdk.data.calibration_set import CalibrationSet, SampleGroup
from mcsharp_sdk.data.image_text import load_processor, pair_inputs, read_pairs
from mcsharp_sdk.data.tokenise import (
    calibration_tokens,
    check_tokenizer,
    check_vocabulary,
    load_tokenizer,
)


def gather(sources: Sequence[Calibration], model_dir: Path, config: Any) -> CalibrationSet:
    """Read all sources; the groups stand in their order.

    Parameters
    ----------
    model_dir : folder with the tokenizer and, for images, the processor.
    config : of the model.

    Raises
    ------
    InputError
        If texts, images, the tokenizer or the processor cannot be read, or there is too little.
    """
    groups = [
        group
        for index, settings in enumerate(sources)
        for group in _groups(settings, index, model_dir, config)
    ]
    return CalibrationSet(tuple(groups), _names(sources))


def _groups(
    settings: Calibration, index: int, model_dir: Path, config: Any
) -> Iterator[SampleGroup]:
    vocabulary = config.get_text_config().vocab_size
    if not isinstance(settings, ImageTextSource):
        tokenizer = load_tokenizer(model_dir)
        check_tokenizer(tokenizer, vocabulary, model_dir)
        tokens = calibration_tokens(settings, tokenizer, vocabulary)
        yield SampleGroup({"input_ids": tokens}, index)
        return
    processor = load_processor(model_dir)
    for pair in read_pairs(settings):
        inputs = pair_inputs(pair, processor, config, settings.length)
        check_vocabulary(inputs["input_ids"], vocabulary)
        yield SampleGroup(inputs, index)


def _names(sources: Sequence[Calibration]) -> tuple[str, ...]:
    """A short name for each source; a number tells apart those of one name."""
    names: list[str] = []
    for settings in sources:
        name, number = _name(settings), 2
        if name in names:
            while f"{name} ({number})" in names:
                number += 1
            name = f"{name} ({number})"
        names.append(name)
    return tuple(names)


def _name(settings: Calibration) -> str:
    if isinstance(settings, (TextSource, ImageTextSource)):
        return settings.path.name
    return settings.name if isinstance(settings, DatasetSource) else settings.source
