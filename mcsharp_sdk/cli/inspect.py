"""``mcsharp inspect``: what a model folder holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from mcsharp_sdk.evaluation.inspection import Inspection


def inspect(
    directory: Annotated[Path, typer.Argument(help="Model folder, compressed or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show layers, experts, router, bytes by role and bit widths; no weight is loaded."""
    from rich.console import Console

    from mcsharp_sdk.evaluation.inspection import inspect_model

    found = inspect_model(directory)
    if as_json:
        typer.echo(found.to_json())
        return
    console = Console()
    console.print(_overview(found))
    console.print(_roles(found))
    if found.widths is not None:
        console.print(_widths(found))


def _overview(found: Inspection) -> Table:
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    cost = found.cost
    rows = {
        "architecture": found.model_type,
        "decoder layers": f"{found.layers}, {len(found.experts_per_layer)} with experts",
        "experts": _experts(found),
        "router": _router(found),
        "parameters": f"{cost.parameters:,}",
        "size of the weights": decimal(cost.weight_bytes),
        "read per token": f"{decimal(round(cost.activated_bytes()))} if experts are chosen equally",
        "bits per quantised weight": _bits(found),
        "can be compressed": "already is" if cost.compressed else found.unsupported or "yes",
    }
    table = Table(title=Text(found.model), show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _bits(found: Inspection) -> str:
    bits = found.cost.bits
    if not found.cost.compressed:
        return f"not compressed ({bits.stored:.4g} stored)"
    return f"{bits.nominal:.3f} nominal, {bits.stored:.3f} stored"


def _experts(found: Inspection) -> str:
    counts = sorted(set(found.experts_per_layer.values()))
    if not counts:
        return "none"
    return f"{'/'.join(map(str, counts))} per layer, {found.top_k} per token"


def _router(found: Inspection) -> str:
    if found.router is None:
        return "not known" if found.experts_per_layer else "none"
    router = found.router
    parts: list[str] = [router.scoring]
    if router.groups > 1:
        parts.append(f"{router.kept_groups} of {router.groups} groups")
    if router.correction_bias:
        parts.append("correction bias")
    if router.renormalise:
        parts.append("renormalised")
    return ", ".join(parts)


def _roles(found: Inspection) -> Table:
    from rich.filesize import decimal
    from rich.table import Table

    table = Table("role", title="Weights by role", title_justify="left")
    for heading in ("parameters", "bytes", "share"):
        table.add_column(heading, justify="right")
    total = sum(share.bytes for share in found.cost.roles.values()) or 1
    for role, share in sorted(found.cost.roles.items(), key=lambda item: -item[1].bytes):
        parameters = f"{share.parameters:,}"
        table.add_row(role, parameters, decimal(share.bytes), f"{share.bytes / total:.1%}")
    return table


def _widths(found: Inspection) -> Table:
    from rich.table import Table

    table = Table("decoder layer", "bits of its experts", title="Bit widths", title_justify="left")
    table.caption = f"group size {found.cost.group_size}; other linear layers: {_linears(found)}"
    for layer, bits in (found.widths or {}).items():
        table.add_row(str(layer), " ".join(map(str, bits)))
    return table


def _linears(found: Inspection) -> str:
    counts = Counter((found.linear_widths or {}).values())
    return ", ".join(f"{bits}-bit" for bits in sorted(counts)) or "as they were"
