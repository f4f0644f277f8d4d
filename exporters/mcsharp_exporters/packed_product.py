"""Products with packed weights: ``MatMulNBits``, and what it cannot say as a term of its own.

A weight of the stored grid is s · (q − z), with z in quarters of a level; ``MatMulNBits`` takes
whole zero points only. So it is given codes round its default zero point, and the rest is exact:

    y_n = Σ_k s_ng (q_nk − c) x_k  +  Σ_g s_ng (c − z_ng) Σ_{k in g} x_k

c is the same for all weights of a width, so the second sum is a product of the groups' sums of x,
1/group_size of the work. Codes are stored at their own width (3 bits as 2 + 1) and brought to the
width of the kernel by look-up tables: nodes with constant inputs, which onnxruntime computes once,
when it opens the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from mcsharp_exporters.graph_names import AccuracyLevel
from mcsharp_exporters.model_nodes import CONTRIB, ModelNodes
from mcsharp_sdk.quantization.grid import ZERO_STEP, QuantizedWeight, group_count, top_code
from mcsharp_sdk.quantization.packing import PARTS

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Group sizes that ``MatMulNBits`` takes."""

TWO_BIT_BLOCKS = (32, 64, 128)
"""Those for which it has a fast kernel for two bits (onnxruntime 1.31, CPU)."""

DECODED_AT_ONCE = 2**26
"""Most weights that are decoded by the same nodes; onnxruntime holds a few bytes for each of them
while it opens the model."""


@dataclass(frozen=True)
class Container:
    """How codes of one width lie in the codes that the kernel reads: ``factor`` · q + ``offset``.

    Attributes
    ----------
    bits : width that the kernel reads.
    centre : the code q that the kernel's default zero point stands for.
    """

    bits: int
    factor: int
    offset: int

    @property
    def centre(self) -> float:
        return (2 ** (self.bits - 1) - self.offset) / self.factor


def container(bits: int, block: int, accuracy_level: AccuracyLevel) -> Container:
    """The narrowest width that onnxruntime multiplies fast.

    At accuracy level 0 only four bits are fast on a CPU: narrower codes are widened to them.
    """
    narrow = accuracy_level == 4 and bits <= 2 and block in TWO_BIT_BLOCKS
    width = 2 if narrow else max(bits, 4)
    if width == bits:
        return Container(width, 1, 0)
    return Container(width, 2, 2 ** (width - 1) - top_code(bits))


class Operand:
    """Rows to multiply, and the sums of their groups of columns, made when first asked for.

    Parameters
    ----------
    value : (tokens, columns) in the graph's precision.
    """

    def __init__(self, graph: ModelNodes, value: str, columns: int) -> None:
        self.value, self.columns = value, columns
        self._graph = graph
        self._sums: dict[int, str] = {}

    def sums(self, size: int) -> str:
        """(tokens, groups): sums over groups of ``size`` columns; the last may be short."""
        if size not in self._sums:
            graph, value = self._graph, self.value
            missing = -self.columns % size
            if missing:
                value = graph.add("Pad", value, graph.integers(0, 0, 0, missing))
            groups = group_count(self.columns, size)
            grouped = graph.add("Reshape", value, graph.integers(-1, groups, size))
            # Of no tokens, onnxruntime's ReduceSum leaves the dimension in whatever it is told.
            sums = graph.add("ReduceSum", grouped, graph.integers(-1))
            self._sums[size] = graph.add("Reshape", sums, graph.integers(-1, groups))
        return self._sums[size]


@dataclass(frozen=True)
class PackedProduct:
    """A packed matrix in the graph, ready to be multiplied with.

    Attributes
    ----------
    codes, scales : values for ``MatMulNBits``.
    correction : (groups, rows), what multiplies the groups' sums; None if that is 0.
    rows, columns, block : of the matrix.
    bits : that the kernel reads.
    """

    codes: str
    scales: str
    correction: str | None
    rows: int
    columns: int
    block: int
    bits: int

    def apply(self, graph: ModelNodes, value: str, sums: str | None) -> str:
        """(tokens, rows) of a value (tokens, columns) and the sums of its groups."""
        level = {"accuracy_level": graph.accuracy_level} if graph.accuracy_level else {}
        product = graph.add(
            "MatMulNBits",
            value,
            self.codes,
            self.scales,
            domain=CONTRIB,
            K=self.columns,
            N=self.rows,
            bits=self.bits,
            block_size=self.block,
            **level,
        )
        if self.correction is None or sums is None:
            return product
        return graph.add("Gemm", sums, self.correction, product)


