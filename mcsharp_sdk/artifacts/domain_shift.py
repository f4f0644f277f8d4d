"""How differently two sources of calibration use the experts of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mcsharp_sdk.artifact_file import FloatArray
    from mcsharp_sdk.artifacts.source_statistics import SourceStatistics

NAMED = 3
"""Experts that are named as those that change most."""


@dataclass(frozen=True)
class DomainShift:
    """Two sources compared on one layer.

    Attributes
    ----------
    layer : decoder layer.
    first, second : names of the sources.
    rank_correlation : Spearman's, of the experts' shares of the selections; 1 if both sources rank
        the experts alike, around 0 if they have nothing to do with each other. None if a source
        uses all experts equally, or has no tokens here.
    changed : expert -> its share of all selections with the first and the second source; the
        experts whose shares differ most, most first.
    moved : expert -> its rank by share with the first and the second source, 0 the most used, of
        all experts whose rank differs; those that move furthest first.
    """

    layer: int
    first: str
    second: str
    rank_correlation: float | None
    changed: Mapping[int, tuple[float, float]]
    moved: Mapping[int, tuple[int, int]]

    @classmethod
    def between(cls, layer: int, first: SourceStatistics, second: SourceStatistics) -> DomainShift:
        """Compare two sources."""
        one, other = _shares(first.activation_count), _shares(second.activation_count)
        most = np.argsort(-np.abs(one - other), kind="stable")[:NAMED]
        changed = {int(e): (float(one[e]), float(other[e])) for e in most if one[e] != other[e]}
        correlation = rank_correlation(first.activation_count, second.activation_count)
        moved = _moved(_places(one), _places(other))
        return cls(layer, first.source, second.source, correlation, changed, moved)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "layer": self.layer,
            "sources": [self.first, self.second],
            "rank_correlation": self.rank_correlation,
            "changed": {str(expert): list(shares) for expert, shares in self.changed.items()},
            "moved": {str(expert): list(ranks) for expert, ranks in self.moved.items()},
        }

    def describe(self) -> str:
        """The experts that change most, for people."""
        experts = (f"{e} ({a:.1%} and {b:.1%})" for e, (a, b) in self.changed.items())
        return ", ".join(experts)


def rank_correlation(first: FloatArray, second: FloatArray) -> float | None:
    """Spearman's rank correlation of (E,) values, equal ones sharing their mean rank.

    None if all values of one of them are equal.
    """
    ranks = np.stack([_ranks(first), _ranks(second)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1)
    return float(ranks[0] @ ranks[1] / norms.prod()) if norms.all() else None


def _places(shares: FloatArray) -> list[int]:
    """Place of each expert by falling share, from 0; equal ones by index."""
    order = np.argsort(-shares, kind="stable")
    return [int(place) for place in np.argsort(order)]


def _moved(one: list[int], other: list[int]) -> dict[int, tuple[int, int]]:
    places = dict(enumerate(zip(one, other, strict=True)))
    moved = sorted(places, key=lambda e: -abs(places[e][0] - places[e][1]))
    return {e: places[e] for e in moved if places[e][0] != places[e][1]}


def _ranks(values: FloatArray) -> FloatArray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    means = np.cumsum(count) - (count + 1) / 2
    return np.asarray(means[place], dtype=np.float64)


def _shares(count: FloatArray) -> FloatArray:
    return np.asarray(count / max(float(count.sum()), 1.0))
