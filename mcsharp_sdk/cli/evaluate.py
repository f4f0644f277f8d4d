"""``mcsharp evaluate``: perplexity and cost of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mcsharp_sdk.evaluation.evaluate import Evaluation


def evaluate(
    directory: Annotated[Path, typer.Argument(help="Model folder, compressed or not.")],
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to predict. Default: text that comes with Python."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens per window. Default: 2048, or all positions if fewer."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Use only so many tokens from the start of the text.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure perplexity, bits, bytes and activated experts of a model."""
    from rich.console import Console
    from rich.progress import track

    from mcsharp_sdk.evaluation.evaluate import evaluate as run

    status = Console(stderr=True)
    result = run(
        directory,
        text,
        window=window,
        max_tokens=max_tokens,
        device=device,
        dtype=dtype,
        track=lambda windows: track(
            windows, "windows", console=status, disable=not status.is_terminal, transient=True
        ),
    )
    if as_json:
        typer.echo(result.to_json())
    else:
        _print(result)


def _print(result: Evaluation) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    windows = f"{result.windows} windows of {result.window}"
    rows = {
        "text": f"{result.text} ({result.tokens:,} tokens, {windows})",
        "perplexity": f"{result.perplexity:.4g}",
        "bits per quantised weight": f"{result.nominal_bits:.3f} nominal, "
        f"{result.stored_bits:.3f} stored",
        "size of the weights": decimal(result.bytes),
        "activated experts": f"{result.activated_expert_ratio:.1%}",
        "weights read per token": decimal(round(result.activated_bytes_per_token)),
        "computed": f"in {result.dtype} on {result.device}, {result.seconds:.1f} s",
    }
    if not result.compressed:
        rows["bits per quantised weight"] = f"not compressed ({result.stored_bits:.4g} stored)"
    table = Table(title=Text(result.model), show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    Console().print(table)
