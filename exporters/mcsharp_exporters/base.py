"""What every exporter has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext


class Exporter(BaseModel, ABC):
    """A way to write a finished run down; its fields are the settings.

    Class attributes
    ----------------
    reads : names of the artifacts that the exporter needs from the stages.
    reads_routing : the exporter needs to know how the model's routers choose.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: str

    reads: ClassVar[tuple[str, ...]] = ()
    reads_routing: ClassVar[bool] = False

    @abstractmethod
    def run(self, context: RunContext, output: Path) -> None:
        """Write into ``output``, a folder that users see once all exporters are done."""
