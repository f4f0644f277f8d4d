"""The experts of single layers and the tokens of texts that reach them, for scripts that ask there.

For experts with a gate and SiLU. Each layer gets its inputs from the original model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.data.tokenise import load_tokenizer, token_stream
from mcsharp_sdk.models.expert_runs import ExpertRuns, run_experts
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import stream_layers

Matrices = tuple[Tensor, Tensor]
"""gate_up [2I, H] and down [H, I] of an expert, fp32."""


class Tokens(NamedTuple):
    """Tokens of an expert: their places, what reaches it [n, H] fp32, routing weights [n, 1]."""

    place: Tensor
    hidden: Tensor
    routing: Tensor


@dataclass(frozen=True)
class Expert:
    """An expert with its tokens of each text; the first text is the calibration."""

    number: int
    matrices: Matrices
    texts: Mapping[str, Tokens]

    @property
    def calibration(self) -> Tokens:
        return next(iter(self.texts.values()))

    def output(self, matrices: Matrices, tokens: Tokens) -> Tensor:
        """What it adds to its tokens, [n, H]."""
        return gated(tokens.hidden, matrices[0]) @ matrices[1].T * tokens.routing


def gated(hidden: Tensor, gate_up: Tensor) -> Tensor:
    """Inputs of the down projection."""
    gate, up = (hidden @ gate_up.T).chunk(2, -1)
    return F.silu(gate) * up


def read_layers(
    source: SourceModel, windows: Mapping[str, Tensor], wanted: Sequence[int]
) -> Iterator[tuple[int, list[Expert]]]:
    """The experts of some layers, with windows [n, length] of texts run through the original."""
    whole = CalibrationSet.of_tokens(torch.cat(list(windows.values())))
    for layer in stream_layers(source, whole):
        if layer.index in wanted:
            runs = ExpertRuns.of_layer(layer)
            experts = [_expert(runs, expert, windows) for expert in runs.experts]
            _check(experts, run_experts(layer))
            yield layer.index, experts
        if layer.index == max(wanted):
            return


def _expert(runs: ExpertRuns, expert: int, windows: Mapping[str, Tensor]) -> Expert:
    place, routing = runs.tokens.of(expert)
    matrices = tuple(runs.weights.read(name, expert).float() for name in ("gate_up", "down"))
    texts, start = {}, 0
    for name, ids in windows.items():
        own = (place >= start) & (place < start + ids.numel())
        hidden = runs.tokens.hidden[place[own]].float()
        texts[name] = Tokens(place[own], hidden, routing[own].float().unsqueeze(-1))
        start += ids.numel()
    found = Expert(expert, (matrices[0], matrices[1]), texts)
    if not len(found.calibration.place):
        raise SystemExit(f"no token reaches expert {expert}: give more --sequences")
    return found


def summed(
    experts: Sequence[Expert], chosen: Sequence[Matrices], text: str, like: Tensor
) -> Tensor:
    """Outputs of all experts with these matrices on a text, at its places in ``like``."""
    out = torch.zeros_like(like, dtype=torch.float32)
    for expert, matrices in zip(experts, chosen, strict=True):
        tokens = expert.texts[text]
        out.index_add_(0, tokens.place, expert.output(matrices, tokens))
    return out


def _check(experts: Sequence[Expert], outputs: Tensor) -> None:
    """End where the model's experts do not work as :func:`gated` has it."""
    own = [expert.matrices for expert in experts]
    found = torch.zeros_like(outputs, dtype=torch.float32)
    for text in experts[0].texts:
        found += summed(experts, own, text, outputs)
    if (found - outputs.float()).norm() > 0.02 * found.norm():
        raise SystemExit("the model's experts are not SiLU-gated with routing weights at the end")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What :func:`read_arguments` reads."""
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluations", type=Path, nargs="*")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--sequences", type=int, default=48, help="of the calibration text")
    parser.add_argument("--tokens", type=int, default=4096, help="of each other text")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)


def read_arguments(given: argparse.Namespace) -> tuple[SourceModel, dict[str, Tensor]]:
    """The model, and windows [n, length] of each text's first tokens."""
    source = SourceModel(given.model)
    tokenizer = load_tokenizer(source.path)
    limits = [given.sequences * given.length] + [given.tokens] * len(given.evaluations)
    return source, {
        file.stem: token_stream(file.read_text(), tokenizer, limit=limit).view(-1, given.length)
        for file, limit in zip([given.calibration, *given.evaluations], limits, strict=True)
    }
