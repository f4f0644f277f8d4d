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

Each row of a table is a run of the whole pipeline; finished ones are kept in DIR. d is
ln(perplexity) above that of the uncompressed model.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from method_runs import Runs, Stages, add_arguments, markdown, mean_and_spread

from mcsharp_sdk.allocation import ALLOCATORS


class Row(NamedTuple):
    """One run: what it is called, settings of BitAllocation and GPTQQuantize, further stages."""

    label: str
    allocation: Mapping[str, Any]
    quantisation: Mapping[str, Any] = {}
    further: Stages = ()


def allocators(bits: Sequence[float]) -> Iterator[Row]:
    for budget, name in itertools.product(bits, ALLOCATORS):
        yield Row(f"{name} at {budget:g}", {"allocator": name, "target_bits": budget})


def exponents(bits: Sequence[float]) -> Iterator[Row]:
    for alpha, beta in itertools.product((0.0, 0.5, 1.0, 1.5), repeat=2):
        settings = {"alpha": alpha, "beta": beta, "target_bits": bits[0]}
        yield Row(f"α {alpha:g}, β {beta:g}", settings)


SIGNALS: Mapping[str, Mapping[str, Any]] = {
    "frequency": {"allocator": "frequency"},
    "weight": {"allocator": "routing_weight"},
    "error": {"alpha": 0.0, "beta": 0.0},
    "frequency and error": {"alpha": 1.0, "beta": 0.0},
    "weight and error": {"alpha": 0.0, "beta": 1.0},
    "all three": {"alpha": 1.0, "beta": 1.0},
}
"""Name -> settings of BitAllocation. Without the error, 4^-b stands for how it falls; frequency
and weight together without it have no allocator."""


def signals(bits: Sequence[float]) -> Iterator[Row]:
    for name, settings in SIGNALS.items():
        yield Row(name, {"target_bits": bits[0], **settings})


def quantisers(bits: Sequence[float]) -> Iterator[Row]:
    for budget, name in itertools.product((3.0, 2.0), ("gptq", "rtn", "hqq", "lwc")):
        settings = {"allocator": "uniform", "target_bits": budget}
        yield Row(f"{name} at {budget:g}", settings, {"quantizer": name})
    one_bit = {"allocator": "uniform", "target_bits": 1.0}
    for binary in ("optimised", "released", "paper"):
        yield Row(f"1 bit, {binary}", one_bit, {"binary": binary})


def _pruned(bits: Sequence[float], label: str, **stage: Any) -> Row:
    return Row(label, {"target_bits": bits[0]}, {}, (stage,))


def thresholds(bits: Sequence[float]) -> Iterator[Row]:
    for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        yield _pruned(bits, f"threshold {value:g}", type="TokenProtection", threshold=value)


def protection(bits: Sequence[float]) -> Iterator[Row]:
    for share in (0.0, 0.01, 0.02, 0.05, 0.1):
        yield _pruned(bits, f"protected {share:g}", type="TokenProtection", protect_ratio=share)


def metrics(bits: Sequence[float]) -> Iterator[Row]:
    for metric in ("attention", "kurtosis", "variance", "mean", "none", "drop_insignificant"):
        yield _pruned(bits, metric, type="TokenProtection", metric=metric)


def penalties(bits: Sequence[float]) -> Iterator[Row]:
    for value in (0.0, 0.001, 0.01, 0.1, 1.0):
        yield _pruned(bits, f"λ {value:g}", type="TopAnyRouter", activation_penalty=value)


EXPERIMENTS: Mapping[str, Callable[[Sequence[float]], Iterator[Row]]] = {
    "allocators": allocators,
    "exponents": exponents,
    "signals": signals,
    "quantisers": quantisers,
    "thresholds": thresholds,
    "protection": protection,
    "metrics": metrics,
    "penalties": penalties,
}


def table(name: str, bits: Sequence[float], seeds: Sequence[int], runs: Runs) -> str:
    """Markdown table of one experiment."""
    texts = [text.stem for text in runs.evaluations]
    rows: list[list[str]] = []
    for row in EXPERIMENTS[name](bits):
        found = []
        for seed in seeds:
            factors = runs.statistics("all", seed, loss_tokens=4096, block_scores=True)
            chance = {"seed": seed} if row.allocation.get("allocator") == "random" else {}
            allocate = {"type": "BitAllocation", "factors": str(factors), **chance}
            quantise = {"type": "GPTQQuantize", "group_size": runs.group_size}
            stages = [
                {**allocate, **row.allocation},
                {**quantise, **row.quantisation},
                *row.further,
            ]
            found.append(runs.measured(f"{name}_{len(rows)}", stages, seed))
        first = found[0][texts[0]]
        cells = [mean_and_spread([one[text].d for one in found]) for text in texts]
        rows.append([row.label, *cells, f"{first.stored_bits:.2f}", f"{first.activated:.1%}"])
        print(" ".join(rows[-1]), flush=True)
    head = [name, *(f"d on {text}" for text in texts), "stored bits", "activated experts"]
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS)
    )
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 2.0, 1.5])
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    runs = Runs.of(arguments)
    for name in arguments.experiments:
        print(f"\n{table(name, arguments.bits, arguments.seeds, runs)}\n", flush=True)


if __name__ == "__main__":
    main()
