"""mcsharp demo: compress the model that comes with the package, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from mcsharp_sdk.cli.options import JsonOption, ResultOption
from mcsharp_sdk.cli.output import print_json, print_table, print_text
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.folders import REPORT_FILE

if TYPE_CHECKING:
    from mcsharp_sdk.evaluation.evaluate import Evaluation

DEMO_TOKENS = 16384
DEMO_WINDOW = 256


def demo(
    output: ResultOption = Path("out/demo"),
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="RECIPE", help="Recipe to run.")
    ] = "quickstart",
    json: JsonOption = False,
) -> None:
    """Compress the model that comes with mcsharp, evaluate it before and after, and compare."""
    from mcsharp_sdk.embedded import model_directory

    source = model_directory()
    _check_own(output, source.name)

    from mcsharp_sdk.cli.plan import show_plan
    from mcsharp_sdk.engine.run import compress
    from mcsharp_sdk.evaluation.evaluate import evaluate

    compress(recipe, source, output, overwrite=True, on_plan=None if json else show_plan)
    before, after = (
        evaluate(folder, window=DEMO_WINDOW, max_tokens=DEMO_TOKENS) for folder in (source, output)
    )
    if json:
        print_json({"output": output, "before": before, "after": after})
        return
    print_table("Before and after", ["", "original", "compressed"], _rows(before, after))
    print_text(f"The compressed model is in {output}. Look into it: mcsharp inspect {output}")


def _check_own(output: Path, model: str) -> None:
    """InputError if the output holds something else than a result of the demo's model."""
    from mcsharp_sdk.artifact_file import read_json_object

    if not output.is_dir() or not any(output.iterdir()):
        return
    try:
        made_of = read_json_object(output / REPORT_FILE).get("model")
    except InputError:
        made_of = None
    if made_of != model:
        raise InputError(
            f"{output} holds something else than a result of the demo, so it is not replaced; "
            "give another --output"
        )


def _rows(before: Evaluation, after: Evaluation) -> list[tuple[str, str, str]]:
    """Figures of two evaluations side by side."""
    figures = {
        "perplexity": lambda e: f"{e.perplexity:.2f}",
        "size on disk": lambda e: decimal(e.bytes),
        "nominal bits": lambda e: f"{e.nominal_bits:.2f}",
        "stored bits": lambda e: f"{e.stored_bits:.2f}",
        "activated experts": lambda e: f"{e.activated_expert_ratio:.0%}",
    }
    return [(name, figure(before), figure(after)) for name, figure in figures.items()]
