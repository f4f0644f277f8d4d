"""``quality`` of a recipe: how much time is spent for how good a result.

It changes defaults of stages. What a stage's entry says wins, and a stage that follows a paper
(``mode: paper`` or ``released``) is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel

Quality = Literal["fast", "balanced", "best"]

DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "fast": {
        "ExpertStats": {"quantizer": "rtn", "error_tokens": 128},
        "GPTQQuantize": {"clip_search": "narrow"},
    },
    "balanced": {},
    "best": {
        "ExpertStats": {"error_tokens": 2048},
        "BitAllocation": {"at_least": {}},
        "GPTQQuantize": {"token_damping": 1.0, "propagation": 0.5, "refinements": 2},
    },
}
"""Quality -> stage -> settings in place of its defaults; ``balanced`` is the defaults."""

FOLLOWS_A_PAPER = ("paper", "released")


def with_quality(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data with the settings that its ``quality`` stands for written out.

    Data of another shape than a recipe's is left for the validation to complain about.
    """
    quality, stages = recipe.get("quality"), recipe.get("stages")
    if quality not in get_args(Quality) or not isinstance(stages, (list, tuple)):
        return dict(recipe)
    defaults = DEFAULTS[str(quality)]
    return {**recipe, "stages": [_completed(stage, defaults) for stage in stages]}


def _completed(stage: Any, defaults: Mapping[str, Mapping[str, Any]]) -> Any:
    if isinstance(stage, BaseModel):
        given = {"type": getattr(stage, "type", None), **stage.model_dump(exclude_unset=True)}
        return type(stage).model_validate(_completed(given, defaults))
    if not isinstance(stage, Mapping) or stage.get("mode") in FOLLOWS_A_PAPER:
        return stage
    return {**defaults.get(str(stage.get("type")), {}), **stage}
