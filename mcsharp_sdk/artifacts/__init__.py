"""What the stages hand to each other: files that a person can read, and write by hand.

Loading one says which file, layer and expert is wrong.
"""

from mcsharp_sdk.artifacts.bit_map import WIDEST, BitMap, check_layers
from mcsharp_sdk.artifacts.domain_shift import DomainShift
from mcsharp_sdk.artifacts.layer_stores import (
    CALIBRATED_ROUTERS,
    QUANTIZED_WEIGHTS,
    TOP_ANY_ROUTER,
)
from mcsharp_sdk.artifacts.source_statistics import SourceStatistics
from mcsharp_sdk.artifacts.statistics import ExpertStatistics, LayerStatistics
from mcsharp_sdk.artifacts.token_protection import LayerProtection, TokenProtectionRule
from mcsharp_sdk.artifacts.top_any_training import WHOLE_MODEL, TopAnyTraining, TrainingCurve

__all__ = [
    "CALIBRATED_ROUTERS",
    "QUANTIZED_WEIGHTS",
    "TOP_ANY_ROUTER",
    "WHOLE_MODEL",
    "WIDEST",
    "BitMap",
    "DomainShift",
    "ExpertStatistics",
    "LayerProtection",
    "LayerStatistics",
    "SourceStatistics",
    "TokenProtectionRule",
    "TopAnyTraining",
    "TrainingCurve",
    "check_layers",
]
