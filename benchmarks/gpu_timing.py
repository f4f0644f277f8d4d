"""What the GPU benchmarks share: is there a GPU, how long does something take, what could it do."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from mcsharp_sdk.kernels.expert_layer import ExpertLayer, MatrixStack, expert_table
from mcsharp_sdk.quantization.grid import PackedWeight, dequantise_packed, group_count
from mcsharp_sdk.quantization.packing import packed_bytes

GROUP = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's experts.

    Attributes
    ----------
    hidden, inner : hidden size and intermediate size of an expert.
    experts, slots : routed experts of a layer, and how many of them a token chooses.
    layers : how many layers have routed experts.
    """

    hidden: int
    inner: int
    experts: int
    slots: int
    layers: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name -> rows and columns of the matrices of an expert."""
        return {"gate_up": (2 * self.inner, self.hidden), "down": (self.hidden, self.inner)}


SHAPES = {
    "mixtral-8x7b": Shape(4096, 14336, experts=8, slots=2, layers=32),
    "deepseek-v2-lite": Shape(2048, 1408, experts=64, slots=6, layers=26),
}

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
    # The outer context: a recording that fails leaves its own stream as the current one.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        run()
    return graph.replay


def graphed_if_possible(
    name: str,
    run: Callable[[], object],
    record: Callable[[Callable[[], object]], Callable[[], object]] = graphed,
) -> tuple[str, Callable[[], object]]:
    """A row's name and what to time: a CUDA graph, or ``run`` itself under a name that says so."""
    try:
        return name, record(run)
    except RuntimeError as problem:
        print(f"{name}: no CUDA graph can be recorded: {str(problem).partition(chr(10))[0]}")
        return f"{name}, no graph", run


def milliseconds(
    runs: Mapping[str, Callable[[], object]], rounds: int = ROUNDS
) -> dict[str, float]:
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


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """Products of fp32 are computed in this precision: "highest", or "high" for TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def matmul_flops_per_second(dtype: torch.dtype, precision: str = "highest") -> float:
    """Of a product of two 8192 x 8192 matrices."""
    size = 8192
    x = torch.randn(size, size, device="cuda").to(dtype)
    with fp32_products(precision):
        spent = milliseconds({"matmul": lambda: x @ x}, rounds=5)["matmul"]
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


def random_layer(shape: Shape, bits: list[int], device: str = "cuda") -> ExpertLayer:
    """A layer of a model's shape; the widths repeat over its experts."""
    widths = [bits[expert % len(bits)] for expert in range(shape.experts)]
    gate_up, down = (random_stack(widths, *size, device) for size in shape.matrices.values())
    return ExpertLayer(gate_up, down, expert_table(widths).to(device))


def expert_bytes(layer: ExpertLayer, experts: Iterable[int]) -> int:
    """Bytes of the packed weights of these experts; one that comes twice counts twice."""
    widths = layer.table[:-1, 0].tolist()
    total = 0
    for expert in experts:
        for stack in (layer.gate_up, layer.down):
            weight = stack.weights[widths[expert]]
            parts = (weight.qweight, weight.scales, weight.zeros)
            total += sum(part[0].nbytes for part in parts)
    return total


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
