"""What a model's ``config.json`` says about pruning experts at run time.

It stands under ``quantization_config.pruning``. The parameters of learned pruning are tensors of
the weight files, ``<experts>.pruner.first.weight`` and so on, float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.pruning.importance import ATTENTION, METRICS
from mcsharp_sdk.runtime.config_fields import check_fields
from mcsharp_sdk.runtime.pruning_modes import MODES, PruningMode

NO_METRIC = "none"
DROP_INSIGNIFICANT = "drop_insignificant"
RULE_METRICS = (*METRICS, NO_METRIC, DROP_INSIGNIFICANT)

MOST_UNITS = 4096
"""Of a network that drops experts."""

PRUNER = "pruner"
"""Name of the pruner within a layer's experts module."""


@dataclass(frozen=True)
class RulePruning:
    """Experts dropped by routing weight and token importance, without training.

    Attributes
    ----------
    metric : importance of a token, by name: one of :data:`mcsharp_sdk.pruning.importance.METRICS`;
        ``none`` protects no token; ``drop_insignificant`` drops all experts of the tokens that are
        least important by ``attention``, and nothing else.
    protect_ratio : share of a sequence's tokens that keep all experts.
    drop_ratio : share that loses all routed experts, of ``drop_insignificant``.
    thresholds : decoder layer -> k - 1 thresholds, for the ranks from 1; a layer that is absent
        is not pruned by rule. ``drop_insignificant`` takes only the layers from it.
    """

    metric: str
    protect_ratio: float
    drop_ratio: float
    thresholds: Mapping[int, tuple[float, ...]]

    def __post_init__(self) -> None:
        if self.metric not in RULE_METRICS:
            raise InputError(
                f"no token metric {self.metric!r}; there are {', '.join(RULE_METRICS)}"
            )
        _check_share("protect_ratio", self.protect_ratio)
        _check_share("drop_ratio", self.drop_ratio)
        for layer, thresholds in self.thresholds.items():
            for threshold in thresholds:
                _check_share(f"thresholds of decoder layer {layer}", threshold)

    @property
    def drops_tokens(self) -> bool:
        """Whether unimportant tokens lose all experts, where else important ones keep all."""
        return self.metric == DROP_INSIGNIFICANT

    @property
    def importance(self) -> str | None:
        """The measure that ranks tokens; None if tokens are not ranked."""
        if self.drops_tokens:
            return ATTENTION if self.drop_ratio else None
        return self.metric if self.metric != NO_METRIC and self.protect_ratio else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "protect_ratio": self.protect_ratio,
            "drop_ratio": self.drop_ratio,
            "thresholds": {str(layer): list(t) for layer, t in self.thresholds.items()},
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> RulePruning:
        check_fields("rule", config, cls.__dataclass_fields__)
        return cls(
            metric=str(config["metric"]),
            protect_ratio=float(config["protect_ratio"]),
            drop_ratio=float(config["drop_ratio"]),
            thresholds={
                int(layer): tuple(float(t) for t in thresholds)
                for layer, thresholds in config["thresholds"].items()
            },
        )


@dataclass(frozen=True)
class LearnedPruning:
    """Experts dropped by small trained networks.

    Attributes
    ----------
    units : width of the networks.
    layers : decoder layers that have one, ascending.
    """

    units: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.units <= MOST_UNITS:
            raise InputError(f"learned pruning has 1 to {MOST_UNITS} units, not {self.units}")
        if list(self.layers) != sorted(set(self.layers)):
            raise InputError(f"layers of learned pruning are not ascending: {list(self.layers)}")

    def to_dict(self) -> dict[str, Any]:
        return {"units": self.units, "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LearnedPruning:
        check_fields("learned", config, cls.__dataclass_fields__)
        return cls(int(config["units"]), tuple(int(layer) for layer in config["layers"]))


@dataclass(frozen=True)
class PruningLayout:
    """How a model can prune its experts, and how it does when it is loaded.

    Attributes
    ----------
    mode : what happens unless the user chooses otherwise.
    rule, learned : what the model has data for; None where it has none.
    """

    mode: PruningMode
    rule: RulePruning | None = None
    learned: LearnedPruning | None = None

    def __post_init__(self) -> None:
        if self.rule is None and self.learned is None:
            raise InputError("the model has neither a pruning rule nor learned pruning")
        self.check_mode(self.mode)

    @property
    def modes(self) -> tuple[PruningMode, ...]:
        """The modes that the model has data for."""
        return tuple(mode for mode in MODES if not self._lacks(mode))

    def check_mode(self, mode: str) -> None:
        """Raise InputError unless the model can prune in this mode."""
        if lacking := self._lacks(mode):
            raise InputError(
                f"expert pruning {mode!r} is not possible: {lacking}; "
                f"this model can do {', '.join(self.modes)}"
            )

    def _lacks(self, mode: str) -> str:
        """Why the mode is not possible; empty if it is."""
        if mode not in MODES:
            return f"there are the modes {', '.join(MODES)}"
        if mode in ("rule", "both") and self.rule is None:
            return "the model has no pruning rule (stage TokenProtection)"
        if mode in ("learned", "both") and self.learned is None:
            return "the model has no learned pruning (stage TopAnyRouter)"
        if mode == "both" and self.rule and self.rule.drops_tokens:
            return f"its rule is {DROP_INSIGNIFICANT!r}, which protects no tokens"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """``quantization_config.pruning`` of ``config.json``; what the model lacks is left out."""
        parts = {"rule": self.rule, "learned": self.learned}
        return {"mode": self.mode, **{n: part.to_dict() for n, part in parts.items() if part}}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> PruningLayout:
        """Read what ``to_dict`` writes.

        Raises
        ------
        InputError
            If it is anything else.
        """
        try:
            check_fields("it", config, cls.__dataclass_fields__)
            rule, learned = config.get("rule"), config.get("learned")
            return cls(
                mode=config["mode"],
                rule=None if rule is None else RulePruning.from_dict(rule),
                learned=None if learned is None else LearnedPruning.from_dict(learned),
            )
        except InputError as error:
            raise InputError(f"quantization_config.pruning: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"quantization_config.pruning is malformed: {error!r}") from error


def _check_share(what: str, value: float) -> None:
    if not math.isfinite(value) or not 0 <= value <= 1:
        raise InputError(f"{what}: {value} is not from 0 to 1")
