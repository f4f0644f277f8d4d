"""Calibration data: where text and images come from, and how they become tokens."""

from mcsharp_sdk.data.calibration import (
    Calibration,
    DatasetSource,
    EmbeddedSource,
    ImageTextSource,
    TextSource,
    data_fingerprint,
)

__all__ = [
    "Calibration",
    "DatasetSource",
    "EmbeddedSource",
    "ImageTextSource",
    "TextSource",
    "data_fingerprint",
]
