"""ONNX nodes in the making, and the dtypes that graphs store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from mcsharp_exporters.graph_names import DtypeName

OPSET, IR_VERSION = 21, 10


@dataclass(frozen=True)
class Dtype:
    """A storage dtype by its names in torch and ONNX."""

    torch: torch.dtype
    onnx: int


DTYPES: Mapping[DtypeName, Dtype] = {
    "fp32": Dtype(torch.float32, TensorProto.FLOAT),
    "fp16": Dtype(torch.float16, TensorProto.FLOAT16),
    "bf16": Dtype(torch.bfloat16, TensorProto.BFLOAT16),
}


@dataclass
class GraphNodes:
    """Nodes and constants of one graph; every value gets a name of its own."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output; its name."""
        return self.add_many(operator, inputs, 1, **attributes)[0]

    def add_many(
        self, operator: str, inputs: Sequence[str], outputs: int, **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; their names."""
        names = [f"{operator}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    def add_named(
        self, operator: str, inputs: Sequence[str], named: Sequence[str], **attributes: Any
    ) -> str:
        """Add a node whose outputs behind the first are outputs of the graph; the first's name."""
        first = f"{operator}_{len(self.nodes)}_0"
        self.nodes.append(helper.make_node(operator, inputs, [first, *named], **attributes))
        return first

    def name_output(self, value: str, name: str) -> None:
        """Let the graph's output ``name`` be ``value``."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))

    def top_k(self, values: str, k: int, *, largest: bool = True) -> tuple[str, str]:
        """The first k values along the last axis, sorted, and where they stand.

        Of equal values the one that stands first comes first, so that with all values this is a
        stable sort.
        """
        inputs = [values, self.integers(k)]
        best, indices = self.add_many("TopK", inputs, 2, axis=-1, largest=int(largest))
        return best, indices

    def constant(self, array: np.ndarray) -> str:
        """Store an array; its name."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, *values: int) -> str:
        """Store int64 values (n,)."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """Store one float32."""
        return self.constant(np.array(value, np.float32))

    def float32(self, tensor: torch.Tensor) -> str:
        """Store a tensor as float32."""
        return self.constant(tensor.detach().to("cpu", torch.float32).numpy())
