"""The papers' tables and figures in small, on one model.

    python benchmarks/ablation.py MODEL CALIBRATION.txt EVALUATION.txt --work DIR \
        [--experiments allocators exponents …] [--bits 2.5 2.0 1.5] [--seeds 0]

| experiment | in MC (arXiv 2410.06270) and MC# (arXiv 2510.10962) |
|---|---|
| allocators | Figs. 5-6 and Tab. 2: allocators at several budgets |
| exponents | Tab. 10: α and β of the significance |
| signals | which signal matters most: frequency, weight, error, and pairs of them |
| quantisers | Tab. 8, and the ways to 1 bit |
| thresholds | Figs. 7-8: thresholds of the rule that drops experts |
| protection | Tab. 12: share of tokens that are protected |
| metrics | Tab. 11: what makes a token important |
| penalties | λ of TopAnyRouter |

The first four compress the model anew for each row, and share runs with each other and with
``beyond_pmq.py`` in the same DIR. The others prune one quantised model in different ways. What is
finished is kept. d is ln(perplexity) above that of the uncompressed model.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from method_runs import QUANTISERS, Measured, Runs, add_arguments, markdown, mean_and_spread

import mcsharp_sdk
from mcsharp_sdk.allocation import ALLOCATORS


class Row(NamedTuple):
    """One run: what it is called, settings of BitAllocation and of GPTQQuantize."""

    label: str
    allocation: Mapping[str, Any]
    quantisation: Mapping[str, Any] = {}


class Pruning(NamedTuple):
    """A stage behind the quantisation, and the values of one of its settings."""

    stage: str
    setting: str
    values: Sequence[float | str]


def allocators(bits: Sequence[float]) -> Iterator[Row]:
    for budget, name in itertools.product(bits, ALLOCATORS):
        yield Row(f"{name} at {budget:g}", {"allocator": name, "target_bits": budget})


def exponents(bits: Sequence[float]) -> Iterator[Row]:
    for alpha, beta in itertools.product((0.0, 1.0, 1.5), repeat=2):
        powers = {name: value for name, value in (("alpha", alpha), ("beta", beta)) if value}
        yield Row(f"α {alpha:g}, β {beta:g}", {**powers, "target_bits": bits[0]})


SIGNALS: Mapping[str, Mapping[str, Any]] = {
    "frequency": {"allocator": "frequency"},
    "weight": {"allocator": "routing_weight"},
    "error": {},
    "frequency and error": {"alpha": 1.0},
    "weight and error": {"beta": 1.0},
    "all three": {"alpha": 1.0, "beta": 1.0},
}
"""Name -> settings of BitAllocation. Without the error, 4^-b stands for how it falls; frequency
and weight together without it have no allocator."""


def signals(bits: Sequence[float]) -> Iterator[Row]:
    for name, settings in SIGNALS.items():
        yield Row(name, {"target_bits": bits[0], **settings})


def quantisers(bits: Sequence[float]) -> Iterator[Row]:
    ways: Mapping[str, Mapping[str, Any]] = {"gptq": {}, **QUANTISERS}
    for budget, (name, settings) in itertools.product((3.0, 2.0), ways.items()):
        allocation = {"allocator": "uniform", "target_bits": budget}
        yield Row(f"{name} at {budget:g}", allocation, settings)
    one_bit = {"allocator": "uniform", "target_bits": 1.0}
    for binary in ("optimised", "released", "paper"):
        yield Row(f"1 bit, {binary}", one_bit, {"binary": binary})


EXPERIMENTS: Mapping[str, Callable[[Sequence[float]], Iterator[Row]]] = {
    "allocators": allocators,
    "exponents": exponents,
    "signals": signals,
    "quantisers": quantisers,
}

METRICS = ("attention", "kurtosis", "variance", "mean", "none", "drop_insignificant")
PRUNINGS = {
    "thresholds": Pruning("TokenProtection", "threshold", (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
    "protection": Pruning("TokenProtection", "protect_ratio", (0.0, 0.01, 0.02, 0.05, 0.1)),
    "metrics": Pruning("TokenProtection", "metric", METRICS),
    "penalties": Pruning("TopAnyRouter", "activation_penalty", (0.0, 0.001, 0.01, 0.1, 1.0)),
}

Results = Iterable[tuple[str, Sequence[Mapping[str, Measured]]]]
"""(label of a row, for each seed: name of a text -> what was measured)."""


def compressed(name: str, bits: Sequence[float], seeds: Sequence[int], runs: Runs) -> Results:
    """The rows of an experiment that compresses anew."""
    for number, row in enumerate(EXPERIMENTS[name](bits)):
        yield (
            row.label,
            [
                runs.measured(
                    f"{name}_{number}", runs.allocated(row.allocation, row.quantisation, seed), seed
                )
                for seed in seeds
            ],
        )


def pruned(name: str, bits: Sequence[float], seeds: Sequence[int], runs: Runs) -> Results:
    """The rows of an experiment that prunes one quantised model."""
    _, setting, values = PRUNINGS[name]
    found = [swept(name, PRUNINGS[name], bits[0], seed, runs) for seed in seeds]
    for value in values:
        yield f"{setting} {value}", [by_value[value] for by_value in found]


def swept(
    name: str, pruning: Pruning, bits: float, seed: int, runs: Runs
) -> dict[float | str, dict[str, Measured]]:
    """Value of the setting -> name of a text -> what the pruned model comes to on it."""
    quantised = runs.allocated({"target_bits": bits}, {}, seed)
    recipe = runs.recipe([*quantised, {"type": pruning.stage}], seed)
    setting = f"stages.{pruning.stage}.{pruning.setting}"
    measured: dict[float | str, dict[str, Measured]] = {value: {} for value in pruning.values}
    for text in runs.evaluations:
        done = mcsharp_sdk.sweep(
            recipe,
            runs.model,
            runs.work / f"{name}_{bits:g}_seed_{seed}_{text.stem}",
            {setting: pruning.values},
            text=text,
            window=runs.length,
            max_tokens=runs.tokens,
            run_dir=runs.work / "pruned.run",
            device=runs.device,
        )
        original = runs.original()[text.stem]["perplexity"]
        for result in done.results:
            if result.error:
                raise SystemExit(f"{name}, {result.settings}: {result.error}")
            measured[result.settings[setting]][text.stem] = Measured.of(result.evaluation, original)
    return measured


def table(name: str, bits: Sequence[float], seeds: Sequence[int], runs: Runs) -> str:
    """Markdown table of one experiment."""
    texts = [text.stem for text in runs.evaluations]
    rows: list[list[str]] = []
    for label, found in (compressed if name in EXPERIMENTS else pruned)(name, bits, seeds, runs):
        first = found[0][texts[0]]
        cells = [mean_and_spread([one[text].d for one in found]) for text in texts]
        rows.append([label, *cells, f"{first.stored_bits:.2f}", f"{first.activated:.1%}"])
        print(" ".join(rows[-1]), flush=True)
    head = [name, *(f"d on {text}" for text in texts), "stored bits", "activated experts"]
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_arguments(parser)
    names = [*EXPERIMENTS, *PRUNINGS]
    parser.add_argument("--experiments", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--bits",
        type=float,
        nargs="+",
        default=[2.5, 2.0, 1.5],
        help="of allocators; other experiments take the first, and quantisers have their own",
    )
    arguments = parser.parse_args()
    runs = Runs.of(arguments)
    for name in arguments.experiments:
        print(f"\n{table(name, arguments.bits, arguments.seeds, runs)}\n", flush=True)


if __name__ == "__main__":
    main()
