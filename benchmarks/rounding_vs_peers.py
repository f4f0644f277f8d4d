"""How do speed, bits and perplexity of rounding by the weights alone compare with other packages'?

Every method gets the same experts of a model, one matrix after the other, and nothing else: no
text is seen, and all other weights stay. Printed are stored bits per weight; seconds of the
processor on one thread, for finding codes and grids alone; and the perplexity of the model with
what became of its weights, in bf16. The first line is the model as it is.

    python benchmarks/rounding_vs_peers.py MODEL TEST.txt [--methods ...] [--ggml LIBRARY]

Peers take part where they are there: HQQ after ``pip install hqq==0.2.8.post1``, llama.cpp's types
after ``pip install gguf`` with the library that ``--ggml`` names, from llama-cpp-python:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B ggml -DCMAKE_BUILD_TYPE=Release \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF
    cmake --build ggml --target ggml-base    # ggml/bin/libggml-base.so

llama.cpp's blocks of 256 weights are cut from the matrix as it lies in memory: where its columns
are no multiple of 256 they go over the ends of rows, and llama.cpp would take another type.

Experts must be [experts, outputs, inputs], as transformers has Mixtral's and most others'.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_runs import perplexity
from torch import Tensor

from mcsharp_sdk.quantization import GridSettings, dequantise, quantise_rtn
from mcsharp_sdk.quantization.hqq import quantise_hqq
from mcsharp_sdk.quantization.rotation import expert_signs, rotate_, turned_back

LLAMA_CPP = {4: ("Q4_0", "Q4_K", "IQ4_NL"), 3: ("Q3_K",), 2: ("Q2_K",)}
"""Bits -> llama.cpp's types of about so many."""

HQQ_GRID_BITS = 32
"""HQQ stores an fp16 scale and an fp16 zero point for each group."""

Restore = Callable[[], Tensor]
"""What became of a matrix, [R, K] fp32."""


@dataclass(frozen=True)
class Method:
    """A way to round.

    Attributes
    ----------
    quantise : gets a matrix [R, K] in fp32 and the signs of its columns for rotations, [K].
    bits : stored per weight.
    """

    quantise: Callable[[Tensor, Tensor], Restore]
    bits: float


def ours(bits: int, group: int, *, half_quadratic: bool = False, rotated: bool = False) -> Method:
    """This package's; a group has 16 bits of scale, and those of a code for its zero point."""
    rounding = quantise_hqq if half_quadratic else quantise_rtn
    rounding(torch.ones(1, 1, group), [bits], GridSettings(group_size=group))  # compiles

    def quantise(matrix: Tensor, signs: Tensor) -> Restore:
        matrix = rotate_(matrix.clone(), signs) if rotated else matrix
        found = rounding(matrix.unsqueeze(0), [bits], GridSettings(group_size=group)).expert(0)
        if rotated:
            return lambda: turned_back(found, torch.float32, signs)
        return lambda: dequantise(found, torch.float32)

    return Method(quantise, bits + (16 + bits) / group)


def hqq(bits: int, group: int) -> Method:
    """The package of HQQ's authors."""
    from hqq.core.quantize import Quantizer

    settings = {"nbits": bits, "group_size": group, "axis": 1, "device": "cpu"}

    def quantise(matrix: Tensor, signs: Tensor) -> Restore:
        codes, notes = Quantizer.quantize(matrix, compute_dtype=torch.float32, **settings)
        return lambda: Quantizer.dequantize(codes, notes).float().view(matrix.shape)

    return Method(quantise, bits + HQQ_GRID_BITS / group)


def ggml(library: Path, name: str) -> Method:
    """One of llama.cpp's types, with all inputs of the same importance."""
    kind = LlamaCppType(library, name)
    return Method(lambda matrix, signs: kind.quantise(matrix.view(-1, kind.columns)), kind.bits)


