"""Compress one model in many ways and evaluate each: what beyond_pmq.py and ablation.py share.

Results are kept in a folder under the name of the run, with a hash of what they depend on, and are
not computed again, by neither script.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mcsharp_sdk
from mcsharp_sdk.artifact_file import write_text_atomically
from mcsharp_sdk.artifacts import ExpertStatistics
from mcsharp_sdk.checked_files import file_hash

Stages = Sequence[Mapping[str, Any]]

STATISTICS: Mapping[str, Mapping[str, Any]] = {
    "released": {"mode": "released"},
    "best": {},
    "all": {"loss_tokens": 4096, "block_scores": True},
    "loss hessian": {"loss_tokens": 4096, "hessian": "loss"},
}
"""Name -> settings of ExpertStats."""

QUANTISERS: Mapping[str, Mapping[str, Any]] = {
    "rtn": {"quantizer": "rtn"},
    "rtn without search": {"quantizer": "rtn", "clip_search": "none"},
    "hqq": {"quantizer": "hqq"},
    "lwc": {"quantizer": "lwc"},
}
"""Name -> settings of GPTQQuantize, for quantisers other than GPTQ."""

NEEDS_ALL = ("hessian", "block_score_predictor", "block_score_oracle")
"""Allocators that the statistics ``best`` are not enough for."""


@dataclass(frozen=True)
class Measured:
    """One run on one text: ``d`` is ln(perplexity) above that of the uncompressed model."""

    d: float
    perplexity: float
    stored_bits: float
    activated: float

    @classmethod
    def of(cls, evaluation: Mapping[str, Any], original: float) -> Measured:
        """An evaluation's figures, beside the perplexity of the original on the same text."""
        perplexity = evaluation["perplexity"] or math.inf
        return cls(
            d=math.log(perplexity / original),
            perplexity=perplexity,
            stored_bits=evaluation["expert_stored_bits"],
            activated=evaluation["activated_expert_ratio"],
        )


