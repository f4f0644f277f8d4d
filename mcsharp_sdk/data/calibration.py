"""The ``calibration`` part of a recipe: which text and images, and how much of them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from mcsharp_sdk.recipe.paths import BASE, RecipePath
from mcsharp_sdk.settings import refuse_truth_for_number

RANDOM_SCOPE = 64
"""Random windows are drawn from the first ``RANDOM_SCOPE * sequences * length`` tokens."""

SEQUENCES = 128
"""Sequences of a source that does not say; several that do not say share them by weight."""


class _Source(BaseModel):
    """What every source of calibration text has in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    sequences: Annotated[int, Field(gt=0, description="How many sequences to calibrate with.")] = (
        SEQUENCES
    )
    weight: Annotated[
        float | None,
        Field(
            gt=0,
            le=1e6,
            description="In a list of sources, in place of 'sequences': those that do not give "
            f"'sequences' share {SEQUENCES} in proportion to their weights; null counts as 1.",
        ),
    ] = None
    length: Annotated[int, Field(gt=0, description="Tokens per sequence.")] = 2048
    sampling: Annotated[
        Literal["random", "first"],
        Field(
            description="Which windows of the text: 'random' draws them by 'seed' without "
            f"replacement (from the first {RANDOM_SCOPE} times as many tokens as are asked for), "
            "'first' takes them from the start."
        ),
    ] = "random"
    seed: Annotated[int, Field(ge=0, description="Seed of the random choice of windows.")] = 0

    _numbers = field_validator("sequences", "weight", "length", "seed", mode="before")(
        refuse_truth_for_number  # not "*": pydantic refuses validators of what it goes by, 'source'
    )


class TextSource(_Source):
    """A text file: plain text, JSON lines or parquet."""

    source: Literal["text"] = "text"
    path: Annotated[
        RecipePath,
        Field(
            description="The file. '.jsonl' and '.ndjson' are JSON lines, '.parquet' is parquet, "
            "anything else is plain UTF-8 text. A relative path starts at the recipe's folder."
        ),
    ]
    field: Annotated[
        str,
        Field(min_length=1, description="Field or column that holds the text (jsonl, parquet)."),
    ] = "text"


def _beside_recipe(name: str, info: ValidationInfo) -> str:
    """The path of a dataset in the recipe's folder; any other name as it is."""
    base: Path | None = (info.context or {}).get(BASE)
    if base is None:
        return name
    path = base / name
    return str(path) if path.exists() else name


class DatasetSource(_Source):
    """A dataset of the ``datasets`` library, by name or local path."""

    source: Literal["dataset"] = "dataset"
    name: Annotated[
        str,
        AfterValidator(_beside_recipe),
        Field(min_length=1, description="Name on the hub, or path of a local dataset."),
    ]
    config: Annotated[
        str | None, Field(description="Configuration of the dataset, e.g. 'wikitext-2-raw-v1'.")
    ] = None
    split: Annotated[str, Field(min_length=1, description="Split to read.")] = "train"
    field: Annotated[str, Field(min_length=1, description="Column that holds the text.")] = "text"


class EmbeddedSource(_Source):
    """Text that every Python installation carries: for first steps, not for real models."""

    source: Literal["embedded"] = "embedded"


class ImageTextSource(_Source):
    """Pairs of an image and a text, for vision-language models: JSON lines beside the images."""

    source: Literal["image_text"] = "image_text"
    path: Annotated[
        RecipePath,
        Field(
            description="JSON lines, one pair each. Image paths start at the file's folder and "
            "stay in it. A relative path starts at the recipe's folder."
        ),
    ]
    image: Annotated[str, Field(min_length=1, description="Field that holds the image's path.")] = (
        "image"
    )
    text: Annotated[str, Field(min_length=1, description="Field that holds the text.")] = "text"
    length: Annotated[
        int,
        Field(
            gt=0,
            description="Most tokens of a pair. The text of a longer one is cut at its end; an "
            "image that does not fit is an error.",
        ),
    ] = 2048
    sampling: Annotated[
        Literal["random", "first"],
        Field(description="Which pairs: 'random' draws them by 'seed', 'first' takes the first."),
    ] = "random"
    seed: Annotated[int, Field(ge=0, description="Seed of the random choice of pairs.")] = 0


Calibration = Annotated[
    TextSource | DatasetSource | EmbeddedSource | ImageTextSource,
    Field(discriminator="source"),
]


def share_sequences(sources: Sequence[Calibration]) -> tuple[Calibration, ...]:
    """The sources of a list, each with its number of sequences.

    Those that do not give ``sequences`` share ``SEQUENCES`` in proportion to their weights, rounded
    by largest remainder, at least one each.
    """
    sharing = [i for i, source in enumerate(sources) if "sequences" not in source.model_fields_set]
    weights = [Fraction(sources[i].weight or 1) for i in sharing]
    exact = [SEQUENCES * weight / sum(weights) for weight in weights]
    shares = [int(part) for part in exact]
    order = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: SEQUENCES - sum(shares)]:
        shares[i] += 1
    given = {i: max(1, share) for i, share in zip(sharing, shares, strict=True)}
    # A weight has done its work then, and would contradict the number.
    return tuple(
        source.model_copy(update={"sequences": given[i], "weight": None}) if i in given else source
        for i, source in enumerate(sources)
    )
