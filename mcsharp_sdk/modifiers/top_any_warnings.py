"""What to tell about top-any networks that did not do what they were trained for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mcsharp_sdk.artifacts import WHOLE_MODEL, TopAnyTraining, TrainingCurve
from mcsharp_sdk.modifiers.top_any_target import TOLERANCE
from mcsharp_sdk.modifiers.top_any_training import NEAR_TARGET

FLAT = 0.005
"""A keep ratio that moved less than this over a whole training has not been trained."""


def training_warnings(
    training: TopAnyTraining, top_k: Mapping[int, int], target: float | None
) -> list[str]:
    """Collapsed layers, trainings that went nowhere, and targets that were missed.

    Parameters
    ----------
    top_k : decoder layer -> experts per token.
    target : share of experts that was asked for; None if none was.
    """
    warnings = list(_collapsed(training.keep_ratio, top_k, target))
    for name, curve in training.curves.items():
        whole = name == WHOLE_MODEL
        layers = list(training.keep_ratio) if whole else [int(name)]
        what = "the networks" if whole else f"layer {name}: its network"
        kept = sum(training.keep_ratio[layer] for layer in layers) / len(layers)
        if _never_trained(curve, target):
            warnings.append(
                f"TopAnyRouter: {what} never trained: the share of kept experts went from "
                f"{_early(curve.keep_ratio):.3f} to {_late(curve.keep_ratio):.3f} in {curve.steps} "
                "steps; give more steps or a higher learning_rate"
            )
        if target is not None and abs(kept - target) > TOLERANCE:
            warnings.append(
                f"TopAnyRouter: {what} kept {kept:.3f} of the experts of the calibration tokens, "
                f"where {target:g} was asked for"
            )
    return warnings


def _collapsed(
    kept: Mapping[int, float], top_k: Mapping[int, int], target: float | None
) -> Iterator[str]:
    for layer, ratio in kept.items():
        one = 1 / top_k[layer]
        if ratio == 1 and target != 1:
            yield f"TopAnyRouter: layer {layer}: its network keeps all experts of every token"
        elif ratio <= one + 1e-9 and (target is None or target > one + TOLERANCE):
            yield f"TopAnyRouter: layer {layer}: its network keeps one expert of every token"


def _never_trained(curve: TrainingCurve, target: float | None) -> bool:
    """Whether the share that was kept stayed what it was, though something else was wanted."""
    if not curve.steps:
        return False
    early, late = _early(curve.keep_ratio), _late(curve.keep_ratio)
    return abs(late - early) < FLAT and (target is None or abs(late - target) > NEAR_TARGET)


def _early(values: Sequence[float]) -> float:
    """Mean of the first tenth."""
    part = values[: max(1, len(values) // 10)]
    return sum(part) / len(part)


def _late(values: Sequence[float]) -> float:
    """Mean of the last tenth."""
    return _early(values[::-1])
