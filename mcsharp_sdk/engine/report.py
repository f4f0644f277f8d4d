"""What a run has to say beside its results."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("mcsharp_sdk")


@dataclass
class RunReport:
    """Facts and warnings that stages leave for the reader.

    Attributes
    ----------
    stages : stage key -> what it has to say, as JSON values.
    warnings : named once each, in the order in which they came up.
    """

    stages: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        """Record a warning and log it, once."""
        if message not in self.warnings:
            self.warnings.append(message)
            logger.warning(message)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"stages": dict(self.stages), "warnings": list(self.warnings)}
