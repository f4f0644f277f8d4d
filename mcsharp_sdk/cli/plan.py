"""mcsharp plan: what a run would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from mcsharp_sdk.cli.options import (
    JsonOption,
    MaxMemoryOption,
    ModelOption,
    RecipeArgument,
    SetOption,
)
from mcsharp_sdk.cli.output import print_json, print_table
from mcsharp_sdk.folders import check_model_folder

if TYPE_CHECKING:
    from mcsharp_sdk.engine.plan import Plan


def plan(
    recipe: RecipeArgument,
    model: ModelOption,
    overrides: SetOption = None,
    max_memory: MaxMemoryOption = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that torchrun will start; memory is of each.")
    ] = 1,
    json: JsonOption = False,
) -> None:
    """Show what a run would do, its size and its memory, without doing it."""
    from mcsharp_sdk.recipe import open_recipe

    check_model_folder(model)
    opened = open_recipe(recipe, overrides or [])

    from mcsharp_sdk.engine.plan import plan as make

    made = make(opened, model, max_memory=max_memory, processes=processes)
    if json:
        print_json(made.to_json())
    else:
        show_plan(made)


def show_plan(plan: Plan) -> None:
    """Print a plan for people."""
    rows = [
        (s.stage, s.summary, f"about {_duration(s.seconds)}", decimal(s.peak_memory))
        for s in plan.stages
    ]
    print_table("Stages", ["stage", "settings", "time", "memory"], rows)
    nominal = "" if plan.nominal_bits is None else f" at {plan.nominal_bits:.2f} nominal bits"
    experts = f"{plan.moe_layers} of them with {plan.experts} experts, {plan.top_k} per token"
    facts = [
        ("model", f"{plan.model}: {plan.layers} layers, {experts}"),
        ("weights now", decimal(plan.bytes_before)),
        ("weights after", f"about {decimal(plan.bytes_after)}{nominal}"),
        ("peak memory", f"about {decimal(plan.peak_memory)}{_where(plan)}"),
        ("disk", f"about {_disk(plan)}"),
    ]
    print_table("Plan", ["", ""], facts)


def _where(plan: Plan) -> str:
    if plan.spill:
        return ", with activations on disk"
    return f"; {decimal(plan.least_memory)} with activations on disk (--max-memory)"


def _disk(plan: Plan) -> str:
    return f"{decimal(plan.run_bytes)} while it runs, {decimal(plan.output_bytes)} for the result"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