class LlamaCppType:
    """A type of llama.cpp's, in whose library matrices are quantised.

    Attributes
    ----------
    bits : stored per weight.
    columns : what those of a matrix have to be a multiple of.
    """

    def __init__(self, library: Path, name: str) -> None:
        import gguf

        self._kind = gguf.GGMLQuantizationType[name]
        self._block, self._size = gguf.GGML_QUANT_SIZES[self._kind]
        self.bits = 8 * self._size / self._block
        self.columns = max(self._block, 256)
        functions = ctypes.CDLL(str(library))
        functions.ggml_quantize_init(int(self._kind))
        self._chunk = functions.ggml_quantize_chunk
        pointer, long = ctypes.c_void_p, ctypes.c_int64
        self._chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
        self._chunk.restype = ctypes.c_size_t

    def quantise(self, matrix: Tensor, importance: Tensor | None = None) -> Restore:
        """A matrix [R, K] fp32; ``importance`` of its columns is [K] fp32."""
        import gguf

        rows, columns = matrix.shape
        found = np.empty((rows, columns // self._block * self._size), np.uint8)
        weights = None if importance is None else importance.data_ptr()
        into = found.ctypes.data
        self._chunk(int(self._kind), matrix.data_ptr(), into, 0, rows, columns, weights)
        return lambda: torch.from_numpy(gguf.dequantize(found, self._kind).copy()).view(
            rows, columns
        )


def methods(group: int, library: Path | None) -> Mapping[str, Callable[[], Method]]:
    """Name -> maker of a method that can run here."""
    found: dict[str, Callable[[], Method]] = {}
    for bits, kinds in LLAMA_CPP.items():
        found[f"rtn, rotated, {bits} bits"] = partial(ours, bits, group, rotated=True)
        found[f"rtn, {bits} bits"] = partial(ours, bits, group)
        found[f"hqq, {bits} bits"] = partial(ours, bits, group, half_quadratic=True)
        if find_spec("hqq"):
            found[f"HQQ, {bits} bits"] = partial(hqq, bits, group)
        if library is not None and find_spec("gguf"):
            found |= {f"llama.cpp {kind}": partial(ggml, library, kind) for kind in kinds}
    return found


def experts(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Each expert's matrices [R, K], to be written, with the signs of their columns."""
    for weights in model.parameters():
        if weights.dim() == 3:
            yield from zip(weights, expert_signs(len(weights), weights.shape[2]), strict=True)


def rounded(model: Any, method: Method) -> float:
    """Round a model's experts; returns seconds of the processor."""
    return sum(
        replaced(matrix, partial(method.quantise, matrix.float(), signs))
        for matrix, signs in experts(model)
    )


def replaced(matrix: Tensor, quantise: Callable[[], Restore]) -> float:
    """Write what becomes of a matrix into it; returns seconds of the processor for codes."""
    start = time.process_time()
    restore = quantise()
    seconds = time.process_time() - start
    matrix.copy_(restore().view(matrix.shape))
    return seconds


def print_row(name: str, bits: float, seconds: float | None, found: float) -> None:
    """One line: a method, its stored bits, seconds of the processor, and the perplexity."""
    spent = f"{'':9}" if seconds is None else f"{seconds:9.1f}"
    print(f"{name:36}{bits:7.3f}{spent}{found:12.2f}", flush=True)


def main() -> None:
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("test", type=Path, help="text to predict")
    parser.add_argument("--ggml", type=Path, help="llama.cpp's libggml-base")
    parser.add_argument("--methods", nargs="+", help="some of those that are printed")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--test-windows", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    job = {name: getattr(given, name) for name in ("model", "test", "length", "test_windows")}
    known = methods(given.group_size, given.ggml)
    load = partial(AutoModelForCausalLM.from_pretrained, given.model, dtype=torch.bfloat16)
    print(f"{'':36}{'bits':>7}{'CPU s':>9}{'perplexity':>12}")
    print_row("as it is", 16, None, perplexity(load(), job))
    for name in given.methods or known:
        model, method = load(), known[name]()
        seconds = rounded(model, method)
        print_row(name, method.bits, seconds, perplexity(model, job))


if __name__ == "__main__":
    main()
