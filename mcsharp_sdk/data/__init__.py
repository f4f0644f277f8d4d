"""Calibration data: where text and images come from, and how they become tokens."""

from mcsharp_sdk.data.calibration import (
    Calibration,
    DatasetSource,
    EmbeddedSource,
    ImageTextSource,
    TextSource,
)

__all__ = [
    "Calibration",
    "DatasetSource",
    "EmbeddedSource",
    "ImageTextSource",
    "TextSource",
]
