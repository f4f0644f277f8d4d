"""The modules that a compressed model is made of.

Packed tensors are parameters (uint8, no gradient), since buffers are not offloaded; and they are
read inside the ``forward`` of the module that owns them, since offloading fetches them only there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mcsharp_sdk.kernels import PackedMatrix, PackedStack, packed_linear, packed_linears
from mcsharp_sdk.models.experts import (
    MATRICES,
    Matrix,
    activate,
    finish,
    fused_weight,
    parameter_name,
    weigh,
)
from mcsharp_sdk.quantization.grid import PackedWeight
from mcsharp_sdk.quantization.rotation import expert_signs, rotate
from mcsharp_sdk.runtime import operators
from mcsharp_sdk.runtime.kept_dtypes import KeepsDtypes
from mcsharp_sdk.runtime.layout import (
    TENSORS,
    bucket_name,
    empty_packed,
    members,
    removed,
    tensor_name,
)
from mcsharp_sdk.runtime.whole_layers import whole_layer

FEW_ROWS = 64
"""Up to so many rows, those of all experts are turned at once; beyond it, that takes memory."""


def _register(module: nn.Module, packed: PackedWeight, names: Sequence[str]) -> None:
    for part, name in zip(TENSORS, names, strict=True):
        module.register_parameter(name, nn.Parameter(getattr(packed, part), requires_grad=False))


class PackedLinear(KeepsDtypes):
    """A linear layer whose weight is packed.

    Parameters
    ----------
    in_features, out_features : K and R.
    bits, group_size : of the weight.
    bias : the bias as it was, or None.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        packed = empty_packed(out_features, in_features, bits, group_size)
        _register(self, packed, TENSORS)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def keeps_dtype(self, tensor: Tensor) -> bool:
        """Packed tensors do; the bias is added to activations."""
        return tensor is not self.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., R], in x's dtype."""
        packed = (self.qweight, self.scales, self.zeros)
        sizes = (self.bits, self.group_size, self.in_features)
        if operators.are_wanted(x):
            out = operators.linear(x, *packed, *sizes)
        else:
            out = packed_linear(x, PackedMatrix(PackedWeight(*packed), *sizes))
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group_size}"


