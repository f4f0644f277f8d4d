"""Bits and perplexity of experts quantised with a calibration: this package's and llama.cpp's.

llama.cpp's types get an importance matrix, the mean square of each input of each expert over the
same tokens that this package is calibrated on. Both get a model's experts and nothing else; all
other weights stay. Printed, by bits, are stored bits per weight of the experts, the perplexity of
the model, and seconds of the processor on one thread: llama.cpp's for quantising alone, measuring
its importance matrix apart; this package's for all from reading the model to having written it.

    python benchmarks/calibrated_vs_llamacpp.py MODEL CALIBRATION.txt TEST.txt --ggml LIBRARY

``rounding_vs_peers.py`` says how that library is built. Where rows are no multiple of 256, as
many are taken as one that they are: llama.cpp itself would take another type.

Experts must be [experts, outputs, inputs], as transformers has Mixtral's and most others'.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peer_runs import calibration_tokens, perplexity
from rounding_vs_peers import LlamaCppType, print_row, replaced
from torch import Tensor, nn

import mcsharp_sdk
from mcsharp_sdk.evaluation.cost import model_cost

TYPES = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K"),
    *("IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_K"),
)
BUDGETS = (1.5, 2.0, 2.5, 3.0, 4.0)

Moments = Mapping[str, Tensor]
"""Name of a parameter [experts, outputs, inputs] -> mean squares [experts, inputs] fp32."""


SETTINGS: Mapping[str, tuple[str, Mapping[str, Any], Sequence[Mapping[str, Any]]]] = {
    "defaults": ("balanced", {}, []),
    "best": ("best", {"rotation": "hadamard"}, [{"type": "RouterCalibration"}]),
}
"""Name -> ``quality`` of a recipe, settings of GPTQQuantize, and further stages."""


def recipe(bits: float, settings: str, job: Mapping[str, Any]) -> mcsharp_sdk.Recipe:
    """Widths of 1 to 3 bits as the experts' errors say, or one width for all from 3 bits on."""
    quality, quantisation, further = SETTINGS[settings]
    group = {"group_size": job["group_size"]}
    allocation: dict[str, Any] = {"type": "BitAllocation", "target_bits": bits}
    if bits >= 3:
        allocation |= {"allocator": "uniform", "widths": [3, 4]}
    calibration = {
        "source": "text",
        "path": str(Path(job["calibration"]).absolute()),
        "sequences": job["sequences"],
        "length": job["length"],
        "sampling": "first",
    }
    stages = [
        *([{"type": "ExpertStats", **group}] if bits < 3 else []),
        allocation,
        {"type": "GPTQQuantize", "other_bits": None, **group, **quantisation},
        *further,
    ]
    return mcsharp_sdk.Recipe.from_dict(
        {"version": 1, "quality": quality, "calibration": calibration, "stages": stages}
    )


def ours(bits: float, settings: str, job: Mapping[str, Any]) -> tuple[float, float, float]:
    """Stored bits, seconds and perplexity of this package at a budget."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "compressed"
        start = time.process_time()
        mcsharp_sdk.compress(recipe(bits, settings, job), job["model"], output, progress=False)
        seconds = time.process_time() - start
        stored = model_cost(output).expert_bits
        assert stored is not None
        model = AutoModelForCausalLM.from_pretrained(output)
        return stored.stored, seconds, perplexity(model, dict(job))


def experts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name -> module of each layer's experts."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            yield name, module


def importance(model: Any, windows: Sequence[Sequence[int]]) -> Moments:
    """Mean squares of the inputs of each expert's matrices, over the tokens that reach it.

    Ones for an expert that none reaches.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for name, module in experts(model):
        gate_up, down = module.gate_up_proj, module.down_proj
        counts[name] = gate_up.new_zeros(len(gate_up), 1, dtype=torch.float32)
        for matrix, weights in (("gate_up_proj", gate_up), ("down_proj", down)):
            shape = (len(weights), weights.shape[2])
            sums[f"{name}.{matrix}"] = weights.new_zeros(shape, dtype=torch.float32)
        module.register_forward_pre_hook(partial(_add_squares, name, sums, counts))
    for window in windows:
        model(input_ids=torch.tensor([list(window)]), use_cache=False)
    means = {name: total / counts[name.rpartition(".")[0]] for name, total in sums.items()}
    return {name: mean.nan_to_num(nan=1.0) for name, mean in means.items()}


def _add_squares(
    name: str, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], module: Any, given: Any
) -> None:
    hidden, chosen, _ = given
    for expert in range(len(module.gate_up_proj)):
        reached = hidden[(chosen == expert).any(dim=-1)]
        gate, up = (reached @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
        inner = module.act_fn(gate) * up
        counts[name][expert] += len(reached)
        for matrix, inputs in (("gate_up_proj", reached), ("down_proj", inner)):
            sums[f"{name}.{matrix}"][expert] += inputs.float().square().sum(dim=0)


def quantise_experts(model: nn.Module, kind: LlamaCppType, moments: Moments) -> float:
    """Round a model's experts; returns seconds of the processor."""
    seconds = 0.0
    for name, weights in model.named_parameters():
        if name not in moments:
            continue
        for matrix, squares in zip(weights, moments[name], strict=True):
            columns = matrix.shape[1]
            together = kind.columns // math.gcd(columns, kind.columns)
            exact = matrix.float().reshape(-1, together * columns)
            seconds += replaced(matrix, partial(kind.quantise, exact, squares.repeat(together)))
    return seconds


def main() -> None:
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, help="text to calibrate on")
    parser.add_argument("test", type=Path, help="text to predict")
    parser.add_argument("--ggml", type=Path, required=True, help="llama.cpp's libggml-base")
    parser.add_argument("--types", nargs="*", default=TYPES, help="of llama.cpp")
    parser.add_argument("--bits", type=float, nargs="*", default=BUDGETS, help="budgets of ours")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--test-windows", type=int, default=32)
    job = vars(parser.parse_args())
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    load = partial(AutoModelForCausalLM.from_pretrained, job["model"], dtype=torch.bfloat16)

    print(f"{'experts':36}{'bits':>7}{'CPU s':>9}{'perplexity':>12}")
    model = load()
    print_row("as they are", 16, None, perplexity(model, job))
    start = time.process_time()
    moments = importance(model, calibration_tokens(job)) if job["types"] else {}
    print(f"{'importance matrix':36}{'':7}{time.process_time() - start:9.1f}", flush=True)
    for settings, bits in product(job["settings"], job["bits"]):
        stored, seconds, found = ours(bits, settings, job)
        print_row(f"ours, {settings}, {bits:g} bits", stored, seconds, found)
    for name in job["types"]:
        model, kind = load(), LlamaCppType(job["ggml"], name)
        seconds = quantise_experts(model, kind, moments)
        print_row(f"llama.cpp {name}", kind.bits, seconds, perplexity(model, job))


if __name__ == "__main__":
    main()
