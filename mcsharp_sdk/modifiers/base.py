"""What every stage of a recipe has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from mcsharp_sdk.errors import Problem
from mcsharp_sdk.settings import Settings

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.models.router_settings import RouterSettings
    from mcsharp_sdk.models.topology import MoeBlock


class Modifier(Settings, ABC):
    """A stage: its fields are the settings, ``run`` is the work, its artifact is the result.

    Class attributes
    ----------------
    reads : names of the artifacts that the stage needs from earlier stages.
    uses : names of the artifacts that change its result if an earlier stage made them.
    writes : name of the artifact that the stage makes.
    uses_calibration : the stage measures with the calibration, where there is one.
    shares_work : several processes can run it together, each with some of the calibration.
    reads_routing : the stage needs to know how the model's routers choose.
    PRESETS : mode -> default settings of that mode; what the user wrote wins over them.
    """

    type: str

    reads: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[str]
    uses_calibration: ClassVar[bool] = False
    shares_work: ClassVar[bool] = False
    reads_routing: ClassVar[bool] = False
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        preset = cls.PRESETS.get(str(settings.get("mode")), {})
        return {**preset, **settings}

    def needs(self) -> tuple[str, ...]:
        """Artifacts needed with these settings: ``reads`` less what a given file replaces."""
        return self.reads

    def needs_calibration(self) -> bool:
        """Whether a calibration must be given with these settings."""
        return self.uses_calibration

    def measures(self, *, calibrated: bool) -> bool:
        """Whether it measures with the calibration of a recipe that has one, or has none."""
        return self.needs_calibration() or (self.uses_calibration and calibrated)

    def why_not_shared(self) -> str | None:
        """Why several processes cannot run it together with these settings; None if they can."""
        if self.shares_work or not self.needs_calibration():
            return None
        return "this stage does not say that several processes can share it: start one process"

    def files(self) -> dict[str, Path]:
        """Files that the settings name: setting -> path, for existence checks and fingerprints."""
        return {}

    def check_earlier(self, stages: Sequence[Modifier]) -> list[Problem]:
        """What the stages before this one do not make as this one needs it.

        ``where`` of each problem is the name of the setting that it is about.
        """
        return []

    def check_experts(self, experts: Mapping[int, int]) -> list[Problem]:
        """What does not fit a model with so many experts per MoE layer (decoder layer -> count).

        ``where`` of each problem is the name of the setting that it is about.
        """
        return []

    def check_blocks(self, blocks: Mapping[int, MoeBlock]) -> list[Problem]:
        """What does not fit a model with such MoE blocks (decoder layer -> block).

        ``where`` of each problem is the name of the setting that it is about.
        """
        return self.check_experts({layer: block.num_experts for layer, block in blocks.items()})

    def check_routers(self, routers: Mapping[int, RouterSettings]) -> list[Problem]:
        """What does not fit a model that routes so (decoder layer -> settings of its router).

        Asked only of stages with ``reads_routing``. ``where`` of each problem is the name of the
        setting that it is about.
        """
        return []

    @abstractmethod
    def run(self, context: RunContext) -> None:
        """Do the work and write the artifact through ``context``."""
