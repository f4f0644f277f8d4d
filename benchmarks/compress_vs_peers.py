"""How do time, memory and perplexity of 4-, 3- and 2-bit GPTQ compare with other packages'?

Each package quantises the same model with the same calibration tokens, widths and group size, in a
process of its own, one after the other. Peers are installed from PyPI, each into a virtual
environment that this script makes in ``--work``; they see the packages of this environment, so that
torch is not downloaded again, unless they need another version. The model as it is comes first, for
its perplexity. Printed are, of quantising with loading and writing (llm-compressor's
and AutoRound's models stay in memory), seconds on the wall and of the process on all processors
(which other programs disturb less), the peak of resident memory above that of the interpreter with
its imports, and the perplexity of the result.

    python benchmarks/compress_vs_peers.py MODEL CALIBRATION.txt TEST.txt [--bits 4 3 2]

For MODEL, ``generated`` stands for a Mixtral-architecture model of 3 GB with random weights, made
in ``--work``: memory shows there, perplexity means nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peak_memory import make_model, save_tokenizer

GENERATED = "generated"
PACKAGES = {
    "llmcompressor": "llmcompressor==0.14.0.1",
    "gptqmodel": "gptqmodel==7.7.0",
    "autoround": "auto-round==0.16.1",
}
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


def generated_model(work: Path) -> Path:
    """12 layers of 8 experts of random weights, made if they are not there."""
    folder = work / GENERATED
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        make_model(folder, layers=12, hidden=2048, intermediate=2560, experts=8)
        save_tokenizer(folder)
    return folder


def interpreter(package: str, work: Path) -> str:
    """Python of the package's environment, made and filled if it is not there."""
    if package in (OURS, ORIGINAL):
        return sys.executable
    folder = work / "environments" / package
    python = folder / "bin" / "python"
    ready = folder / "installed"
    if not ready.is_file():
        venv.create(folder, with_pip=True, clear=True)
        site = next(folder.glob("lib/python*/site-packages"))
        own = {sysconfig.get_paths()["purelib"], *(p for p in sys.path if p.endswith("-packages"))}
        (site / "zz_of_the_caller.pth").write_text("\n".join(sorted(own)) + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", PACKAGES[package]], check=True)
        ready.touch()
    return str(python)


def measured(package: str, job: Job, work: Path) -> Job:
    """What one package does, measured in a process of its own; ``error`` if it fails."""
    folder = work / f"{package}-{job['bits']}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    order = folder / "job.json"
    order.write_text(json.dumps({**job, "folder": str(folder)}))
    threads = str(job["threads"])
    settings = {"GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": threads}
    try:
        command = [interpreter(package, work), __file__, "--run", package, str(order)]
        run = subprocess.run(
            command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True
        )
    except subprocess.CalledProcessError as error:
        return {"error": f"{package} failed: {error}"}
    found: Job = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps(RUNNERS[sys.argv[2]](json.loads(Path(sys.argv[3]).read_text()))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help=f"folder, or: {GENERATED}")
    parser.add_argument("calibration", type=Path, help="text to calibrate on")
    parser.add_argument("test", type=Path, help="text to predict")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--test-windows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    qualities = ["fast", "balanced", "best"]
    parser.add_argument("--quality", default="balanced", choices=qualities, help="of our recipe")
    parser.add_argument("--autoround-iters", type=int, default=200, help="steps per block")
    parser.add_argument("--autoround-lr", type=float, help="default: 1 / steps, as AutoRound's")
    parser.add_argument("--packages", nargs="+", default=list(RUNNERS), choices=RUNNERS)
    parser.add_argument("--work", type=Path, default=Path("peers"), help="folder for everything")
    options = parser.parse_args()
    if str(options.model) == GENERATED:
        options.model = generated_model(options.work)
    given = vars(options)
    names = ["group_size", "sequences", "length", "test_windows", "threads"]
    names += ["quality", "autoround_iters", "autoround_lr"]
    job: Job = {name: given[name] for name in names}
    job |= {name: str(given[name].resolve()) for name in ("model", "calibration", "test")}
    print(f"{'':20}{'bits':>5}{'wall s':>9}{'CPU s':>9}{'MB':>7}{'perplexity':>11}")
    for bits in options.bits:
        for package in options.packages:
            if package == ORIGINAL and bits != options.bits[0]:
                continue
            found = measured(package, {**job, "bits": bits}, options.work.resolve())
            print(f"{package:20}{bits:5}{line(found)}", flush=True)


def line(found: Job) -> str:
    if "error" in found:
        return f"  {found['error']}"
    return (
        f"{found['seconds']:9.1f}{found['processor_seconds']:9.1f}"
        f"{found['bytes'] / 1e6:7.0f}{found['perplexity']:11.3f}"
    )


if __name__ == "__main__":
    main()
