"""mcsharp allocate: bit widths from a file of expert statistics alone, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcsharp_sdk.cli.options import JsonOption, new_path, path
from mcsharp_sdk.cli.output import print_json, print_table, print_text
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.folders import check_file_to_write

if TYPE_CHECKING:
    from mcsharp_sdk.artifacts import BitMap
    from mcsharp_sdk.modifiers.bit_allocation import BitAllocation

LEAST_LOST = 1e-6
"""Bits that a budget must lose by rounding to be told; less is rounding of the numbers."""

_ELSEWHERE = {
    "factors": "it is the argument of this command",
    "type": "this command is BitAllocation",
}


def allocate(
    factors: Annotated[
        Path,
        typer.Argument(
            metavar="FACTORS", parser=path, help="Expert statistics (JSON), e.g. published."
        ),
    ],
    target_bits: Annotated[
        float, typer.Option("--target-bits", help="Average width of the experts, in bits.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SETTING=VALUE",
            help="A setting of BitAllocation, e.g. mode=released; may be repeated.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=new_path,
            help="Save the map here; GPTQQuantize takes it as 'bits'.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace FILE if it is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Solve for bit widths from a factor file alone."""
    from mcsharp_sdk.modifiers.width_allocation import allocate as solve

    settings = _settings(target_bits, overrides or [])
    if output is not None:
        check_file_to_write(output)
        if output.exists() and not overwrite:
            raise InputError(f"{output} is there already; --overwrite replaces it")
    bit_map = solve(factors, settings)
    if output is not None:
        bit_map.save(output)
    if json:
        print_json(_document(bit_map, settings))
    else:
        _show(bit_map, settings, output)


def _settings(target_bits: float, overrides: list[str]) -> BitAllocation:
    """The stage's settings; InputProblems names everything that is wrong with the overrides."""
    from mcsharp_sdk.modifiers.bit_allocation import BitAllocation
    from mcsharp_sdk.recipe.document import Document
    from mcsharp_sdk.recipe.load import checked_settings
    from mcsharp_sdk.recipe.overrides import apply_overrides

    document = Document("", "mcsharp allocate", data={"target_bits": target_bits})
    apply_overrides(document, overrides)
    return checked_settings(document, BitAllocation, _ELSEWHERE)


def _document(bit_map: BitMap, settings: BitAllocation) -> dict[str, Any]:
    objective = bit_map.objective
    return {
        "bits": {layer: list(widths) for layer, widths in sorted(bit_map.bits.items())},
        "objective": None
        if objective is None
        else {"layers": dict(sorted(objective.items())), "total": sum(objective.values())},
        "nominal_bits": bit_map.nominal_bits,
        "settings": settings.model_dump(mode="json", exclude={"type", "factors"}),
    }


def _show(bit_map: BitMap, settings: BitAllocation, output: Path | None) -> None:
    objective = bit_map.objective or {}
    rows = [
        (layer, " ".join(map(str, widths)), sum(widths) / len(widths), _cost(objective.get(layer)))
        for layer, widths in sorted(bit_map.bits.items())
    ]
    title = f"{settings.allocator} at {settings.target_bits:g} bits"
    print_table(title, ["layer", "bits per expert", "mean", "cost"], rows)
    total = f", cost {sum(objective.values()):.6g} in total" if objective else ""
    print_text(f"nominal bits {bit_map.nominal_bits:.6g}{total}")
    if rounded := _rounding(bit_map, settings):
        print_text(rounded)
    if output is not None:
        print_text(f"saved in {output}")


def _rounding(bit_map: BitMap, settings: BitAllocation) -> str:
    """Why the mean may be below the target; empty if the budget is a whole number of bits."""
    counts = [len(widths) for widths in bit_map.bits.values()]
    scope = "all layers together" if settings.whole_model else "each layer"
    for experts in [sum(counts)] if settings.whole_model else sorted(set(counts)):
        asked, whole = settings.target_bits * experts, settings.budget_bits(experts)
        if asked - whole > LEAST_LOST:
            return (
                f"the budget of {scope} is rounded down to whole bits: {asked:.6g} for {experts} "
                f"experts become {whole}, {whole / experts:.6g} each"
            )
    return ""


def _cost(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
