"""Nodes of a whole model's graph: large tensors beside it, one precision, values by their use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from onnx import TensorProto

from mcsharp_exporters.external_data import ExternalData
from mcsharp_exporters.graph_names import AccuracyLevel, Precision
from mcsharp_exporters.graph_nodes import DTYPES, Dtype, GraphNodes
from mcsharp_sdk.errors import InputError

CONTRIB = "com.microsoft"
"""Domain of onnxruntime's own operators."""

INLINE_BYTES = 256
"""Constants up to this size lie in the graph itself, once each."""


@dataclass
class MatrixTally:
    """The matrices of a model's decoder layers that were stored, by what is kept of them.

    Attributes
    ----------
    weights : packed weights, those of removed experts with them.
    bits : sum of their widths.
    bytes : stored for them: codes, scales and zero points.
    plain_weights, plain_bytes : the same of matrices that are not packed.
    """

    weights: int = 0
    bits: int = 0
    bytes: int = 0
    plain_weights: int = 0
    plain_bytes: int = 0

    def nominal_bits(self) -> float:
        """Mean width of the packed weights; of a model without any, of all."""
        if self.weights:
            return self.bits / self.weights
        return 8 * self.plain_bytes / max(1, self.plain_weights)

    def stored_bits(self) -> float:
        """8 · bytes of all that is kept for them, per weight."""
        if self.weights:
            return 8 * self.bytes / self.weights
        return self.nominal_bits()


class ModelNodes(GraphNodes):
    """Nodes and constants of one model.

    Parameters
    ----------
    data : where large tensors go.
    precision : of activations, scales, cache and logits.
    accuracy_level : of products with packed weights, as ``MatMulNBits`` takes it.
    """

    def __init__(
        self, data: ExternalData, precision: Precision, accuracy_level: AccuracyLevel
    ) -> None:
        super().__init__()
        self.dtype: Dtype = DTYPES[precision]
        self.accuracy_level = accuracy_level
        self.matrices = MatrixTally()
        self._data = data
        self._inline: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def constant(self, array: np.ndarray) -> str:
        """Store an array, beside the graph if it is large; its name."""
        if array.nbytes > INLINE_BYTES:
            return self.stored(torch.from_numpy(np.ascontiguousarray(array)))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._inline:
            self._inline[key] = super().constant(array)
        return self._inline[key]

    def constant_once(self, array: np.ndarray) -> str:
        """As ``constant``; the same array again, however large, is stored only once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._inline:
            self._inline[key] = self.constant(array)
        return self._inline[key]

    def stored(self, tensor: torch.Tensor) -> str:
        """Store a tensor beside the graph, in its own dtype; its name."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(self._data.store(name, tensor))
        return name

    @property
    def bytes(self) -> int:
        """Stored beside the graph so far."""
        return self._data.bytes

    def weight(self, tensor: torch.Tensor, what: str) -> str:
        """Store a floating tensor in its own dtype; its value in the model's precision.

        onnxruntime casts constants once, when it opens the model.

        Raises
        ------
        InputError
            If values do not fit into the precision; ``what`` names the tensor.
        """
        if not tensor.to(self.dtype.torch).isfinite().all():
            finite = tensor.isfinite().all()
            cause = "does not fit into fp16: export with precision: fp32" if finite else "is broken"
            raise InputError(f"{what} {cause}")
        return self.in_precision(self.stored(tensor), tensor.dtype)

    def in_precision(self, value: str, dtype: torch.dtype) -> str:
        """A value of ``dtype`` in the model's precision."""
        same = dtype == self.dtype.torch
        return value if same else self.add("Cast", value, to=self.dtype.onnx)

    def in_float32(self, value: str) -> str:
        """A value of the model's precision in float32."""
        same = self.dtype.onnx == TensorProto.FLOAT
        return value if same else self.add("Cast", value, to=TensorProto.FLOAT)

    def from_float32(self, value: str) -> str:
        """A float32 value in the model's precision."""
        return self.in_precision(value, torch.float32)

    def number(self, value: float) -> str:
        """One number in the model's precision."""
        kind = torch.tensor(value, dtype=self.dtype.torch).numpy()
        return self.constant(kind)

    def parts(self, value: str, *sizes: int) -> list[str]:
        """Cut the last axis into parts of these sizes."""
        return self.add_many("Split", [value, self.integers(*sizes)], len(sizes), axis=-1)

    def silu(self, value: str) -> str:
        """x · sigmoid(x)."""
        return self.add("Mul", value, self.add("Sigmoid", value))
