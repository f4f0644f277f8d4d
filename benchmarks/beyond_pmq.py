"""Our best against PMQ as its authors' code has it, and against every other baseline.

    python benchmarks/beyond_pmq.py MODEL CALIBRATION.txt EVALUATION.txt OTHER_DOMAIN.txt \
        --work DIR [--bits 2.5 2.0 1.5] [--seeds 0 1 2] [--methods released best …]

All methods have the same calibration, attention at 4 bits, and experts of the same stored bits. A
seed chooses the calibration windows, and the widths of ``random``. d is ln(perplexity) above that
of the uncompressed model; the ratio d_best / d_released is printed for each text and budget, and
the goal is 0.5.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from method_runs import QUANTISERS, Runs, Stages, add_arguments, markdown, mean_and_spread

from mcsharp_sdk.recipe.quality import DEFAULTS

GOAL = 0.5
FREE = DEFAULTS["best"]["BitAllocation"]
BEST = DEFAULTS["best"]["GPTQQuantize"]
ROTATED = {**BEST, "rotation": "hadamard"}
METHODS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any], Stages]] = {
    "released": ("released", {"mode": "released"}, {"mode": "released"}, ()),
    "best": ("best", {}, {}, ({"type": "RouterCalibration"},)),
    "best without RouterCalibration": ("best", {}, {}, ()),
    "best, 0 bits too, without RouterCalibration": (
        "best",
        {"widths": [0, 1, 2, 3], **FREE},
        {},
        (),
    ),
    "best, nothing required, without RouterCalibration": (
        "best",
        FREE,
        {},
        (),
    ),
    "best, 0 bits too, quality best, rotated": (
        "best",
        {"widths": [0, 1, 2, 3], **FREE},
        ROTATED,
        ({"type": "RouterCalibration"},),
    ),
    "best, quality best": (
        "best",
        FREE,
        BEST,
        ({"type": "RouterCalibration"},),
    ),
    "best, quality best, rotated": (
        "best",
        FREE,
        ROTATED,
        ({"type": "RouterCalibration"},),
    ),
    "uniform, quality best, rotated": (
        "best",
        {"allocator": "uniform"},
        ROTATED,
        ({"type": "RouterCalibration"},),
    ),
    "best, quality best without RouterCalibration": (
        "best",
        FREE,
        BEST,
        (),
    ),
    "best, global budget": (
        "all",
        {"budget_scope": "global"},
        {},
        ({"type": "RouterCalibration"},),
    ),
    **{
        allocator: ("best", {"allocator": allocator}, {}, ())
        for allocator in ("uniform", "random", "frequency", "routing_weight", "f_norm")
    },
    **{
        allocator: ("all", {"allocator": allocator}, {}, ())
        for allocator in ("hessian", "block_score_predictor", "block_score_oracle")
    },
    "hessian of the loss": ("loss hessian", {"allocator": "hessian"}, {}, ()),
    "best, 2 and 3 bits, quality best, rotated": (
        "best",
        {"widths": [2, 3], **FREE},
        ROTATED,
        ({"type": "RouterCalibration"},),
    ),
    **{
        f"uniform, {name}": ("best", {"allocator": "uniform"}, settings, ())
        for name, settings in QUANTISERS.items()
    },
}
"""Name -> statistics, settings of BitAllocation and of GPTQQuantize, and further stages."""


def stages_of(method: str, bits: float, runs: Runs, seed: int) -> Stages:
    """The stages of a method at a budget; its statistics are measured if they are not there."""
    statistics, allocation, quantisation, further = METHODS[method]
    budgeted = {"target_bits": bits, **allocation}
    return [*runs.allocated(budgeted, quantisation, seed, statistics), *further]


Distances = Mapping[tuple[str, float, str], Sequence[float]]
"""(method, bits, text) -> d of each seed."""


def ratios(distances: Distances, bits: Sequence[float], texts: Sequence[str], best: str) -> str:
    """The goal's ratio for each budget and text, with its spread."""
    lines = []
    for budget in bits:
        for text in texts:
            ours, theirs = (distances[m, budget, text] for m in (best, "released"))
            what = f"d_best / d_released at {budget:g} bits on {text}"
            if min(theirs) <= 0:
                lines.append(f"{what}: no meaning, the model does not feel these bits")
                continue
            found = [one / other for one, other in zip(ours, theirs, strict=True)]
            reached = "reached" if sum(found) / len(found) <= GOAL else "not reached"
            lines.append(f"{what}: {mean_and_spread(found)}, goal {GOAL:g} {reached}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 2.0, 1.5])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["released", "best"])
    arguments = parser.parse_args()
    runs = Runs.of(arguments)
    texts = [text.stem for text in runs.evaluations]
    distances: dict[tuple[str, float, str], list[float]] = {}
    rows = []
    for budget in arguments.bits:
        for method in arguments.methods:
            stored = 0.0
            for seed in arguments.seeds:
                stages = stages_of(method, budget, runs, seed)
                name = f"{method.replace(' ', '_').replace(',', '')}_{budget:g}"
                for text, one in runs.measured(name, stages, seed).items():
                    distances.setdefault((method, budget, text), []).append(one.d)
                    stored = one.stored_bits
            found = [mean_and_spread(distances[method, budget, text]) for text in texts]
            rows.append([f"{budget:g}", method, *found, f"{stored:.2f}"])
            print(" ".join(rows[-1]), flush=True)
    print(f"\n{markdown(['bits', 'method', *(f'd on {t}' for t in texts), 'stored bits'], rows)}\n")
    ours = [m for m in arguments.methods if m.startswith("best")]
    if "released" in arguments.methods:
        for method in ours:
            print(f"{method}\n{ratios(distances, arguments.bits, texts, method)}\n")


if __name__ == "__main__":
    main()
