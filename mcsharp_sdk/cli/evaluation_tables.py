"""Tables of evaluations, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from mcsharp_sdk.cli.output import print_note, print_table

if TYPE_CHECKING:
    from mcsharp_sdk.evaluation.comparison import Compared, Comparison
    from mcsharp_sdk.evaluation.evaluate import Evaluation
    from mcsharp_sdk.evaluation.tasks import TaskEvaluation, TaskResult


def show_evaluation(result: Evaluation) -> None:
    """Print an evaluation."""
    bits = f"{result.nominal_bits:.3f} nominal, {result.stored_bits:.3f} stored"
    computed = f"in {result.dtype} on {result.device} in {result.seconds:.1f} s"
    facts = [
        ("text", result.text),
        ("tokens", f"{result.tokens:,} in {result.windows} windows of {result.window}"),
        ("perplexity", f"{result.perplexity:.4g}"),
        ("bits per weight", bits if result.compressed else f"{bits}; not compressed"),
        ("weights on disk", decimal(result.bytes)),
        ("expert pruning", result.pruning),
        ("activated experts", _percent(result.activated_expert_ratio)),
        ("weights read per token", _bytes(result.activated_bytes_per_token)),
        ("parameters used per token", _count(result.activated_parameters_per_token)),
        ("computed", computed),
    ]
    print_table(result.model, ["", ""], [fact for fact in facts if fact[1] is not None])
    if result.pruning != "off" and result.activated_expert_ratio_per_layer:
        shares = result.activated_expert_ratio_per_layer.items()
        rows = [(str(layer), f"{share:.1%}") for layer, share in shares]
        print_table("Activated experts", ["layer", "share"], rows)


def show_comparison(result: Comparison) -> None:
    """Print a comparison as one table, the original first."""
    from mcsharp_sdk.evaluation.comparison import Compared

    first = result.models[0].evaluation
    text = f"{first.text}: {first.tokens:,} tokens in {first.windows} windows of {first.window}"
    rows = [_compared_row(compared) for compared in result.models]
    if result.reference is not None:
        rows.insert(0, _compared_row(Compared(result.reference)))
    columns = ["model", "perplexity", "KL (nats)", "top-1", "nominal bits", "stored bits"]
    columns += ["weights", "parameters per token", "read per token", "experts"]
    print_table(text, columns, rows)


def _compared_row(compared: Compared) -> list[Any]:
    found = compared.evaluation
    return [
        found.model,
        f"{found.perplexity:.4g}",
        compared.kl_divergence,
        _percent(compared.top1_agreement),
        f"{found.nominal_bits:.3f}",
        f"{found.stored_bits:.3f}",
        decimal(found.bytes),
        _millions(found.activated_parameters_per_token),
        _bytes(found.activated_bytes_per_token),
        _percent(found.activated_expert_ratio),
    ]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _bytes(size: float | None) -> str | None:
    return None if size is None else decimal(round(size))


def _count(number: float | None) -> str | None:
    return None if number is None else f"{round(number):,}"


def _millions(number: float | None) -> str | None:
    return None if number is None else f"{number / 1e6:,.2f} M"


def show_tasks(results: Sequence[TaskEvaluation]) -> None:
    """Print metrics of tasks, a column for each model."""
    first = results[0]
    rows = []
    for index, found in enumerate(first.results):
        cells = [_metric(result, index) for result in results]
        shots = "" if found.num_fewshot is None else str(found.num_fewshot)
        rows.append([found.task, shots, found.metric, *cells])
    means = [result.means() for result in results]
    counts = Counter(found.num_fewshot for found in first.results if found.metric == "acc")
    for number in (number for number, count in counts.items() if count > 1):
        name = "" if number is None else str(number)
        rows.append(["mean", name, "acc", *(f"{mean[number]:.4f}" for mean in means)])
    limit = f", at most {first.limit} samples each" if first.limit else ""
    columns = ["task", "shots", "metric", *(result.model for result in results)]
    print_table(f"lm-eval {first.harness}{limit}", columns, rows)


def _metric(result: TaskEvaluation, index: int) -> str:
    return _with_error(result.results[index])


def _with_error(found: TaskResult) -> str:
    error = "" if found.stderr is None else f" ± {found.stderr:.4f}"
    return f"{found.value:.4f}{error}"


def note_results(results: Sequence[TaskResult]) -> None:
    """Tell metrics of a task that is done, while others run."""
    for found in results:
        shots = "" if found.num_fewshot is None else f", {found.num_fewshot} shots"
        print_note(f"{found.task}{shots}: {found.metric} {_with_error(found)}")
