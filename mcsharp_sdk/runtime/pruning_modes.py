"""How a model can prune its experts, by name; see :mod:`mcsharp_sdk.runtime.pruned_routing`."""

from __future__ import annotations

from typing import Literal, get_args

PruningMode = Literal["off", "rule", "learned", "both"]
MODES: tuple[PruningMode, ...] = get_args(PruningMode)
