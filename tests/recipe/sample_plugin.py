"""A small third-party plug-in: two stages and an exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from mcsharp_exporters.base import Exporter
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.recipe.paths import RecipePath


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    rounds: int = 1


class Measure(Modifier):
    type: Literal["Measure"] = "Measure"
    widths: tuple[int, ...] = (1, 2, 3)
    options: Options = Options()

    writes: ClassVar[str] = "measurement"
    uses_calibration: ClassVar[bool] = True

    def run(self, context: Any) -> None:
        context.write(self.widths)


class Decide(Modifier):
    type: Literal["Decide"] = "Decide"
    target: Annotated[float, Field(gt=0, le=16)]
    rule: Literal["nearest", "lowest"] = "nearest"
    given: RecipePath | int | None = None

    reads: ClassVar[tuple[str, ...]] = ("measurement",)
    writes: ClassVar[str] = "decision"

    @model_validator(mode="after")
    def _within_reach(self) -> Decide:
        if self.target > 3:
            raise ValueError(f"target {self.target} is more than the widest width, 3")
        return self

    def needs(self) -> tuple[str, ...]:
        return () if self.given is not None else self.reads

    def run(self, context: Any) -> None:
        context.write(self.target)


class Listing(Exporter):
    type: Literal["listing"] = "listing"
    order: Literal["ascending", "descending"] = "ascending"

    reads: ClassVar[tuple[str, ...]] = ("decision",)

    def run(self, context: Any, output: Path) -> None:
        (output / "listing.txt").write_text(str(context), encoding="utf-8")
