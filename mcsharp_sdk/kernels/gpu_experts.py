"""All routed experts of a layer at once on a GPU, in Triton.

Few tokens go through matrix-vector kernels (:mod:`~mcsharp_sdk.kernels.triton_decode`), many
through a grouped product (:mod:`~mcsharp_sdk.kernels.triton_gemm`), and long prompts through that
of torch on dequantised weights (:mod:`~mcsharp_sdk.kernels.gpu_dense`). The number of launches does
not depend on the routing or on how many widths there are, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from mcsharp_sdk.kernels import crossovers, gpu_dense
from mcsharp_sdk.kernels.case import BUILT_IN, MEASURED, Choice, LayerCase
from mcsharp_sdk.kernels.expert_layer import ExpertLayer, in_parts
from mcsharp_sdk.kernels.tilings import TILINGS, Kind, Tiling
from mcsharp_sdk.quantization.packing import BLOCK, packed_bytes

DECODE_TOKENS = 4
"""Tokens up to which each slot reads its expert's weights by itself, where nothing was measured."""

DENSE_TOKENS = 2048
DENSE_SLOTS = 512
"""Tokens, and slots of an expert on average, from which on weights are dequantised for torch's
product, where nothing was measured. These are from an H100: see ``docs/performance.md``."""

GEMV_AT_ONCE = 64
"""Most tokens of a launch of the matrix-vector kernels."""

WORKSPACE_BYTES = 256 * 2**20
"""Scratch for many tokens; beyond it they are done some at a time."""

LONG_WORKSPACE_BYTES = 2**30
"""The same for tokens whose experts are dequantised, which is done again for each such part."""


