"""What the GPU benchmarks share: is there a GPU, how long does something take, what could it do."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from mcsharp_sdk.kernels.expert_layer import ExpertLayer, MatrixStack, expert_table
from mcsharp_sdk.quantization.grid import PackedWeight, dequantise_packed, group_count
from mcsharp_sdk.quantization.packing import packed_bytes

GROUP = 128
SHAPES = {"mixtral-8x7b": (4096, 14336, 8, 2), "deepseek-v2-lite": (2048, 1408, 64, 6)}
"""Name -> hidden size, intermediate size, experts, experts per token."""

ROUNDS = 15


def leave_without_gpu() -> None:
    """End with status 1 where the kernels cannot run."""
    if not torch.cuda.is_available() or find_spec("triton") is None:
        missing = "triton" if torch.cuda.is_available() else "a CUDA GPU"
        print(f"nothing was measured: this benchmark needs {missing}")
        sys.exit(1)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` recorded as a CUDA graph, after a warm-up that compiles what it needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(runs: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median time of each, taken in turns so that ratios hold while clocks change."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 2):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if round_ >= 2:
                spent[name].append(begin.elapsed_time(end))
    return {name: statistics.median(times) for name, times in spent.items()}


def copied_bytes_per_second() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    spent = milliseconds({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.numel() / spent * 1e3


def matmul_flops_per_second(dtype: torch.dtype, precision: str = "highest") -> float:
    """Of a product of two 8192 x 8192 matrices."""
    size = 8192
    x = torch.randn(size, size, device="cuda").to(dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    spent = milliseconds({"matmul": lambda: x @ x}, rounds=5)["matmul"]
    torch.set_float32_matmul_precision(before)
    return 2 * size**3 / spent * 1e3


def random_stack(bits: list[int], rows: int, columns: int, device: str = "cuda") -> MatrixStack:
    """One matrix of experts of these widths, random, with scales for outputs of moderate size."""
    groups = group_count(columns, GROUP)
    weights = {}
    for width in sorted(set(bits)):
        n = bits.count(width)

        def codes(*shape: int) -> Tensor:
            return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

        size = torch.rand(n, rows, groups, device=device) + 0.5
        weights[width] = PackedWeight(
            codes(n, rows, packed_bytes(columns, width)),
            (size * 2.0**-width / columns**0.5).half(),
            codes(n, groups, packed_bytes(rows, width)),
        )
    return MatrixStack(weights, GROUP, columns)


def random_layer(shape: str, bits: list[int], device: str = "cuda") -> ExpertLayer:
    """A layer of a model's shape; the widths repeat over its experts."""
    hidden, inner, experts, _ = SHAPES[shape]
    widths = [bits[expert % len(bits)] for expert in range(experts)]
    return ExpertLayer(
        random_stack(widths, 2 * inner, hidden, device),
        random_stack(widths, hidden, inner, device),
        expert_table(widths).to(device),
    )


def dense_weights(layer: ExpertLayer) -> tuple[Tensor, Tensor]:
    """The same experts in bf16: gate and up [E, 2I, H], down [E, H, I]."""
    found = []
    for stack in (layer.gate_up, layer.down):
        shape = (layer.experts, stack.rows, stack.columns)
        out = torch.empty(shape, dtype=torch.bfloat16, device=layer.table.device)
        for expert, (width, place) in enumerate(layer.table[:-1].tolist()):
            weight = stack.weights[width]
            out[expert] = dequantise_packed(
                weight.qweight[place],
                weight.scales[place],
                weight.zeros[place],
                bits=width,
                group_size=stack.group_size,
                columns=stack.columns,
                dtype=torch.bfloat16,
            )
        found.append(out)
    return found[0], found[1]


class FourBitPeer:
    """torch's own 4-bit product (``_weight_int4pack_mm``, group 128) for one expert's matrix."""

    def __init__(self, rows: int, columns: int) -> None:
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
        self.codes = torch._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(columns // GROUP, rows, 2, device="cuda") * 0.01
        self.scales = scales.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] bf16 -> [T, R]."""
        return torch._weight_int4pack_mm(x, self.codes, GROUP, self.scales)