def packed_products(graph: ModelNodes, weights: Sequence[QuantizedWeight]) -> list[PackedProduct]:
    """Store matrices (codes [R, K] each, all of one shape) and add the nodes that decode them.

    Those of one width are decoded together, as far as ``DECODED_AT_ONCE`` goes: a graph with fewer
    nodes is smaller and is opened faster.
    """
    products: dict[int, PackedProduct] = {}
    for width in sorted({weight.bits for weight in weights}):
        places = [place for place, weight in enumerate(weights) if weight.bits == width]
        most = max(1, DECODED_AT_ONCE // weights[places[0]].codes.numel())
        for start in range(0, len(places), most):
            some = places[start : start + most]
            products |= zip(some, _stored(graph, [weights[p] for p in some]), strict=True)
    return [products[place] for place in range(len(weights))]


def _stored(graph: ModelNodes, weights: Sequence[QuantizedWeight]) -> list[PackedProduct]:
    """Those of one width and shape."""
    whole = stack(weights)
    count, columns, block, bits = len(weights), whole.codes.shape[1], whole.group_size, whole.bits
    before = graph.bytes
    held = container(bits, block, graph.accuracy_level)
    padded = torch.nn.functional.pad(whole.codes, (0, -columns % block))
    blocks = padded.unflatten(1, (-1, block))
    if held.bits == bits:
        codes = [graph.stored(pack_in_order(part, bits)) for part in blocks.chunk(count)]
    else:
        codes = _split(graph, _decoded(graph, blocks, bits, held), count, axis=0)
    stored = graph.stored(whole.scales.contiguous())
    scales = graph.in_precision(stored, torch.float16)
    if held.factor != 1:
        scales = graph.add("Mul", scales, graph.number(1 / held.factor))
    correction = _correction(graph, whole, stored, held)
    corrections = _split(graph, correction, count, axis=1) if correction else [None] * count
    tally = graph.matrices
    tally.weights += whole.codes.numel()
    tally.bits += whole.codes.numel() * bits
    tally.bytes += graph.bytes - before
    rows = len(whole.codes) // count
    return [
        PackedProduct(*values, rows, columns, block, held.bits)
        for values in zip(codes, _split(graph, scales, count, axis=0), corrections, strict=True)
    ]


def _split(graph: ModelNodes, value: str, count: int, axis: int) -> list[str]:
    """``count`` equal parts."""
    if count == 1:
        return [value]
    return graph.add_many("Split", [value], count, axis=axis, num_outputs=count)


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Matrices of the same width and columns as one, rows below rows."""
    first = weights[0]
    if len(weights) == 1:
        return first
    return replace(
        first,
        codes=torch.cat([w.codes for w in weights]),
        scales=torch.cat([w.scales for w in weights]),
        zeros=torch.cat([w.zeros for w in weights]),
    )


def _correction(
    graph: ModelNodes, weight: QuantizedWeight, scales: str, held: Container
) -> str | None:
    """(groups, rows): scale · (centre − zero point) of every group."""
    shift = held.centre - top_code(weight.bits) / 2
    if not shift and not weight.zeros.any():
        return None
    rows = len(weight.scales)
    by_group = torch.nn.functional.pad(weight.zeros.t(), (0, -rows % 8))
    codes = _decoded(graph, by_group, weight.bits, Container(8, 1, 0))
    if rows % 8:
        codes = graph.add(
            "Slice", codes, graph.integers(0), graph.integers(rows), graph.integers(1)
        )
    zeros = graph.add("Cast", codes, to=TensorProto.FLOAT)
    distance = graph.add("Mul", zeros, graph.scalar(-ZERO_STEP))
    if shift:
        distance = graph.add("Add", distance, graph.scalar(shift))
    exact = graph.add("Cast", scales, to=TensorProto.FLOAT)
    turned = graph.add("Transpose", exact, perm=[1, 0])
    return graph.from_float32(graph.add("Mul", distance, turned))


def _decoded(graph: ModelNodes, codes: Tensor, bits: int, held: Container) -> str:
    """Codes [..., n] (n a multiple of 8), stored at ``bits``, as bytes of the container's codes."""
    if bits == held.bits:
        return graph.stored(pack_in_order(codes, bits))
    shape = [*codes.shape[:-1], codes.shape[-1] * held.bits // 8]
    low, joined = 0, ""
    for width in PARTS[bits]:
        part = pack_in_order((codes >> low) & (2**width - 1), width)
        table = _table(width, held, low, 0 if low else held.offset)
        chosen = graph.add("Cast", graph.stored(part), to=TensorProto.INT32)
        found = graph.add("Gather", graph.constant_once(table), chosen, axis=0)
        decoded = graph.add("Reshape", found, graph.integers(*shape))
        joined = graph.add("BitwiseOr", joined, decoded) if joined else decoded
        low += width
    return joined


def pack_in_order(codes: Tensor, width: int) -> Tensor:
    """Codes [..., n] of 1, 2, 4 or 8 bits as bytes [..., n · width / 8], the first code lowest."""
    fields = codes.unflatten(-1, (-1, 8 // width))
    packed = torch.zeros(fields.shape[:-1], dtype=torch.uint8)
    for place in range(8 // width):
        packed |= fields[..., place] << (place * width)
    return packed


def _table(width: int, held: Container, low: int, offset: int) -> np.ndarray:
    """Byte of codes of ``width`` bits -> the bytes that hold them in the container, [256, n]."""
    bytes_ = np.arange(256, dtype=np.uint32)[:, None]
    codes = (bytes_ >> (width * np.arange(8 // width))) & (2**width - 1)
    widened = held.factor * (codes << low) + offset
    fields = widened.reshape(256, -1, 8 // held.bits)
    return (fields << (held.bits * np.arange(8 // held.bits))).sum(-1).astype(np.uint8)