@dataclass(frozen=True)
class Runs:
    """One model, its calibration text and the texts that it is evaluated on.

    ``further`` texts to calibrate on share the sequences, in equal parts.
    """

    model: Path
    calibration: Path
    evaluations: Sequence[Path]
    work: Path
    sequences: int
    length: int
    tokens: int
    group_size: int
    device: str
    further: Sequence[Path] = ()

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Runs:
        """As the command line says, see :func:`add_arguments`; the folder for results is made.

        SystemExit if that has results of another model or other texts.
        """
        runs = cls(**{name: getattr(arguments, name) for name in cls.__dataclass_fields__})
        runs.work.mkdir(parents=True, exist_ok=True)
        if len({text.stem for text in runs.evaluations}) < len(runs.evaluations):
            raise SystemExit("two texts have the same name: rename one, it names a column")
        runs._check_folder()
        return runs

    def _check_folder(self) -> None:
        weights = sorted(self.model.glob("*.safetensors"))
        about = {
            "model": [self.model.name, *([file.name, file.stat().st_size] for file in weights)],
            **{
                text.name: file_hash(text)
                for text in (self.calibration, *self.further, *self.evaluations)
            },
        }
        kept = self.work / "inputs.json"
        before = json.loads(kept.read_text()) if kept.exists() else {}
        changed = [name for name in about.keys() & before.keys() if about[name] != before[name]]
        if changed:
            raise SystemExit(
                f"{self.work} has results of another {' and '.join(sorted(changed))}: give another "
                "--work"
            )
        write_text_atomically(kept, json.dumps({**before, **about}, indent=1))

    def measured(self, name: str, stages: Stages, seed: int) -> dict[str, Measured]:
        """Name of a text -> what the model that these stages make comes to on it."""
        original = self.original()
        found = self._evaluated(f"{name}_seed_{seed}", stages, seed)
        return {text: Measured.of(one, original[text]["perplexity"]) for text, one in found.items()}

    def original(self) -> dict[str, Any]:
        """Name of a text -> evaluation of the uncompressed model on it."""
        return self._evaluated("original", None, seed=0)

    def statistics(self, name: str, seed: int) -> Path:
        """A file of expert statistics, measured as ``STATISTICS[name]`` says."""
        stage = {"type": "ExpertStats", "group_size": self.group_size, **STATISTICS[name]}
        recipe = {**self.recipe([stage], seed), "exports": []}
        named = name.replace(" ", "_")
        file = self.work / f"statistics_{named}_seed_{seed}_{_hash(recipe)}.json"
        if not file.exists():
            folder = self.work / f"{file.stem}.run"
            self._compress(recipe, self.work / f"{file.stem}.none", folder)
            write_text_atomically(file, (folder / ExpertStatistics.FILE).read_text())
            shutil.rmtree(folder)
        return file

    def allocated(
        self,
        allocation: Mapping[str, Any],
        quantisation: Mapping[str, Any],
        seed: int,
        statistics: str | None = None,
    ) -> list[dict[str, Any]]:
        """Stages that give widths and quantise, from statistics that suffice for the allocator."""
        allocator = allocation.get("allocator", "pmq")
        name = statistics or ("all" if allocator in NEEDS_ALL else "best")
        factors = str(self.statistics(name, seed))
        chance = {"seed": seed} if allocator == "random" else {}
        quantise = {"type": "GPTQQuantize", "group_size": self.group_size, "router_bits": None}
        return [
            {"type": "BitAllocation", "factors": factors, **chance, **allocation},
            {**quantise, **quantisation},
        ]

    def _evaluated(self, name: str, stages: Stages | None, seed: int) -> dict[str, Any]:
        """Evaluation on each text, from the folder of results if it is there."""
        recipe = None if stages is None else self.recipe(stages, seed)
        how = [recipe, [str(text) for text in self.evaluations], self.length, self.tokens]
        for found in self.work.glob(f"*_{_hash(how)}.json"):
            return dict(json.loads(found.read_text()))
        kept = self.work / f"{name}_{_hash(how)}.json"
        model = self.model
        if recipe is not None:
            model = self.work / kept.stem
            self._compress(recipe, model, self.work / f"{kept.stem}.run")
        evaluations = {
            text.stem: mcsharp_sdk.evaluate(
                model, text, window=self.length, max_tokens=self.tokens, device=self.device
            ).to_json()
            for text in self.evaluations
        }
        write_text_atomically(kept, json.dumps(evaluations, indent=1))
        for made in (self.work / kept.stem, self.work / f"{kept.stem}.run"):
            shutil.rmtree(made, ignore_errors=True)
        return evaluations

    def _compress(self, recipe: dict[str, Any], output: Path, run_dir: Path) -> None:
        mcsharp_sdk.compress(
            mcsharp_sdk.Recipe.from_dict(recipe),
            self.model,
            output,
            run_dir=run_dir,
            overwrite=True,
            device=self.device,
        )

    def recipe(self, stages: Stages, seed: int) -> dict[str, Any]:
        """The recipe of these stages; the seed draws the calibration windows."""
        texts = (self.calibration, *self.further)
        sources = [
            {
                "source": "text",
                "path": str(text.absolute()),
                "sequences": self.sequences // len(texts),
                "length": self.length,
                "sampling": "random",
                "seed": seed,
            }
            for text in texts
        ]
        calibration = sources if self.further else sources[0]
        return {"version": 1, "calibration": calibration, "stages": [dict(s) for s in stages]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What :class:`Runs` is made of."""
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, help="text to calibrate on")
    parser.add_argument("evaluations", type=Path, nargs="+", help="texts to evaluate on")
    parser.add_argument("--work", type=Path, required=True, help="folder for results")
    parser.add_argument(
        "--further", type=Path, nargs="+", default=[], help="texts that share the sequences"
    )
    parser.add_argument("--sequences", type=int, default=48, help="to calibrate on, in all")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32768, help="of each text evaluated on")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean, and the least and largest value if there are several."""
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}–{max(values):.3f})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