class ExpertBucket(KeepsDtypes):
    """The experts of one layer that share a bit width, stacked.

    Parameters
    ----------
    experts : which experts of the layer these are, ascending.
    shapes : matrix -> (rows, columns).
    rotated_of : experts of the layer, if the inputs of both matrices are turned
        (``quantization.rotation``), else 0. All buckets then share one table of signs.
    """

    def __init__(
        self,
        experts: Sequence[int],
        shapes: dict[Matrix, tuple[int, int]],
        bits: int,
        group: int,
        rotated_of: int = 0,
    ) -> None:
        super().__init__()
        self.experts = tuple(experts)
        self.columns = {matrix: shape[1] for matrix, shape in shapes.items()}
        self.bits, self.group_size, self.rotated_of = bits, group, rotated_of
        for matrix, (rows, columns) in shapes.items():
            packed = empty_packed(rows, columns, bits, group, len(self.experts))
            _register(self, packed, [tensor_name(matrix, part) for part in TENSORS])

    @property
    def rotated(self) -> bool:
        """Whether the inputs of both matrices are turned."""
        return self.rotated_of > 0

    @property
    def tensors(self) -> dict[str, Any]:
        """The packed tensors by name; looking them up as attributes takes longer."""
        return self._parameters

    def stack(self, matrix: Matrix) -> PackedStack:
        """One matrix of all experts of this bucket."""
        packed = PackedWeight(*(self.tensors[tensor_name(matrix, part)] for part in TENSORS))
        return PackedStack(packed, self.bits, self.group_size, self.columns[matrix])

    def forward(
        self,
        tokens: Tensor,
        counts: Sequence[int],
        activation: Callable[[Tensor], Tensor],
        finishing: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Run each expert of the bucket on its own tokens.

        Parameters
        ----------
        tokens : [N, hidden], first those of the bucket's first expert, and so on.
        counts : tokens of each expert of the bucket; any may be 0.
        activation : what the family does between the projections, of all rows at once.
        finishing : what it does behind the second one.

        Returns
        -------
        [N, hidden]
        """
        tokens = self._turned(tokens, counts)
        inner = activation(packed_linears(tokens, self.stack("gate_up"), counts))
        return finishing(packed_linears(self._turned(inner, counts), self.stack("down"), counts))

    def _turned(self, inputs: Tensor, counts: Sequence[int]) -> Tensor:
        if not self.rotated:
            return inputs
        signs = expert_signs(self.rotated_of, inputs.shape[-1], inputs.device)
        own = [(e, count) for e, count in zip(self.experts, counts, strict=True) if count]
        if len(inputs) <= FEW_ROWS:
            return rotate(inputs, signs[[e for e, count in own for _ in range(count)]])
        parts = inputs.split([count for _, count in own])
        return torch.cat([rotate(rows, signs[e]) for (e, _), rows in zip(own, parts, strict=True)])

    def extra_repr(self) -> str:
        return f"experts={list(self.experts)}, bits={self.bits}, group={self.group_size}"


class PackedExpertsMixin:
    """Forward of an experts module whose fused weights have become buckets."""

    num_experts: int
    has_bias: bool
    removed: tuple[int, ...]
    operator_number: int
    children: Callable[[], Iterator[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by its original class, since a file cannot name a class made here."""
        whole: Any = super().__reduce_ex__(protocol)
        return _unfilled, (type(self).__bases__[1],), *whole[2:]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # of nn.Module, which is beside it
        self.operator_number = operators.number_of(self)

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As :meth:`weighted_sum`, which compilers do not look into."""
        if operators.are_wanted(hidden):
            return operators.experts(hidden, top_k_index, top_k_weights, self.operator_number)
        return self.weighted_sum(hidden, top_k_index, top_k_weights)

    def weighted_sum(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the selected experts.

        Parameters
        ----------
        hidden : [T, hidden]
        top_k_index : int64 [T, k]; ``num_experts`` marks a dropped slot, which costs nothing.
        top_k_weights : [T, k]
        """
        whole = whole_layer(self, self._buckets(), hidden, top_k_weights)
        if whole is not None:
            return whole(hidden, top_k_index, top_k_weights)
        out = self._of_removed(hidden, top_k_index, top_k_weights)
        slots, order = top_k_index.reshape(-1).sort(stable=True)
        counts = torch.bincount(slots, minlength=self.num_experts + 1).tolist()
        places = order.split(counts)
        weights = top_k_weights.reshape(-1)
        for bucket in self._buckets():
            here = [counts[e] for e in bucket.experts]
            if not any(here):
                continue
            chosen = [e for e, count in zip(bucket.experts, here, strict=True) if count]
            place = torch.cat([places[e] for e in chosen])
            token, expert = place // top_k_index.shape[1], top_k_index.reshape(-1)[place]
            x, factor = weigh(self, hidden[token], weights[place])
            # Functions, not the module itself: offloading would move what it is handed.
            result = bucket(
                x,
                here,
                lambda projected, e=expert: activate(self, projected, e),
                lambda output, e=expert: finish(self, output, e),
            )
            weighted = result * factor.unsqueeze(-1)
            out.index_add_(0, token, weighted.to(out.dtype))
        return out

    def _of_removed(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, hidden], what removed experts give: zeros, but for their biases."""
        out = torch.zeros_like(hidden)
        if self.removed and self.has_bias:
            gone = torch.isin(top_k_index, torch.tensor(self.removed, device=hidden.device))
            token, slot = gone.nonzero(as_tuple=True)
            _, factor = weigh(self, hidden[token], top_k_weights[token, slot])
            rest = finish(self, torch.zeros_like(hidden[token]), top_k_index[token, slot])
            out.index_add_(0, token, (rest * factor.unsqueeze(-1)).to(out.dtype))
        return out

    def _buckets(self) -> list[ExpertBucket]:
        return [m for m in self.children() if isinstance(m, ExpertBucket)]


_PACKED_CLASSES: dict[type, type] = {}


def pack_experts_module(
    experts: Any, bits: Sequence[int], group_size: int, *, rotated: bool = False
) -> None:
    """Turn a fused experts module into a packed one, in place; the packed tensors are empty.

    The instance stays, so that its activation, biases, limits and norms do; only its fused weights
    go and its class gains :class:`PackedExpertsMixin`.
    """
    shapes: dict[Matrix, tuple[int, int]] = {}
    for matrix in MATRICES:
        _, rows, columns = fused_weight(experts, matrix).shape
        shapes[matrix] = (rows, columns)
    for matrix in MATRICES:
        del experts._parameters[parameter_name(experts, matrix)]
    for width, chosen in members(bits).items():
        bucket = ExpertBucket(chosen, shapes, width, group_size, len(bits) if rotated else 0)
        experts.add_module(bucket_name(width), bucket)
    experts.removed = tuple(removed(bits))
    experts.operator_number = operators.number_of(experts)
    experts.__class__ = _packed_class(type(experts))
    # The family's weight initialisation would look for the fused weights.
    experts._is_hf_initialized = True


def _packed_class(original: type) -> type:
    """The packed form of a class of experts modules; always the same one."""
    if original not in _PACKED_CLASSES:
        _PACKED_CLASSES[original] = type(
            f"Packed{original.__name__}", (PackedExpertsMixin, original), {}
        )
    return _PACKED_CLASSES[original]


def _unfilled(original: type) -> Any:
    """A packed experts module without its state, for pickle and copies."""
    packed: Any = _packed_class(original)
    return packed.__new__(packed)
