"""Calibration data: where the text comes from, and how it becomes tokens."""

from mcsharp_sdk.data.calibration import (
    Calibration,
    DatasetSource,
    EmbeddedSource,
    TextSource,
    data_fingerprint,
)

__all__ = ["Calibration", "DatasetSource", "EmbeddedSource", "TextSource", "data_fingerprint"]
