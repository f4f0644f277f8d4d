"""What happened to a layer while it was quantised, for the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mcsharp_sdk.models.ranks import Ranks


@dataclass
class LayerNotes:
    """What happened to a layer, for the report.

    Attributes
    ----------
    raised_damping : matrices whose Hessian needed more damping.
    fallbacks : matrices that were rounded to nearest because no damping helped.
    starved : experts that fewer tokens reached than their input has columns -> tokens.
    squared_error, squared_output : part of the layer (``experts``, ``self_attn`` …) -> what
        quantising changed of the outputs of its matrices on the calibration inputs, and those
        outputs themselves, squared and summed up to a common factor.
    """

    raised_damping: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    starved: dict[str, int] = field(default_factory=dict)
    squared_error: dict[str, float] = field(default_factory=dict)
    squared_output: dict[str, float] = field(default_factory=dict)

    def add_error(self, part: str, error: float, output: float) -> None:
        """Count a matrix to its part of the layer."""
        self.squared_error[part] = self.squared_error.get(part, 0.0) + error
        self.squared_output[part] = self.squared_output.get(part, 0.0) + output

    def to_json(self) -> dict[str, Any]:
        """JSON values; None for squares that are not known, as those of a Hessian with NaN."""
        found = asdict(self)
        for name in ("squared_error", "squared_output"):
            squares = found[name].items()
            found[name] = {part: v if math.isfinite(v) else None for part, v in squares}
        return found

    def merge(self, ranks: Ranks) -> LayerNotes:
        """Those of all processes, in the order of the experts."""
        if ranks.alone:
            return self
        notes = ranks.collect(self)
        return LayerNotes(
            sorted((n for note in notes for n in note.raised_damping), key=_place),
            sorted((n for note in notes for n in note.fallbacks), key=_place),
            dict(sorted((s for note in notes for s in note.starved.items()), key=_number)),
            _summed(note.squared_error for note in notes),
            _summed(note.squared_output for note in notes),
        )


def _place(name: str) -> tuple[int, int]:
    """Where a matrix comes: linears first, then by expert, gate and up before down."""
    parts = name.split(".")
    return (int(parts[1]), int(parts[2] == "down")) if parts[0] == "experts" else (-1, 0)


def _summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums of several mappings, key by key."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _number(starved: tuple[str, int]) -> int:
    return int(starved[0])
