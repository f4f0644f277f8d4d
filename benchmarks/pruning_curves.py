"""Perplexity against activated experts of one model, by several ways to drop experts.

    python benchmarks/pruning_curves.py MODEL CALIBRATION.txt EVALUATION.txt --work DIR \
        [--settings weight-only attention otp-block …] [--sequences 48] [--length 512] \
        [--tokens 32768] [--group-size 64] [--target-bits 2.5]

Quantises MODEL once, then prunes it by each method at several strengths: thresholds of the routing
weights' ratio for the rules, shares of dropped tokens, and target shares of activated experts for
the trained networks. Calibrates on the first SEQUENCES windows of CALIBRATION, evaluates on the
first TOKENS tokens of EVALUATION. Finished points are kept in DIR and skipped by a second call.
Prints a Markdown table per method and one with all methods at equal shares of activated experts,
and writes DIR/curves.svg.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import mcsharp_sdk
from mcsharp_sdk.report.plot import line_plot

UNPRUNED = "unpruned"
Curve = Sequence[tuple[float, float]]
"""(share of activated experts, perplexity), the share ascending."""


@dataclass(frozen=True)
class Method:
    """Stages behind the quantisation, and the setting that says how strongly they prune.

    Attributes
    ----------
    stages : of the recipe; arguments of the command line are put in by ``stages_of``.
    strength : the setting that is varied.
    values : name of the command line's argument that holds its values.
    """

    stages: Sequence[Mapping[str, Any]]
    strength: str
    values: str


def rule(metric: str) -> dict[str, Any]:
    """The stage of a rule."""
    return {"type": "TokenProtection", "metric": metric}


def network(scope: str) -> dict[str, Any]:
    """The stage that trains networks."""
    return {"type": "TopAnyRouter", "scope": scope}


THRESHOLD = ("stages.TokenProtection.threshold", "thresholds")
DROP = ("stages.TokenProtection.drop_ratio", "drop_ratios")
TARGET = ("stages.TopAnyRouter.target_activation", "targets")
METHODS = {
    UNPRUNED: Method([], "stages.BitAllocation.target_bits", "target_bits"),
    "weight-only": Method([rule("none")], *THRESHOLD),
    "attention": Method([rule("attention")], *THRESHOLD),
    "kurtosis": Method([rule("kurtosis")], *THRESHOLD),
    "variance": Method([rule("variance")], *THRESHOLD),
    "mean": Method([rule("mean")], *THRESHOLD),
    "drop-insignificant": Method([rule("drop_insignificant")], *DROP),
    "otp-block": Method([network("block")], *TARGET),
    "otp-model": Method([network("model")], *TARGET),
    "otp-protection": Method([network("block"), rule("attention")], *TARGET),
}
"""Name -> method; ``attention`` is ODP, ``weight-only`` what Lu et al. do (arXiv 2402.14800)."""


def recipe(method: Method, arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe that the method's strength is varied in."""
    changes = {
        "TokenProtection": {"protect_ratio": arguments.protect_ratio},
        "TopAnyRouter": yaml.safe_load("\n".join(arguments.otp)) or {},
    }
    group = {"group_size": arguments.group_size}
    bits = arguments.target_bits[0]
    allocate: dict[str, Any] = {"type": "BitAllocation", "target_bits": bits}
    quantise = [
        {"type": "ExpertStats", **group},
        allocate,
        {"type": "GPTQQuantize", **group, "other_bits": 4, "router_bits": None},
    ]
    if arguments.factors is not None:
        allocate["factors"] = str(arguments.factors.absolute())
        del quantise[0]
    calibration = {
        "source": "text",
        "path": str(arguments.calibration.absolute()),
        "sequences": arguments.sequences,
        "length": arguments.length,
        "sampling": "first",
    }
    prune = [{**stage, **changes[stage["type"]]} for stage in method.stages]
    return {"version": 1, "calibration": calibration, "stages": [*quantise, *prune]}


