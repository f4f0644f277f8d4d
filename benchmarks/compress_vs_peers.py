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
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import peer_runs
from peak_memory import make_model, save_tokenizer
from peer_runs import ORIGINAL, OURS, RUNNERS, Job

GENERATED = "generated"
PACKAGES = {
    "llmcompressor": "llmcompressor==0.14.0.1",
    "gptqmodel": "gptqmodel==7.7.0",
    "autoround": "auto-round==0.16.1",
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
        command = [interpreter(package, work), peer_runs.__file__, package, str(order)]
        run = subprocess.run(
            command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True
        )
    except subprocess.CalledProcessError as error:
        return {"error": f"{package} failed: {error}"}
    found: Job = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
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
