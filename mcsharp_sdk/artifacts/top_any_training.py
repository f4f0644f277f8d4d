"""How the training of the top-any networks went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np

from mcsharp_sdk.artifact_file import VERSION, Artifact, check_version, finite_number, index
from mcsharp_sdk.errors import InputError

WHOLE_MODEL = "model"
"""Key of the curve of networks that were trained together."""


@dataclass(frozen=True)
class TrainingCurve:
    """One training, a value per step.

    Attributes
    ----------
    loss : what was minimised: ``error`` plus the penalty times ``keep_ratio``.
    error : the distillation loss alone.
    keep_ratio : mean share of the chosen experts that the sampled masks kept.
    temperature : of the Gumbel-Softmax.
    penalty : price of the keep ratio in ``loss`` (λ).
    """

    loss: Sequence[float] = ()
    error: Sequence[float] = ()
    keep_ratio: Sequence[float] = ()
    temperature: Sequence[float] = ()
    penalty: Sequence[float] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            try:
                values = np.asarray(getattr(self, field.name))
            except ValueError:  # lists of several lengths within the list
                raise InputError(f"{field.name} must be a list of numbers") from None
            if values.ndim != 1 or (values.size and values.dtype.kind not in "fi"):
                raise InputError(f"{field.name} must be a list of numbers")
            if not np.isfinite(values.astype(np.float64)).all():
                raise InputError(f"{field.name} has a value that is not finite")
            if len(values) != self.steps:
                raise InputError(
                    f"{field.name} has {len(values)} values, but loss has {self.steps}"
                )

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.loss)


@dataclass(frozen=True)
class TopAnyTraining(Artifact):
    """Curves of one TopAnyRouter stage.

    Attributes
    ----------
    scope : ``block`` or ``model``.
    curves : decoder layer -> its curve; with scope ``model`` there is one, called ``model``.
    keep_ratio : decoder layer -> share of chosen experts that the finished network keeps, on the
        calibration tokens.
    """

    NAME: ClassVar[str] = "top_any_training"
    FILE: ClassVar[str] = "top_any_training.json"

    scope: str
    curves: Mapping[str, TrainingCurve]
    keep_ratio: Mapping[int, float]

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "scope": self.scope,
            "keep_ratio": {str(layer): ratio for layer, ratio in sorted(self.keep_ratio.items())},
            "curves": {
                name: {what: list(values) for what, values in asdict(curve).items()}
                for name, curve in self.curves.items()
            },
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TopAnyTraining:
        check_version(content)
        curves, ratios = content.get("curves"), content.get("keep_ratio")
        if not isinstance(curves, dict) or not isinstance(ratios, dict):
            raise InputError("'curves' and 'keep_ratio' must be objects, layer -> values")
        return cls(
            scope=str(content.get("scope", "")),
            curves={str(name): _curve(name, values) for name, values in curves.items()},
            keep_ratio={
                index(layer, "keep_ratio: layer"): finite_number(
                    f"keep_ratio: layer {layer}", ratio, 0, 1
                )
                for layer, ratio in ratios.items()
            },
        )


def _curve(name: str, values: Any) -> TrainingCurve:
    names = [field.name for field in fields(TrainingCurve)]
    if not isinstance(values, dict) or set(values) != set(names):
        raise InputError(f"curves: {name}: must have {', '.join(names)}")
    try:
        return TrainingCurve(**values)
    except InputError as error:
        raise InputError(f"curves: {name}: {error}") from None
