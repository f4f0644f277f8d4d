"""A stage of your own: the busiest experts get the wide width, the others the narrow one.

Run from a clean checkout after ``make demo``:  .venv/bin/python examples/custom_stage.py

From Python a stage is given as an object. For recipes in YAML, a package of yours names the class
under the entry point ``mcsharp_sdk.modifiers``; see docs/architecture.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from mcsharp_sdk import Recipe, compress
from mcsharp_sdk.artifacts import BitMap, ExpertStatistics
from mcsharp_sdk.data.calibration import EmbeddedSource
from mcsharp_sdk.embedded import model_directory
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.modifiers.expert_stats import ExpertStats
from mcsharp_sdk.modifiers.gptq_quantize import GPTQQuantize

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext


class BusiestExperts(Modifier):
    """The experts that most tokens select get the wide width, the others the narrow one."""

    type: Literal["BusiestExperts"] = "BusiestExperts"
    keep: Annotated[int, Field(ge=0, description="Experts per layer that stay wide.")] = 2
    wide: int = 4
    narrow: int = 2

    reads: ClassVar[tuple[str, ...]] = (ExpertStatistics.NAME,)
    writes: ClassVar[str] = BitMap.NAME

    def run(self, context: RunContext) -> None:
        bits = {}
        for layer in context.read(ExpertStatistics).layers:
            busiest = set((-layer.activation_count).argsort(kind="stable")[: self.keep].tolist())
            widths = (self.wide if e in busiest else self.narrow for e in range(layer.num_experts))
            bits[layer.layer] = tuple(widths)
        context.write(BitMap(bits))


def main() -> None:
    """Compress the embedded model with it and print the widths."""
    recipe = Recipe(
        version=1,
        calibration=EmbeddedSource(sequences=8, length=128),
        stages=(
            ExpertStats(quantizer="rtn", bits=(2,)),
            BusiestExperts(keep=3),
            GPTQQuantize(quantizer="rtn", group_size=64),
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "compressed"
        compress(recipe, model_directory(), output)
        for layer, widths in BitMap.load(output / BitMap.FILE).bits.items():
            print(f"layer {layer}: {widths}")


if __name__ == "__main__":
    main()
