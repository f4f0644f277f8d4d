"""mcsharp evaluate: perplexity and cost of a model folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcsharp_sdk.cli.options import JsonOption, MaxTokensOption, TextOption, WindowOption
from mcsharp_sdk.cli.output import console, print_json, print_table

if TYPE_CHECKING:
    from mcsharp_sdk.evaluation.evaluate import Evaluation


def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the model.")],
    text: TextOption = None,
    window: WindowOption = None,
    max_tokens: MaxTokensOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    pruning: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            help="How to prune experts: off, rule, learned or both. Default: as it was made.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure perplexity, bits, bytes and activated experts of a model, compressed or not.

    An exported ONNX model runs with onnxruntime.
    """
    from mcsharp_sdk.evaluation.evaluate import evaluate as measure

    result = measure(
        directory,
        text,
        window=window,
        max_tokens=max_tokens,
        device=device,
        dtype=dtype,
        pruning=pruning,
        track=_progress,
    )
    if json:
        print_json(result.to_json())
    else:
        show_evaluation(result)


def show_evaluation(result: Evaluation) -> None:
    """Print an evaluation for people."""
    from rich.filesize import decimal

    bits = f"{result.nominal_bits:.3f} nominal, {result.stored_bits:.3f} stored"
    computed = f"in {result.dtype} on {result.device} in {result.seconds:.1f} s"
    facts = [
        ("text", result.text),
        ("tokens", f"{result.tokens:,} in {result.windows} windows of {result.window}"),
        ("perplexity", f"{result.perplexity:.4g}"),
        ("bits per weight", bits if result.compressed else f"{bits}; not compressed"),
        ("weights on disk", decimal(result.bytes)),
        ("expert pruning", result.pruning),
    ]
    if result.activated_expert_ratio is not None:
        facts.append(("activated experts", f"{result.activated_expert_ratio:.1%}"))
    if result.activated_bytes_per_token is not None:
        read = decimal(round(result.activated_bytes_per_token))
        facts.append(("weights read per token", read))
    facts.append(("computed", computed))
    print_table(result.model, ["", ""], facts)
    if result.activated_expert_ratio_per_layer and result.pruning != "off":
        shares = result.activated_expert_ratio_per_layer.items()
        rows = [(str(layer), f"{share:.1%}") for layer, share in shares]
        print_table("Activated experts", ["layer", "share"], rows)


def _progress(windows: range) -> Iterable[int]:
    """A bar on standard error, if that is a terminal."""
    from rich.progress import track

    status = console(stderr=True)
    return track(windows, "windows", console=status, disable=not status.is_terminal, transient=True)
