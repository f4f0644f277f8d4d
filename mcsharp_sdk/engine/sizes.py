"""How large the parts of a model are, from its architecture and headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mcsharp_sdk.models.experts import MATRICES, fused_weight
from mcsharp_sdk.models.source import SourceModel


@dataclass(frozen=True)
class MatrixSize:
    """A matrix of weights, [rows, columns]: outputs by inputs.

    Attributes
    ----------
    part : of the layer that it is in, e.g. ``self_attn``.
    """

    rows: int
    columns: int
    part: str

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.rows * self.columns


@dataclass(frozen=True)
class LayerSizes:
    """One decoder layer.

    Attributes
    ----------
    bytes : in memory, in the dtype it is computed in.
    other_bytes : the same without the routed experts.
    by_expert : whether routed experts can be read from disk one by one.
    experts, top_k : 0 for a dense layer.
    expert : the matrices of one expert: of ``gate_up`` and ``down``; none in a dense layer.
    linears : those outside the experts.
    """

    bytes: int
    other_bytes: int
    by_expert: bool
    experts: int
    top_k: int
    expert: tuple[MatrixSize, ...]
    linears: tuple[MatrixSize, ...]

    @property
    def weights_of_expert(self) -> int:
        """Weights of one expert."""
        return sum(matrix.weights for matrix in self.expert)

    @property
    def expert_weights(self) -> int:
        """Weights of all routed experts."""
        return self.experts * self.weights_of_expert

    @property
    def linear_weights(self) -> int:
        """Weights of the other linears."""
        return sum(linear.weights for linear in self.linears)

    @property
    def active_weights(self) -> int:
        """Weights that one token is multiplied by."""
        share = self.top_k / self.experts if self.experts else 0
        return int(self.expert_weights * share) + self.linear_weights


@dataclass(frozen=True)
class ModelSizes:
    """A whole model.

    Attributes
    ----------
    bytes : of all its tensors.
    embedding_bytes : of the parts that are loaded to embed tokens.
    largest_tensor : bytes of the largest tensor outside of the decoder layers.
    left_out_bytes : of tensors for which the architecture has no place; they are in no result.
    """

    bytes: int
    embedding_bytes: int
    largest_tensor: int
    dtype: torch.dtype
    hidden_size: int
    layers: tuple[LayerSizes, ...]
    stored_bytes_per_weight: int
    left_out_bytes: int = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the tensors that the architecture has a place for."""
        return self.bytes - self.left_out_bytes

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one number in the dtype it is computed in."""
        return self.dtype.itemsize

    @property
    def expert_weights(self) -> int:
        """Weights in routed experts."""
        return sum(layer.expert_weights for layer in self.layers)

    @property
    def linear_weights(self) -> int:
        """Weights in the other linears of decoder layers."""
        return sum(layer.linear_weights for layer in self.layers)

    @property
    def expert_bytes(self) -> int:
        """Bytes of routed experts on disk."""
        return self.expert_weights * self.stored_bytes_per_weight

    @property
    def linear_bytes(self) -> int:
        """Bytes of the other linears on disk."""
        return self.linear_weights * self.stored_bytes_per_weight


def model_sizes(source: SourceModel) -> ModelSizes:
    """Sizes of an opened model."""
    layers = tuple(_layer_sizes(source, i) for i in range(source.topology.num_layers))
    return ModelSizes(
        bytes=source.checkpoint.nbytes,
        embedding_bytes=_embedding_bytes(source),
        largest_tensor=_largest_outer_tensor(source),
        dtype=source.dtype,
        hidden_size=source.config.get_text_config().hidden_size,
        layers=layers,
        stored_bytes_per_weight=source.stored_dtype.itemsize,
        left_out_bytes=sum(source.checkpoint.info(name).nbytes for name in source.names.left_out),
    )


def packed_bytes_of(weights: int, bits: float, group_size: int) -> int:
    """Bytes of packed weights: codes, a 16-bit scale and a zero point of ``bits`` per group."""
    return int(weights * (bits + (16 + bits) / group_size) / 8)


def _layer_sizes(source: SourceModel, index: int) -> LayerSizes:
    module = source.layer(index)
    names = source.topology.linears[index]
    linears = tuple(_linear_size(name, module.get_submodule(name)) for name in names)
    block = source.topology.moe.get(index)
    expert: tuple[MatrixSize, ...] = ()
    if block is not None:
        experts = module.get_submodule(block.experts)
        shapes = (fused_weight(experts, matrix).shape for matrix in MATRICES)
        expert = tuple(MatrixSize(rows, columns, block.experts) for _, rows, columns in shapes)
    count = block.num_experts if block is not None else 0
    weights = count * sum(matrix.weights for matrix in expert)
    nbytes = sum(p.numel() * p.element_size() for p in module.parameters())
    return LayerSizes(
        bytes=nbytes,
        other_bytes=nbytes - weights * source.dtype.itemsize,
        by_expert=block is not None and source.stacked_experts(index) is not None,
        experts=count,
        top_k=block.top_k if block is not None else 0,
        expert=expert,
        linears=linears,
    )


def _linear_size(name: str, linear: Any) -> MatrixSize:
    return MatrixSize(linear.out_features, linear.in_features, part=name.split(".")[0])


def _embedding_bytes(source: SourceModel) -> int:
    embedding = source.model.get_input_embeddings().weight
    return int(embedding.numel()) * source.dtype.itemsize


def _largest_outer_tensor(source: SourceModel) -> int:
    return max((source.checkpoint.info(n).nbytes for n in source.outer_disk_names()), default=0)


def network_bytes(sizes: ModelSizes, layer: LayerSizes, units: int) -> int:
    """Bytes of a layer's top-any network: two linear layers with biases, in float32."""
    if not layer.experts:
        return 0
    first = units * (sizes.hidden_size + layer.top_k + 1)
    return 4 * (first + layer.top_k * (units + 1))
