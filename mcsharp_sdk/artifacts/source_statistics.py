"""How one source of calibration uses the experts of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mcsharp_sdk.artifact_file import FloatArray, index, numbers
from mcsharp_sdk.errors import InputError


@dataclass(frozen=True, eq=False)
class SourceStatistics:
    """What one source of calibration tells about the E experts of a layer.

    Attributes
    ----------
    source : name of the source.
    tokens : of the source.
    activation_count, routing_weight_sum : (E,) float64, as those of a layer
        (:mod:`mcsharp_sdk.artifacts.statistics`), over the source's tokens.
    """

    source: str
    tokens: int
    activation_count: FloatArray
    routing_weight_sum: FloatArray

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "tokens": self.tokens,
            "activation_count": self.activation_count.tolist(),
            "routing_weight_sum": self.routing_weight_sum.tolist(),
        }

    @classmethod
    def from_json(cls, here: str, content: Mapping[str, Any]) -> SourceStatistics:
        where = f"{here}: sources"
        values = (
            numbers(f"{where}: {name}", content.get(name))
            for name in ("activation_count", "routing_weight_sum")
        )
        tokens = index(content.get("tokens"), f"{where}: tokens")
        return cls(str(content.get("source", "")), tokens, *values)


def read_sources(here: str, rows: Any) -> tuple[SourceStatistics, ...]:
    """The statistics of each source, from JSON; ``here`` is how messages call the layer."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{here}: sources must be a list with one object per source")
    return tuple(SourceStatistics.from_json(here, row) for row in rows)
