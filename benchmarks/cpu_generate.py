"""How many tokens per second does a compressed model generate on a CPU, against the dense one?

Makes a model of Mixtral's architecture of random weights in memory, in bf16 and packed with random
codes, and lets both generate in turns, one sequence, greedily. "pruned" drops the second expert of
every other token by a threshold in the middle of the routing weights' ratios, "rotated" turns the
inputs of all experts. Ratios are medians over the rounds; they hold on a busy machine, tokens per
second do not.

    python benchmarks/cpu_generate.py [--layers 8 --hidden 2048 --intermediate 7168 --bits 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from mcsharp_sdk.models.topology import read_topology
from mcsharp_sdk.runtime.layout import PackedLayout
from mcsharp_sdk.runtime.modules import ExpertBucket
from mcsharp_sdk.runtime.packed_model import pack_modules
from mcsharp_sdk.runtime.pruned_routing import ExpertPruner, set_expert_pruning
from mcsharp_sdk.runtime.pruning_layout import PruningLayout, RulePruning

EXPERTS, TOP_K = 8, 2
LINEAR_BITS = 4
"""Width of attention in the packed model."""


def configuration(options: argparse.Namespace) -> MixtralConfig:
    return MixtralConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=max(1, options.hidden // 512),
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        vocab_size=4096,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=None,
    )


def fill(model: nn.Module) -> None:
    """Random weights of a size that keeps activations finite; random codes."""
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.uint8:
            parameter.random_(0, 256)
        elif name.endswith("scales"):
            parameter.uniform_(0.005, 0.02)
        elif "norm" in name:
            parameter.fill_(1)
        else:
            parameter.normal_(std=0.02)


def dense_model(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = MixtralForCausalLM(configuration(options))
        model.to(torch.bfloat16)
    return materialised(model)


def packed_model(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = MixtralForCausalLM(configuration(options))
        model.to(torch.bfloat16)
        layers = range(options.layers)
        topology = read_topology(model, model.config)
        bits = dict.fromkeys(layers, (options.bits,) * EXPERTS)
        linears = dict.fromkeys(topology.linears[0], LINEAR_BITS)
        rule = RulePruning("none", 0.0, 0.0, dict.fromkeys(layers, (0.5,)))
        layout = PackedLayout(options.group_size, bits, linears, PruningLayout("off", rule, None))
        pack_modules(model, layout)
    return materialised(model)


def materialised(model: Any) -> Any:
    """The model with memory behind it, and with random weights."""
    rotary = type(model.model.rotary_emb)(model.config)
    model.to_empty(device="cpu")
    model.model.rotary_emb = rotary
    fill(model)
    return model.eval()


def median_ratio_thresholds(model: Any, tokens: Tensor) -> None:
    """Let each layer drop the second expert where its weight is below the median."""
    ratios: dict[int, Tensor] = {}
    handles = []
    for module in model.modules():
        pruner = getattr(module, "pruner", None)
        if isinstance(pruner, ExpertPruner):

            def note(experts: Any, args: Any, kwargs: Any, layer: int = pruner.layer) -> None:
                weights: Tensor = args[2] if len(args) > 2 else kwargs["top_k_weights"]
                top = weights.sort(-1, descending=True).values
                ratios[layer] = top[:, 1] / top[:, 0]

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    for module in model.modules():
        if isinstance(module, ExpertPruner):
            module.thresholds = (float(ratios[module.layer].median()),)


def turn_inputs(model: Any, *, on: bool) -> None:
    """Have the experts' inputs turned, or not."""
    for module in model.modules():
        if isinstance(module, ExpertBucket):
            module.rotated_of = EXPERTS if on else 0


def seconds_per_token(model: Any, prompt: Tensor, tokens: int) -> float:
    start = time.perf_counter()
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False
    )
    assert out.shape[1] == prompt.shape[1] + tokens
    return (time.perf_counter() - start) / tokens


def resident_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=7168)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = {"dense bf16": dense_model(options), "packed": packed_model(options)}
    prompt = torch.randint(1, 4096, (1, options.prompt))
    models |= dict.fromkeys(["packed, pruned", "packed, rotated"], models["packed"])
    median_ratio_thresholds(models["packed"], torch.randint(1, 4096, (1, 256)))
    spent: dict[str, list[float]] = {name: [] for name in models}
    for number in range(options.rounds + 1):
        for name, model in models.items():
            if model is models["packed"]:
                set_expert_pruning(model, "rule" if name.endswith("pruned") else "off")
                turn_inputs(model, on=name.endswith("rotated"))
            found = seconds_per_token(model, prompt, options.tokens)
            if number:
                spent[name].append(found)
    print(
        f"{options.layers} layers of {EXPERTS} experts, {options.hidden} x {options.intermediate}, "
        f"{options.bits} bits, {options.threads} threads"
    )
    print(f"{'':16}{'tokens/s':>9}{'against dense':>14}{'weights MB':>11}")
    for name, model in models.items():
        pairs = zip(spent[name], spent["dense bf16"], strict=True)
        ratio = statistics.median(base / own for own, base in pairs)
        rate = 1 / statistics.median(spent[name])
        print(f"{name:16}{rate:9.2f}{ratio:13.2f}x{resident_bytes(model) / 1e6:11.0f}")


if __name__ == "__main__":
    main()
