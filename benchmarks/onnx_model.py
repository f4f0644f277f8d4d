"""How fast is a model exported as ONNX, and what do experts cost that no token chooses?

python benchmarks/onnx_model.py models --model MODEL --compressed DIR
python benchmarks/onnx_model.py experts

A table each in Markdown. The first compares MODEL in transformers, as it is, its compressed form
DIR in our own runtime, and exports of DIR in onnxruntime: tokens per second of a prompt and of
generation, and memory. Each is loaded in a process of its own, and they take turns; the ratio is
the median over the rounds of that to the first in the same round. The second runs one layer of
random weights while the number of experts, or of those that a token selects, changes.

One thread each, and seconds are those of its CPU time, so that other programs disturb little.
Memory is the resident set after the last round, so what was mapped counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PROMPT, GENERATED, ROUNDS = 128, 8, 3
HIDDEN, INTERMEDIATE, STEPS = 512, 1024, 40

Step = Callable[[Any, Any], tuple[int, Any]]
"""Token ids (1, n) as a list, and a cache, to the next token and the cache."""


def main() -> None:
    """Read the arguments, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parts = parser.add_subparsers(dest="part", required=True)
    models = parts.add_parser("models")
    models.add_argument("--model", type=Path, required=True)
    models.add_argument("--compressed", type=Path, required=True)
    parts.add_parser("experts")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if chosen.part == "models":
            print_models(chosen.model, chosen.compressed, chosen.rounds, Path(folder))
        else:
            print_experts(chosen.rounds, Path(folder))


# Whole models


def print_models(model: Path, compressed: Path, rounds: int, folder: Path) -> None:
    """Table of models: tokens per second, ratios and memory."""
    import mcsharp_sdk

    candidates: dict[str, tuple[Callable[[Path], Step], Path]] = {
        "transformers, bf16, not compressed": (torch_step, model),
        "mcsharp_sdk's runtime, bf16": (torch_step, compressed),
    }
    for level in (4, 0):
        output = folder / f"level{level}"
        mcsharp_sdk.export("onnx_model", compressed, output, accuracy_level=level)
        candidates[f"onnxruntime, fp32, accuracy level {level}"] = (onnx_step, output)
    measured = take_turns(candidates, rounds)
    print(f"Prompt of {PROMPT} tokens, {GENERATED} generated, {rounds} rounds, one thread.\n")
    print("| | prompt, tokens per CPU second | ratio | generation | ratio | resident MB |")
    print("|---|---|---|---|---|---|")
    first = measured[next(iter(measured))]
    for name, rows in measured.items():
        cells = []
        for part, tokens in (("prompt", PROMPT), ("generation", GENERATED)):
            seconds = [row[part] for row in rows]
            ratios = [a[part] / b[part] for a, b in zip(first, rows, strict=True)]
            cells += [f"{tokens / min(seconds):.1f}", f"{statistics.median(ratios):.2f}"]
        print(f"| {name} | {' | '.join(cells)} | {rows[-1]['megabytes']:.0f} |", flush=True)


def take_turns(
    candidates: Mapping[str, tuple[Callable[[Path], Step], Path]], rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Name -> what each round measured."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name, (load, path) in candidates.items():
        pipes[name], other = spawn.Pipe()
        spawn.Process(target=serve, args=(other, load, path), daemon=True).start()
        pipes[name].recv()
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send("measure")
            measured[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send("end")
    return measured


def serve(pipe: Connection, load: Callable[[Path], Step], path: Path) -> None:
    """Load a model, then measure whenever asked to."""
    import torch

    torch.set_num_threads(1)
    step = load(path)
    timed(step)
    pipe.send("ready")
    while pipe.recv() == "measure":
        pipe.send(timed(step))


def timed(step: Step) -> dict[str, float]:
    """CPU seconds of a prompt and of generation behind it, and the resident set."""
    start = time.process_time()
    token, cache = step([[7 * i % 1000 + 3 for i in range(PROMPT)]], None)
    read = time.process_time()
    for _ in range(GENERATED):
        token, cache = step([[token]], cache)
    end = time.process_time()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"prompt": read - start, "generation": end - read, "megabytes": pages * 4096 / 1e6}


def torch_step(path: Path) -> Step:
    """A model folder in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    import mcsharp_sdk  # noqa: F401  (lets transformers read compressed models)

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def step(ids: Any, cache: Any) -> tuple[int, Any]:
        output = model(torch.tensor(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax()), output.past_key_values

    return step


def onnx_step(path: Path) -> Step:
    """An exported folder in onnxruntime."""
    import numpy as np
    from mcsharp_exporters.onnx_model_runner import OnnxModel

    model = OnnxModel(path, "cpu", threads=1)

    def step(ids: Any, cache: Any) -> tuple[int, Any]:
        logits, cache = model(np.array(ids), cache)
        return int(logits[0, -1].argmax()), cache

    return step


# Experts


def print_experts(rounds: int, folder: Path) -> None:
    """Table of one layer: time of a token against the experts that there are and are selected."""
    cases = [(8, 1), (8, 2), (8, 4), (8, 8), (16, 2), (32, 2)]
    steps = {case: onnx_step(path) for case, path in layers(cases, folder)}
    seconds: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, step in steps.items():
            seconds[case].append(min(one_token(step) for _ in range(STEPS)))
    print(
        f"\nOne layer, hidden {HIDDEN}, intermediate {INTERMEDIATE}, 2 bits, level 4, one token.\n"
    )
    print("| experts | selected | CPU ms | ratio to 8 experts, 2 selected |")
    print("|---|---|---|---|")
    for case in cases:
        pairs = zip(seconds[case], seconds[8, 2], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"| {case[0]} | {case[1]} | {min(seconds[case]) * 1e3:.3f} | {ratio:.2f} |")


def one_token(step: Step) -> float:
    start = time.process_time()
    step([[5]], None)
    return time.process_time() - start


def layers(
    cases: Sequence[tuple[int, int]], folder: Path
) -> Iterator[tuple[tuple[int, int], Path]]:
    """Exports of one compressed layer of random weights per case."""
    import mcsharp_sdk

    compressed: dict[int, Path] = {}
    for experts, selected in cases:
        if experts not in compressed:
            compressed[experts] = compressed_layer(experts, folder)
        config = compressed[experts] / "config.json"
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({**settings, "num_experts_per_tok": selected}))
        output = folder / f"layer-{experts}-{selected}"
        mcsharp_sdk.export("onnx_model", compressed[experts], output)
        yield (experts, selected), output


def compressed_layer(experts: int, folder: Path) -> Path:
    """A model of one layer, its experts at 2 bits."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig

    import mcsharp_sdk
    from mcsharp_sdk.embedded import model_directory

    torch.manual_seed(0)
    small = model_directory()
    config = MixtralConfig(
        vocab_size=json.loads((small / "config.json").read_text())["vocab_size"],
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=experts,
        max_position_embeddings=128,
    )
    source, output = folder / f"random-{experts}", folder / f"packed-{experts}"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)
    for file in small.glob("tokenizer*"):
        shutil.copyfile(file, source / file.name)
    recipe = mcsharp_sdk.Recipe.from_dict(
        {
            "version": 1,
            "calibration": {"source": "embedded", "sequences": 1, "length": 64},
            "stages": [{"type": "GPTQQuantize", "quantizer": "rtn", "bits": 2, "group_size": 128}],
        }
    )
    mcsharp_sdk.compress(recipe, source, output)
    return output


if __name__ == "__main__":
    main()
