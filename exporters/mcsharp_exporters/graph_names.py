"""What exported graphs and manifests call things.

Runners read it where neither torch nor onnx need be installed.
"""

from __future__ import annotations

from typing import Literal

DtypeName = Literal["fp32", "fp16", "bf16"]
Precision = Literal["fp32", "fp16"]
AccuracyLevel = Literal[0, 4]
PruningChoice = Literal["default", "off", "rule", "learned", "both"]
GraphPruning = Literal["default", "off", "weights", "rule", "learned", "both"]

HIDDEN_STATES, PROTECTED = "hidden_states", "protected"
INDICES, WEIGHTS, KEEP = "topk_indices", "topk_weights", "keep_mask"
ROUTER_OUTPUTS = (INDICES, WEIGHTS, KEEP)
"""Of a router's graph."""

INPUT_IDS, ATTENTION_MASK, LOGITS = "input_ids", "attention_mask", "logits"
PAST, PRESENT = "past_key_values.{layer}.{part}", "present.{layer}.{part}"
CACHED = ("key", "value")
"""Of a whole model's graph."""
