"""Kernels compiled for a GPU and run on the CPU, launched by the code that launches them there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import triton
from numpy.typing import NDArray
from ptx_machine import Memory, launch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mcsharp_sdk.kernels import triton_launch, triton_launch_few

KERNELS = {
    triton_launch: ("combine_slots",),
    triton_launch_few: ("grouped_gemv", "round_activations"),
}
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
    torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]
Argument = Any
"""A tensor, a number, or a tuple of arguments."""


def emulate_gpu(monkeypatch: pytest.MonkeyPatch, capability: int) -> Memory:
    """Have the kernels for few tokens compiled for a GPU, and run on the CPU, on CPU tensors."""
    memory = Memory()
    overlaps = capability // 10 >= triton_launch.OVERLAPPING[0]
    options = {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}
    for module, names in KERNELS.items():
        monkeypatch.setattr(module, "overlap", lambda device: options)
        for name in names:
            kernel = _Kernel(getattr(module, name), capability, memory)
            monkeypatch.setattr(module, name, kernel)
    return memory


def addresses(tensor: Tensor) -> tuple[int, int]:
    """The first and the last of a contiguous tensor."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 1


class _Kernel:
    """In place of a Triton kernel."""

    def __init__(self, kernel: Any, capability: int, memory: Memory) -> None:
        self._kernel, self._capability, self._memory = kernel, capability, memory

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        x, y, z = (*grid, 1, 1)[:3]
        return partial(self._launch, (x, y, z))

    def _launch(
        self,
        grid: tuple[int, int, int],
        *arguments: Argument,
        num_warps: int = 4,
        launch_pdl: bool = False,
        **constants: Any,
    ) -> None:
        compiled = self._compile(arguments, constants, num_warps)
        flat = list(_flat(arguments))
        self._memory.hold(_bytes(value) for value in flat if isinstance(value, Tensor))
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in flat]
        ptx = compiled.asm["ptx"]
        launch(ptx, self._memory, values, grid, num_warps, early=launch_pdl)

    def _compile(
        self, arguments: tuple[Argument, ...], constants: Mapping[str, Any], warps: int
    ) -> Any:
        names = self._kernel.arg_names
        given = dict(zip(names, arguments, strict=False))
        source = ASTSource(
            fn=self._kernel,
            signature={n: _type(given[n]) if n in given else "constexpr" for n in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs=dict.fromkeys(_divisible(arguments), ALIGNED),
        )
        target = GPUTarget("cuda", self._capability, 32)
        return triton.compile(source, target=target, options={"num_warps": warps})


def _type(argument: Argument) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_type, argument))
    return f"*{TYPES[argument.dtype]}" if isinstance(argument, Tensor) else "i32"


def _divisible(arguments: tuple[Argument, ...]) -> Iterator[tuple[int, ...]]:
    """Places of addresses and numbers that are multiples of 16, which kernels are compiled for."""
    for place, argument in enumerate(arguments):
        if isinstance(argument, tuple):
            yield from ((place, *rest) for rest in _divisible(argument))
        elif (argument.data_ptr() if isinstance(argument, Tensor) else argument) % 16 == 0:
            yield (place,)


def _flat(argument: Argument) -> Iterator[Tensor | int]:
    if isinstance(argument, tuple):
        for part in argument:
            yield from _flat(part)
    else:
        yield argument


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8).numpy()
