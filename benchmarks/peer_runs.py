"""What a package does for ``compress_vs_peers.py``, measured, in a process of its own.

    python benchmarks/peer_runs.py PACKAGE JOB.json

Runs in the environment of that package, so that nothing else is imported before it is asked for.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS, ORIGINAL = "mcsharp_sdk", "original"
KEPT = ["lm_head", r"re:.*\.gate$", r"re:.*\.router$"]
"""What llm-compressor leaves as it is: head and routers, as ours does."""

Job = dict[str, Any]


def calibration_tokens(job: Job) -> list[list[int]]:
    """The first sequences of the text, the same for every package."""
    return windows(job["calibration"], job, job["sequences"])


def windows(text: str, job: Job, count: int) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(job["model"]) / "tokenizer.json"))
    tokens = tokenizer.encode(Path(text).read_text(), add_special_tokens=False).ids
    length = job["length"]
    return [tokens[length * n : length * (n + 1)] for n in range(count)]


def perplexity(model: Any, job: Job) -> float:
    """Of the first windows of the test text."""
    import torch

    losses = []
    with torch.inference_mode():
        for window in windows(job["test"], job, job["test_windows"]):
            ids = torch.tensor([window])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def peak_bytes() -> int:
    """Peak of this process's resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


class Measure:
    """Seconds and bytes of the work between ``start`` and ``stop``, above what imports take."""

    def __init__(self) -> None:
        self.imports = peak_bytes()
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def stop(self, perplexity: Callable[[], float]) -> Job:
        return {
            "seconds": time.perf_counter() - self.wall,
            "processor_seconds": time.process_time() - self.processor,
            "bytes": peak_bytes() - self.imports,
            "perplexity": perplexity(),
        }


def run_mcsharp_sdk(job: Job) -> Job:
    import transformers

    import mcsharp_sdk
    from mcsharp_sdk.engine import run  # noqa: F401  brings all that compressing imports

    stage = {
        "type": "GPTQQuantize",
        "bits": str(Path(job["folder"]) / "widths.json"),
        "other_bits": job["bits"],
        "group_size": job["group_size"],
    }
    Path(stage["bits"]).write_text(json.dumps(uniform_widths(job)))
    calibration = {
        "source": "text",
        "path": job["calibration"],
        "sequences": job["sequences"],
        "length": job["length"],
        "sampling": "first",
    }
    recipe = mcsharp_sdk.Recipe.from_dict(
        {
            "version": 1,
            "quality": job["quality"],
            "calibration": calibration,
            "stages": [stage],
        }
    )
    measure = Measure()
    output = Path(job["folder"]) / "compressed"
    mcsharp_sdk.compress(recipe, Path(job["model"]), output, progress=False)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return measure.stop(lambda: perplexity(load(output), job))


def uniform_widths(job: Job) -> Job:
    from mcsharp_sdk.models.source import SourceModel

    counts = SourceModel(Path(job["model"])).topology.experts_per_layer()
    bits = {str(layer): [job["bits"]] * count for layer, count in counts.items()}
    return {"version": 1, "bits": bits}


def run_llmcompressor(job: Job) -> Job:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM

    weights = {
        "num_bits": job["bits"],
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": job["group_size"],
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    tokens = calibration_tokens(job)
    measure = Measure()
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    oneshot(
        model=model,
        dataset=Dataset.from_dict(
            {"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]}
        ),
        recipe=GPTQModifier(config_groups=groups, ignore=KEPT),
        max_seq_length=job["length"],
        num_calibration_samples=len(tokens),
    )
    return measure.stop(lambda: perplexity(model, job))


def run_gptqmodel(job: Job) -> Job:
    from gptqmodel import GPTQModel, QuantizeConfig

    tokens = calibration_tokens(job)
    measure = Measure()
    config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=False)
    model: Any = GPTQModel.load(job["model"], config)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens])
    output = str(Path(job["folder"]) / "gptqmodel")
    model.save(output)
    return measure.stop(lambda: perplexity(GPTQModel.load(output, device="cpu").model, job))


def run_autoround(job: Job) -> Job:
    """AutoRound's result as it is in memory, not written.

    Its names of Mixtral's experts are not those of the checkpoint: what it writes is loaded with
    random experts, and of a folder, which by default it reads block by block, it finds none.
    """
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    batch = 8
    tokens = torch.tensor(calibration_tokens(job))
    measure = Measure()
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    method: Any = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["model"]),
        scheme=f"W{job['bits']}A16",
        group_size=job["group_size"],
        sym=False,
        dataset=list(tokens.split(batch)),
        batch_size=batch,
        nsamples=len(tokens),
        seqlen=job["length"],
        iters=job["autoround_iters"],
        lr=job["autoround_lr"],
        device_map="cpu",
    )
    quantised, _ = method.quantize()
    return measure.stop(lambda: perplexity(quantised, job))


def run_original(job: Job) -> Job:
    """Only the perplexity of the model as it is."""
    from transformers import AutoModelForCausalLM

    measure = Measure()
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    return measure.stop(lambda: perplexity(model, job))


RUNNERS: dict[str, Callable[[Job], Job]] = {
    ORIGINAL: run_original,
    OURS: run_mcsharp_sdk,
    "llmcompressor": run_llmcompressor,
    "gptqmodel": run_gptqmodel,
    "autoround": run_autoround,
}


if __name__ == "__main__":
    print(json.dumps(RUNNERS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))))
