"""How much time do dropped experts save, and what does finding the important tokens cost?

One MoE layer with packed experts runs unpruned and pruned in turns in one process, at decode (one
token a call) and at prefill; "ratio" is pruned over unpruned time, medians over the rounds. Then
attention with sums of received attention against SDPA alone. Ratios hold on a busy machine, the
milliseconds do not.

    python benchmarks/pruned_speed.py [--experts 8 --top-k 2 --hidden 1024 --intermediate 3584]
    python benchmarks/pruned_speed.py --experts 32 --top-k 6 --hidden 1024 --intermediate 512
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from mcsharp_sdk.pruning import KEEP_ALL_BIAS, slot_thresholds
from mcsharp_sdk.runtime.layout import PackedLayout
from mcsharp_sdk.runtime.packed_model import pack_modules
from mcsharp_sdk.runtime.pruned_routing import ExpertPruner, set_expert_pruning
from mcsharp_sdk.runtime.pruning_layout import LearnedPruning, PruningLayout, RulePruning
from mcsharp_sdk.runtime.received_attention import NAME, AttentionTap, TokenBatch, attach_tap

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
ATTENTION_LENGTHS = (512, 2048)
ATTENTION_HEADS, HEAD_SIZE = 16, 64


def packed_layer(options: argparse.Namespace) -> tuple[Any, Any]:
    """A model of one layer with random packed experts, and that layer's MoE block."""
    config = AutoConfig.for_model(
        "olmoe",
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=128,
        eos_token_id=0,
        pad_token_id=0,
    )
    zeros = (0.0,) * (options.top_k - 1)
    pruning = PruningLayout(
        "off", RulePruning("none", 0.0, 0.0, {0: zeros}), LearnedPruning(options.units, (0,))
    )
    bits = {0: (options.bits,) * options.experts}
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=options.dtype).eval()
        pack_modules(model, PackedLayout(options.group_size, bits, {}, pruning))
    block = model.model.layers[0].mlp.to_empty(device=options.device)
    for parameter in block.parameters():
        if parameter.dtype == torch.uint8:
            parameter.random_(0, 256)
        else:
            parameter.normal_(std=0.02)
    decision = block.experts.pruner.second
    nn.init.zeros_(decision.weight)
    nn.init.zeros_(decision.bias)[-1] = KEEP_ALL_BIAS
    return model, block


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of one call."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each call in each round; a first round to warm up does not count."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            found = seconds(call, device)
            if number:
                spent[name].append(found)
    return spent


def ratio(spent: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(spent, base, strict=True))


def compare_layer(options: argparse.Namespace) -> None:
    model, block = packed_layer(options)
    tokens = torch.randn(
        1, options.tokens, options.hidden, dtype=options.dtype, device=options.device
    )
    _, weights, _ = block.gate(tokens[0])
    pruner: ExpertPruner = block.experts.pruner
    settings = {
        f"rule, quantile {q:.2f}": ("rule", tuple(slot_thresholds(weights, q))) for q in QUANTILES
    }
    # The largest ratio itself is kept: above it, only the first expert is.
    settings[f"rule, quantile {QUANTILES[-1]:.2f}"] = ("rule", (1.0,) * (options.top_k - 1))
    settings["network, keeps all"] = ("learned", ())

    def kept(name: str, part: Tensor) -> float:
        mode, pruner.thresholds = settings.get(name, ("off", ()))
        if mode == "off":
            return 1.0
        set_expert_pruning(model, mode)
        _, weights, index = block.gate(part)
        index, _ = pruner(part, index, weights)
        return (index < options.experts).float().mean().item()

    def run(name: str, calls: Sequence[Tensor]) -> None:
        mode, pruner.thresholds = settings.get(name, ("off", ()))
        set_expert_pruning(model, mode)
        for part in calls:
            block(part)

    few = tokens[:, : options.decode_tokens]
    for phase, calls in (("decode", few.split(1, dim=1)), ("prefill", [tokens])):
        names = ["unpruned", *settings]
        timed = in_turns(
            {name: lambda n=name, c=calls: run(n, c) for name in names},  # type: ignore[misc]
            options.rounds,
            options.device,
        )
        part = torch.cat(list(calls), dim=1)[0]
        print(f"\n{phase}, {calls[0].shape[1]} tokens a call")
        print(f"{'':24} {'kept':>6} {'ms/token':>9} {'ratio':>6}")
        for name, spent in timed.items():
            per_token = 1000 * statistics.median(spent) / len(part)
            against = ratio(spent, timed["unpruned"])
            print(f"{name:24} {kept(name, part):6.2f} {per_token:9.3f} {against:6.2f}")


def compare_attention(options: argparse.Namespace) -> None:
    print(f"\nreceived attention, {ATTENTION_HEADS} heads of {HEAD_SIZE}")
    print(f"{'tokens':>6} {'sdpa ms':>8} {'with sums ms':>13} {'extra/sdpa':>11}")
    module = nn.Module()
    for name, value in {"layer_idx": 0, "is_causal": True, "num_key_value_groups": 1}.items():
        setattr(module, name, value)
    attach_tap(module, AttentionTap(TokenBatch(), wanted=True))
    plain = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    sdpa, with_sums = (AttentionInterface()[name] for name in ("sdpa", NAME))
    for length in ATTENTION_LENGTHS:
        shape = (1, ATTENTION_HEADS, length, HEAD_SIZE)
        q, k, v = (torch.randn(shape, dtype=options.dtype, device=options.device) for _ in range(3))
        timed = in_turns(
            {
                "sdpa": lambda q=q, k=k, v=v: sdpa(plain, q, k, v, None),  # type: ignore[misc]
                "sums": lambda q=q, k=k, v=v: with_sums(module, q, k, v, None),  # type: ignore[misc]
            },
            options.rounds,
            options.device,
        )
        plain_ms, sums_ms = (1000 * statistics.median(found) for found in timed.values())
        extra = ratio(timed["sums"], timed["sdpa"]) - 1
        print(f"{length:6} {plain_ms:8.2f} {sums_ms:13.2f} {extra:11.2f}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3584)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--units", type=int, default=32, help="width of the network")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--decode-tokens", type=int, default=16, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(
        f"{options.experts} experts of {options.hidden} x {options.intermediate}, "
        f"{options.top_k} per token, {options.bits} bits, {options.dtype}, {options.device}, "
        f"{options.threads} threads"
    )
    compare_layer(options)
    compare_attention(options)


if __name__ == "__main__":
    main()