def points(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The evaluations of one method, each with its ``strength``; failures are printed."""
    method = METHODS[name]
    done = mcsharp_sdk.sweep(
        recipe(method, arguments),
        arguments.model,
        arguments.work / name,
        {method.strength: getattr(arguments, method.values)},
        text=arguments.evaluation,
        window=arguments.length,
        max_tokens=arguments.tokens,
        run_dir=arguments.work / "run",
        device=arguments.device,
    )
    for failed in done.failures:
        print(f"{name}, {failed.name} failed: {failed.error}\n")
    return [
        {**result.evaluation, "strength": result.settings[method.strength]}
        for result in done.results
        if not result.error
    ]


def table(name: str, found: Sequence[Mapping[str, Any]], reference: float) -> str:
    """Markdown table of one method; d is ln(perplexity) above the unpruned model's."""
    strength = METHODS[name].strength.rpartition(".")[2]
    lines = [
        f"{name}\n",
        f"| {strength} | activated experts | MB read per token | perplexity | d | change |",
        "|---|---|---|---|---|---|",
    ]
    for point in found:
        perplexity = point["perplexity"] or math.inf
        lines.append(
            f"| {point['strength']:g} | {point['activated_expert_ratio']:.1%} "
            f"| {point['activated_bytes_per_token'] / 1e6:.2f} | {perplexity:.3f} "
            f"| {math.log(perplexity / reference):.4f} | {perplexity / reference - 1:+.2%} |"
        )
    return "\n".join(lines)


def curve(found: Sequence[Mapping[str, Any]]) -> Curve:
    """The finite points of a method, by the share of activated experts."""
    finite = [p for p in found if p["perplexity"] is not None]
    return sorted((float(p["activated_expert_ratio"]), float(p["perplexity"])) for p in finite)


def interpolate(points: Curve, share: float) -> float | None:
    """Perplexity at a share, ln(perplexity) taken to be linear between points; None outside."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= share <= right:
            part = (share - left) / (right - left) if right > left else 0.0
            return math.exp((1 - part) * math.log(low) + part * math.log(high))
    return None


def comparison(curves: Mapping[str, Curve], shares: Sequence[float]) -> str:
    """Markdown table of all methods at equal shares of activated experts."""
    lines = [
        f"| method | {' | '.join(f'{share:.0%}' for share in shares)} |",
        f"|---|{'---|' * len(shares)}",
    ]
    for name, found in curves.items():
        values = [interpolate(found, share) for share in shares]
        cells = ["–" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parsed()
    arguments.work.mkdir(parents=True, exist_ok=True)
    (unpruned,) = points(UNPRUNED, arguments)
    reference = unpruned["perplexity"]
    print(f"{table(UNPRUNED, [unpruned], reference)}\n")
    curves: dict[str, Curve] = {}
    for name in arguments.settings:
        found = points(name, arguments)
        print(f"{table(name, found, reference)}\n", flush=True)
        curves[name] = curve([*found, unpruned])
    print("Perplexity at equal shares of activated experts, interpolated\n")
    print(comparison(curves, arguments.shares))
    percent = {name: [(100 * x, y) for x, y in found] for name, found in curves.items()}
    plot = line_plot(
        percent,
        title=f"{arguments.model.name} at {arguments.target_bits[0]:g} bits",
        x_label="activated experts, % of top-k",
        y_label="perplexity",
    )
    (arguments.work / "curves.svg").write_text(plot, encoding="utf-8")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for results")
    names = [name for name in METHODS if name != UNPRUNED]
    parser.add_argument("--settings", nargs="+", choices=names, default=names)
    parser.add_argument("--thresholds", nargs="+", type=float, default=[0.2, 0.4, 0.6, 0.8])
    parser.add_argument("--drop-ratios", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.3])
    parser.add_argument("--targets", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.95, 0.9, 0.85, 0.8, 0.7])
    parser.add_argument("--protect-ratio", type=float, default=0.02)
    parser.add_argument(
        "--otp", nargs="*", default=[], help="settings of TopAnyRouter, e.g. 'steps: 800'"
    )
    parser.add_argument("--factors", type=Path, help="expert statistics, in place of measuring")
    parser.add_argument("--target-bits", nargs=1, type=float, default=[2.5])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
