"""What the GPU benchmarks compare with: dense bf16 and other packages' 4-bit products.

The 4-bit peers are torch's own product and, where GPTQModel is installed, its linear layer with the
kernel that it chooses for the device. Both have random weights of group size 128.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import torch
from gpu_timing import GROUP, Shape
from torch import Tensor

BITS = 4
WORD = 32
"""Bits of the words that GPTQ files pack codes into."""

TESTED = "gptqmodel==7.7.0"

LARGEST_ERROR = 0.01
"""Of a peer's output, as a part of its size: twice what bf16 rounds, far below a wrong layout's."""

Product = Callable[[Tensor], Tensor]
"""x [T, K] -> x · Wᵀ [T, R]."""


@dataclass(frozen=True)
class Products:
    """The products with the matrices of each expert of a layer, by the expert's number."""

    gate_up: Sequence[Product] | torch.nn.ModuleList
    down: Sequence[Product] | torch.nn.ModuleList

    def expert(self, number: int, x: Tensor) -> Tensor:
        """x [T, H] -> the expert's output [T, H]."""
        gate, up = self.gate_up[number](x).chunk(2, -1)
        return self.down[number](torch.nn.functional.silu(gate) * up)


def dense_products(weights: tuple[Tensor, Tensor]) -> Products:
    """Those of experts in bf16, by their matrices as of ``gpu_timing.dense_weights``."""
    gate_up, down = (
        [partial(torch.nn.functional.linear, weight=matrix) for matrix in weight]
        for weight in weights
    )
    return Products(gate_up, down)


def four_bit_peers(shape: Shape) -> dict[str, Products]:
    """Row's name -> products on the GPU."""
    return {"torch int4": torch_products(shape), **gptqmodel_peer(shape)}


def gptqmodel_peer(shape: Shape, device: str = "cuda:0") -> dict[str, Products]:
    """The row of GPTQModel, or none; says in a line which kernel it chose or why there is none."""
    if find_spec("gptqmodel") is None:
        print(f"GPTQModel is not installed (pip install {TESTED}): torch int4 is the only peer")
        return {}
    try:
        products = gptqmodel_products(shape, device)
    except (ImportError, OSError, RuntimeError, ValueError) as problem:
        print(f"GPTQModel cannot run here, torch int4 is the only peer: {problem}")
        return {}
    kernel = type(products.gate_up[0]).__name__
    print(f"GPTQModel {version('gptqmodel')} chose its kernel {kernel}")
    return {f"GPTQModel {kernel}": products}


class TorchInt4:
    """torch's own 4-bit product (``_weight_int4pack_mm``) for one expert's matrix."""

    def __init__(self, rows: int, columns: int) -> None:
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
        self.codes = torch._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(columns // GROUP, rows, 2, device="cuda") * 0.01
        self.scales = scales.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] bf16 -> [T, R]."""
        return torch._weight_int4pack_mm(x, self.codes, GROUP, self.scales)


def torch_products(shape: Shape) -> Products:
    """Those of torch."""
    gate_up, down = (
        [TorchInt4(rows, columns) for _ in range(shape.experts)]
        for rows, columns in shape.matrices.values()
    )
    return Products(gate_up, down)


def gptqmodel_products(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> Products:
    """Those of GPTQModel, tried once for each matrix.

    Raises
    ------
    RuntimeError
        If a kernel's output is not the product with the weights that it was given.
    """
    found = []
    for rows, columns in shape.matrices.values():
        checkpoints = [gptq_checkpoint(rows, columns) for _ in range(shape.experts)]
        layers = gptqmodel_layers(checkpoints, device, dtype)
        error = relative_error(layers[0], checkpoints[0], device, dtype)
        if not error <= LARGEST_ERROR:
            raise RuntimeError(f"{type(layers[0]).__name__} is wrong by {error:.1%} of its output")
        found.append(layers)
    return Products(*found)


def gptq_checkpoint(rows: int, columns: int) -> dict[str, Tensor]:
    """A matrix [R, K] as GPTQ files hold it, symmetric, with random codes.

    ``qweight`` int32 [K/8, R], ``qzeros`` int32 [K/128, R/8], ``scales`` fp16 [K/128, R] and the
    group of each column, ``g_idx`` int32 [K].
    """
    groups = columns // GROUP
    words = torch.randint(-(2**31), 2**31, (columns * BITS // WORD, rows), dtype=torch.int32)
    # Files hold zero points less one: these are 8, the middle of the codes.
    zeros = torch.full((groups, rows * BITS // WORD), 0x77777777, dtype=torch.int32)
    scales = (torch.rand(groups, rows) + 0.5) * 2.0**-BITS / columns**0.5
    group = torch.arange(columns, dtype=torch.int32) // GROUP
    return {"qweight": words, "qzeros": zeros, "scales": scales.half(), "g_idx": group}


def gptq_weights(checkpoint: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The matrix [R, K] that :func:`gptq_checkpoint` stands for, fp32; scales are rounded first."""
    shifts = torch.arange(0, WORD, BITS)
    words, zeros = checkpoint["qweight"], checkpoint["qzeros"]
    codes = (words.unsqueeze(1) >> shifts.view(-1, 1) & 2**BITS - 1).flatten(0, 1)
    middle = (zeros.unsqueeze(-1) >> shifts & 2**BITS - 1).flatten(1) + 1
    group = checkpoint["g_idx"].long()
    return ((codes - middle[group]) * checkpoint["scales"].to(dtype).float()[group]).T


def gptqmodel_layers(
    checkpoints: Sequence[Mapping[str, Tensor]], device: str, dtype: torch.dtype
) -> torch.nn.ModuleList:
    """GPTQModel's linear layers, loaded and made ready as transformers does it.

    Some kernels share scratch that belongs to the list, which must live as long as its layers.
    """
    from gptqmodel.utils.importer import hf_select_quant_linear_v2
    from gptqmodel.utils.model import hf_convert_gptq_v1_to_v2_format, hf_gptqmodel_post_init

    settings = {"bits": BITS, "group_size": GROUP, "desc_act": False, "sym": True}
    kernel = hf_select_quant_linear_v2(
        **settings,
        format="gptq",
        quant_method="gptq",
        dtype=dtype,
        pack=False,
        device_map={"": device},
        backend="auto",
    )
    layers = torch.nn.ModuleList()
    for checkpoint in checkpoints:
        size = {
            "in_features": len(checkpoint["g_idx"]),
            "out_features": checkpoint["scales"].shape[1],
        }
        layer = kernel(**settings, **size, bias=False, pack_dtype=torch.int32, dtype=dtype)
        # Kernels have buffers of their own, filled below, but none may lack what files hold.
        unknown = layer.load_state_dict(checkpoint, strict=False).unexpected_keys
        if unknown:
            raise RuntimeError(f"{kernel.__name__} does not take {', '.join(unknown)}")
        layers.append(layer.to(device, dtype))
    hf_convert_gptq_v1_to_v2_format(layers, BITS, kernel, "gptq", None)
    hf_gptqmodel_post_init(layers, use_act_order=False)
    return layers.eval()


@torch.inference_mode()
def relative_error(
    product: Product, checkpoint: Mapping[str, Tensor], device: str, dtype: torch.dtype
) -> float:
    """Of a product, against the same in fp32: the norm of the difference over that of the truth."""
    weights = gptq_weights(checkpoint, dtype).to(device)
    x = torch.randn(2, weights.shape[1], device=device).to(dtype)
    truth = x.float() @ weights.T
    return float((product(x).float() - truth).norm() / truth.norm())