def run_experts(
    layer: ExpertLayer,
    hidden: Tensor,
    chosen: Tensor,
    routing: Tensor,
    *,
    dp4a: bool = False,
    tiling: Tiling | None = None,
    of: tuple[int, int] | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts.

    Parameters
    ----------
    hidden : [T, H], 16-bit floats; T may be 0.
    chosen : int64 [T, k]; ``layer.experts`` marks a dropped slot, which costs nothing.
    routing : [T, k], any float dtype.
    dp4a : for few tokens, round the inputs of both matrices to 8 bits, 128 at a time.
    tiling : how to divide the work, of :func:`tilings_of`; by default what was measured to be
        fastest, or else what is built in.
    of : tokens and slots that the way is chosen by, where rows are slots already; by default
        those of ``chosen``.

    Returns
    -------
    [T, H] in hidden's dtype; summed in fp32, over a token's slots in their order.
    """
    if not chosen.numel():
        return torch.zeros_like(hidden)
    tokens, slots = of or chosen.shape
    hidden, chosen, routing = hidden.contiguous(), chosen.contiguous(), routing.contiguous()
    if tiling is None:
        tiling = _tiling(case_of(layer, slots, hidden), tokens, measured=not dp4a)
    run, at_once = _way(layer, tiling, chosen.shape[1], hidden.dtype, dp4a=dp4a)
    return in_parts(run, at_once, hidden, chosen, routing)


def _way(
    layer: ExpertLayer, tiling: Tiling, slots: int, dtype: torch.dtype, *, dp4a: bool
) -> tuple[Callable[..., Tensor], int]:
    """What runs a layer in one way, and for how many tokens at once."""
    if tiling.kind == "gemv":
        return partial(_few_tokens, layer, dp4a=dp4a, step=tiling.size), GEMV_AT_ONCE
    if tiling.kind == "dense":
        room = gpu_dense.workspace_bytes(layer, slots, dtype)
        return partial(_long_prompt, layer), max(1, LONG_WORKSPACE_BYTES // room)
    return partial(_many_tokens, layer, height=tiling.size), tokens_at_once(layer, slots, dtype)


def case_of(layer: ExpertLayer, slots: int, hidden: Tensor) -> LayerCase:
    """What a layer's tiling is chosen by, for tokens with so many slots each."""
    return LayerCase(
        hidden=layer.down.rows,
        intermediate=layer.down.columns,
        rows=layer.gate_up.rows,
        experts=layer.experts,
        slots=slots,
        widths=layer.gate_up.widths,
        group_size=layer.gate_up.group_size,
        dtype=hidden.dtype,
        device=hidden.device.type,
    )


def explain_tiling(case: LayerCase, tokens: int) -> Choice:
    """The tiling for so many tokens; of what is built in, only the kind is told."""
    if found := choose_tiling(case, tokens):
        return Choice(found, MEASURED)
    return Choice(built_in_kind(case, tokens), BUILT_IN)


def choose_tiling(case: LayerCase, tokens: int) -> str:
    """Name of the tiling that was measured to be fastest for a layer; empty if none was."""
    found = crossovers.fastest(case, tokens)
    if found and found not in tilings_of(case):
        crossovers.warn_unfit(case, found)
        return ""
    return found


def built_in_kind(case: LayerCase, tokens: int) -> Kind:
    """How a layer is run with so many tokens where nothing was measured."""
    if tokens <= DECODE_TOKENS and _fits_gemv(case):
        return "gemv"
    share = tokens * case.slots / case.experts
    if tokens >= DENSE_TOKENS and share >= DENSE_SLOTS and gpu_dense.fits(case):
        return "dense"
    return "gemm"


def tilings_of(case: LayerCase) -> dict[str, Tiling]:
    """The tilings that a layer can be run with, by name."""
    fits = {"gemv": _fits_gemv(case), "gemm": True, "dense": gpu_dense.fits(case)}
    return {name: tiling for name, tiling in TILINGS.items() if fits[tiling.kind]}


def _tiling(case: LayerCase, tokens: int, *, measured: bool) -> Tiling:
    """What is built in, or with ``measured`` what was measured to be fastest."""
    found = choose_tiling(case, tokens) if measured else ""
    return TILINGS[found] if found else Tiling(built_in_kind(case, tokens))


def _fits_gemv(case: LayerCase) -> bool:
    inputs = (case.hidden, case.intermediate)
    return all(takes_gemv(columns, case.widths, case.group_size) for columns in inputs)


def tokens_at_once(
    layer: ExpertLayer, slots: int, dtype: torch.dtype, *, own_rows: bool = False
) -> int:
    """How many tokens fit into the workspace, 1 at least."""
    return max(1, WORKSPACE_BYTES // workspace_bytes(layer, slots, dtype, own_rows=own_rows))


def workspace_bytes(
    layer: ExpertLayer, slots: int, dtype: torch.dtype, *, own_rows: bool = False
) -> int:
    """Scratch that one token with so many slots takes among many, result not included.

    The inputs of ``down`` count twice, with a sum in fp32 of each block: they are laid out anew
    where there are few per expert. With ``own_rows`` each slot has its own input, made of a copy of
    the token, and its own output.
    """
    gate_up, inner, hidden = layer.gate_up.rows, layer.down.columns, layer.down.rows
    laid_out = inner + 2 * inner // BLOCK
    elements = inner + laid_out + hidden + (gate_up + inner if layer.between is not None else 0)
    if own_rows:
        elements += 4 * layer.gate_up.columns + hidden  # a copy, its weighing in fp32, the input
    return slots * elements * dtype.itemsize


def takes_gemv(columns: int, widths: Iterable[int], group_size: int) -> bool:
    """Whether packed rows are whole 32-bit words at every width, in groups of whole words."""
    words = all(packed_bytes(columns, width) % 4 == 0 for width in widths)
    return words and group_size % 4 == 0


def _few_tokens(
    layer: ExpertLayer,
    hidden: Tensor,
    chosen: Tensor,
    routing: Tensor,
    *,
    dp4a: bool,
    step: int | None,
) -> Tensor:
    from mcsharp_sdk.kernels.triton_launch import combine
    from mcsharp_sdk.kernels.triton_launch_few import gemv

    flat = chosen.reshape(-1)
    gated = layer.between is None
    product = partial(gemv, table=layer.table, chosen=flat, dp4a=dp4a, step=step)
    inner = product(layer.gate_up, x=hidden, gated=gated)
    inner = _between(layer, inner, flat)
    y = product(layer.down, x=inner, gated=False, chained=True)
    return combine(_behind(layer, y, flat), chosen, routing, layer.experts)


def _many_tokens(
    layer: ExpertLayer, hidden: Tensor, chosen: Tensor, routing: Tensor, *, height: int | None
) -> Tensor:
    from mcsharp_sdk.kernels.triton_launch import combine, gemm, sort_slots

    flat = chosen.reshape(-1)
    tiles = sort_slots(flat, layer.experts, height)
    gated = layer.between is None
    inner = gemm(layer.gate_up, layer.table, hidden, tiles, gated=gated, to_slots=False)
    if not gated:
        inner = _between(layer, inner, flat[tiles.order])
    y = gemm(layer.down, layer.table, inner, tiles, gated=False, to_slots=True)
    return combine(_behind(layer, y, flat), chosen, routing, layer.experts)


def _long_prompt(layer: ExpertLayer, hidden: Tensor, chosen: Tensor, routing: Tensor) -> Tensor:
    from mcsharp_sdk.kernels.triton_launch import combine, sort_slots

    flat = chosen.reshape(-1)
    order, ends, *_ = sort_slots(flat, layer.experts)
    gated = layer.between is None
    rows = hidden[order // chosen.shape[1]]
    inner = gpu_dense.products(layer.gate_up, layer.table, rows, ends, gated=gated)
    del rows  # within the workspace until here
    if not gated:
        inner = _between(layer, inner, flat[order])
    y = gpu_dense.products(layer.down, layer.table, inner, ends, order=order)
    return combine(_behind(layer, y, flat), chosen, routing, layer.experts)


def _between(layer: ExpertLayer, rows: Tensor, expert: Tensor) -> Tensor:
    if layer.between is None:
        return rows
    return layer.between(rows, expert.clamp(max=layer.experts - 1)).contiguous()


def _behind(layer: ExpertLayer, rows: Tensor, expert: Tensor) -> Tensor:
    if layer.behind is None:
        return rows
    return layer.behind(rows, expert.clamp(max=layer.experts - 1)).contiguous()
