"""Perplexity of one model at several bit budgets, uniform and allocated, from one calibration.

    python benchmarks/quality.py MODEL CALIBRATION.txt EVALUATION.txt --work DIR \
        [--settings original uniform:3 pmq:2.5 …] [--group-size 64] [--sequences 48] [--length 512]

Calibrates on the first SEQUENCES windows of CALIBRATION, evaluates on the first TOKENS tokens of
EVALUATION. Errors of the experts are measured once and serve all allocations. A setting is
``original``, ``uniform:BITS`` or ``ALLOCATOR:BITS``. Finished settings are kept in DIR and skipped
by a second call. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import yaml

import mcsharp_sdk
from mcsharp_sdk.artifacts import ExpertStatistics


def quantise_stage(arguments: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """The GPTQQuantize stage that all settings share."""
    mode = {"type": "GPTQQuantize", "mode": arguments.mode, "group_size": arguments.group_size}
    asked = yaml.safe_load("\n".join(arguments.quantise)) or {}
    return {**mode, "other_bits": 4, "router_bits": None, **asked, **changes}


def stages_of(setting: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Stages of one setting; the first allocation measures, later ones read its factors."""
    allocator, bits = setting.split(":")
    if allocator == "uniform":
        return [quantise_stage(arguments, bits=int(bits))]
    statistics = arguments.work / ExpertStatistics.FILE
    allocation = {
        "type": "BitAllocation",
        "mode": arguments.mode,
        "allocator": allocator,
        "target_bits": float(bits),
    }
    quantise = quantise_stage(arguments)
    if statistics.exists():
        return [{**allocation, "factors": str(statistics)}, quantise]
    measure = {"type": "ExpertStats", "mode": arguments.mode, "group_size": arguments.group_size}
    return [measure, allocation, quantise]


def run(setting: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compress as one setting says and evaluate the result."""
    kept = arguments.work / f"{setting.replace(':', '_')}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    seconds: dict[str, float] = {}
    model = arguments.model
    if setting != "original":
        model = arguments.work / setting.replace(":", "_")
        calibration = {
            "source": "text",
            "path": str(arguments.calibration.absolute()),
            "sequences": arguments.sequences,
            "length": arguments.length,
            "sampling": "first",
        }
        stages = stages_of(setting, arguments)
        recipe = {"version": 1, "calibration": calibration, "stages": stages}
        done = mcsharp_sdk.compress(
            mcsharp_sdk.Recipe.from_dict(recipe), arguments.model, model, overwrite=True
        )
        seconds = dict(done.seconds)
        measured = model / ExpertStatistics.FILE
        if measured.exists() and "ExpertStats" in seconds:
            (arguments.work / ExpertStatistics.FILE).write_text(measured.read_text())
    found = mcsharp_sdk.evaluate(
        model, arguments.evaluation, window=arguments.length, max_tokens=arguments.tokens
    )
    result = {**found.to_json(), "setting": setting, "stage_seconds": seconds}
    kept.write_text(json.dumps(result, indent=1))
    return result


def table(results: list[dict[str, Any]], layers: int) -> str:
    """Markdown table; d is ln(perplexity) above the original's."""
    reference = next((r["perplexity"] for r in results if r["setting"] == "original"), None)
    lines = [
        "| setting | perplexity | d | expert bits | stored bits | MB | s per layer |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        d = math.log(r["perplexity"] / reference) if reference else math.nan
        bits = r["expert_nominal_bits"], r["expert_stored_bits"]
        work = " + ".join(
            f"{r['stage_seconds'][stage] / layers:.1f}"
            for stage in ("ExpertStats", "GPTQQuantize")
            if stage in r["stage_seconds"]
        )
        lines.append(
            f"| {r['setting']} | {r['perplexity']:.2f} | {d:.3f} | {bits[0]:.2f} | {bits[1]:.2f} "
            f"| {r['bytes'] / 1e6:.0f} | {work or '–'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for results")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["original", "uniform:3", "pmq:2.5", "uniform:2", "pmq:2.0", "pmq:1.5"],
    )
    parser.add_argument("--mode", default="best")
    parser.add_argument(
        "--quantise", nargs="*", default=[], help="settings of GPTQQuantize, e.g. 'damping: 0.01'"
    )
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32768)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    layers = json.loads((arguments.model / "config.json").read_text())["num_hidden_layers"]
    print(table([run(setting, arguments) for setting in arguments.settings], layers))


if __name__ == "__main__":
    main()
