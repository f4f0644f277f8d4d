"""The rule by which experts are dropped per token: thresholds, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mcsharp_sdk.artifact_file import VERSION, Artifact, check_version, finite_number, index
from mcsharp_sdk.artifacts.layer_lists import layer_rows, ordered_layers
from mcsharp_sdk.errors import InputError


@dataclass(frozen=True)
class LayerProtection:
    """What calibration tells about pruning one MoE layer.

    Attributes
    ----------
    layer : index of the decoder layer.
    thresholds : one per rank behind the first (k - 1 of them): a token drops the expert of rank i
        if its weight is below ``thresholds[i - 1]`` times the largest.
    cost : norm of the change that pruning this layer makes to its block's output, over the norm of
        the hidden states behind the layer, on the calibration tokens.
    keep_ratio : share of the experts chosen by the router that is kept, on the same tokens.
    pruned : whether the layer is pruned at all.
    """

    layer: int
    thresholds: tuple[float, ...]
    cost: float
    keep_ratio: float
    pruned: bool = True

    def __post_init__(self) -> None:
        here = f"layer {self.layer}"
        for rank, threshold in enumerate(self.thresholds, 1):
            finite_number(f"{here}: thresholds: rank {rank}", threshold, 0, 1)
        finite_number(f"{here}: cost", self.cost, 0)
        finite_number(f"{here}: keep_ratio", self.keep_ratio, 0, 1)

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "pruned": self.pruned,
            "keep_ratio": self.keep_ratio,
            "cost": self.cost,
            "thresholds": list(self.thresholds),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LayerProtection:
        layer = index(content.get("layer"), "layer")
        here = f"layer {layer}"
        for name in ("thresholds", "cost", "keep_ratio"):
            if name not in content:
                raise InputError(f"{here}: {name} is missing")
        if not isinstance(content["thresholds"], list):
            raise InputError(f"{here}: thresholds must be a list of numbers")
        pruned = content.get("pruned", True)
        if not isinstance(pruned, bool):
            raise InputError(f"{here}: pruned must be true or false, not {pruned!r}")
        return cls(
            layer, tuple(content["thresholds"]), content["cost"], content["keep_ratio"], pruned
        )


@dataclass(frozen=True)
class TokenProtectionRule(Artifact):
    """Rule of all MoE layers of a model.

    Attributes
    ----------
    metric : importance of a token, see :mod:`mcsharp_sdk.pruning.importance`; ``none`` protects no
        token, ``drop_insignificant`` drops all experts of the least important ones instead.
    protect_ratio : share of the tokens of a sequence that keep all experts.
    drop_ratio : share that loses all of them, of ``drop_insignificant``.
    layers : ascending decoder layers, those that are not pruned too.
    """

    NAME: ClassVar[str] = "token_protection"
    FILE: ClassVar[str] = "token_protection.json"

    metric: str
    protect_ratio: float
    drop_ratio: float
    layers: tuple[LayerProtection, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", ordered_layers(self.layers))
        for name in ("protect_ratio", "drop_ratio"):
            finite_number(name, getattr(self, name), 0, 1)

    def thresholds(self) -> dict[int, tuple[float, ...]]:
        """Decoder layer -> thresholds, for the layers that are pruned."""
        return {found.layer: found.thresholds for found in self.layers if found.pruned}

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "metric": self.metric,
            "protect_ratio": self.protect_ratio,
            "drop_ratio": self.drop_ratio,
            "layers": [found.to_json() for found in self.layers],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TokenProtectionRule:
        check_version(content)
        layers = layer_rows(content)
        for name in ("metric", "protect_ratio"):
            if name not in content:
                raise InputError(f"{name} is missing")
        return cls(
            metric=str(content["metric"]),
            protect_ratio=content["protect_ratio"],
            drop_ratio=content.get("drop_ratio", 0.0),
            layers=tuple(LayerProtection.from_json(found) for found in layers),
        )
