"""How long does loading a compressed model with many experts take, against reading its bytes?

Makes a compressed model of random codes on disk (by default 48 layers of 128 small experts, whose
widths are mixed), then in turns reads the bytes of its weight files and loads it, each time in a
new process. The files are in the page cache. Printed are medians over the rounds, and the resident
memory that the model takes against its size on disk: loaded, and behind a prompt of 512 tokens and
8 generated ones, by when its experts have been used. Imports count in neither.

    python benchmarks/loading.py [--layers 48 --experts 128 --hidden 512 --intermediate 128]
    python benchmarks/loading.py --model DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WIDTHS = (1, 2, 3)
PROMPT = 512


def make(folder: Path, options: argparse.Namespace) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mcsharp_sdk.models.topology import read_topology
    from mcsharp_sdk.runtime.compressed_model import make_savable
    from mcsharp_sdk.runtime.hf_quantizer import McSharpConfig
    from mcsharp_sdk.runtime.layout import PackedLayout
    from mcsharp_sdk.runtime.packed_model import pack_modules

    config: Any = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=options.hidden,
        moe_intermediate_size=options.intermediate,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=options.experts,
        num_experts_per_tok=8,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        vocab_size=4096,
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        bits = tuple(WIDTHS[e % len(WIDTHS)] for e in range(options.experts))
        linears = dict.fromkeys(read_topology(model, config).linears[0], 4)
        layout = PackedLayout(64, dict.fromkeys(range(options.layers), bits), linears)
        pack_modules(model, layout)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        if parameter.dtype == torch.uint8:
            parameter.data.random_(0, 256)
        else:
            parameter.data.normal_(std=0.02)
    model._weight_conversions = []
    make_savable(model)
    model.config.quantization_config = McSharpConfig(**layout.to_dict())
    model.save_pretrained(folder)


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024


def load(folder: Path) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.mixtral import modeling_mixtral  # noqa: F401
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401

    import mcsharp_sdk.runtime.hf_quantizer
    from mcsharp_sdk.kernels.support import missing_support

    if not missing_support():
        import mcsharp_sdk.kernels.integer_products  # noqa: F401
    torch.zeros(1)
    before, start = resident_bytes(), time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    seconds = time.perf_counter() - start
    loaded = resident_bytes() - before
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT))
    model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return {"seconds": seconds, "loaded": loaded, "used": resident_bytes() - before}


def profile(folder: Path) -> None:
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.enable()
    load(folder)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def read_seconds(folder: Path) -> float:
    start = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        file.read_bytes()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a compressed model, in place of a made one")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.load)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch) / "model"
        if not options.model:
            make(folder, options)
        if options.profile:
            profile(folder)
        reading, loading = [], []
        for _ in range(options.rounds):
            reading.append(read_seconds(folder))
            command = [sys.executable, __file__, "--load", str(folder)]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            loading.append(json.loads(run.stdout.splitlines()[-1]))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    read = statistics.median(reading)
    loaded = statistics.median(found["seconds"] for found in loading)
    what = options.model or f"{options.layers} layers of {options.experts} experts"
    print(f"{what}, {size / 1e6:.0f} MB on disk")
    print(f"reading the bytes  {read:8.2f} s")
    print(f"loading            {loaded:8.2f} s   (2 x reading + 2 s = {2 * read + 2:.2f} s)")
    for name, when in (("loaded", "memory, loaded"), ("used", "memory, used")):
        held = statistics.median(found[name] for found in loading)
        print(f"{when:17}  {held / 1e6:8.0f} MB   {held / size:.2f} x the size on disk")


if __name__ == "__main__":
    main()
