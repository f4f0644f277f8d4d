"""Compile the Triton kernels for a GPU that need not be there, down to machine code.

    python tests/kernels/compile_kernels.py CAPABILITY [--all]

Fails where a kernel takes more shared memory than such a GPU has, or where the compiler has a
matrix-vector kernel load anything more than once. Prints registers and spilled bytes of each, and
of the matrix-vector kernels for one width the instructions per code in the loop over blocks. Run by
``tests/kernels/test_triton.py``.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mcsharp_sdk.kernels import (
    triton_combine,
    triton_decode,
    triton_dequantise,
    triton_gemm,
    triton_gptq,
    triton_halves,
    triton_planes,
    triton_search,
    triton_sort,
)
from mcsharp_sdk.kernels.triton_launch import CODE_TOKENS, OVERLAPPING
from mcsharp_sdk.kernels.triton_launch_few import TILES, GemvTile, tile_of

WARPS = 4
WEIGHT = ("*u8", "*fp16", "*u8")
SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Compute capability -> shared memory that a program can have."""

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

Case = tuple[str, Any, Mapping[str, Any], Mapping[str, Any]]
"""Name, kernel, types of its arguments, its constants."""


def gemv(
    widths: tuple[int, ...],
    dp4a: bool,
    gated: bool,
    group: int,
    tail: bool,
    tile: GemvTile = TILES[4096],
) -> Case:
    types = {
        "planes": "*i8",
        "x_scales": "*fp32",
        "x_sums": "*fp32",
        "out": "*bf16",
        "chosen": "*i64",
        "table": "*i32",
        "weights": tuple(WEIGHT for _ in widths),
        **dict.fromkeys(("rows", "columns"), "i32"),
    }
    constants = {
        "WIDTHS": widths,
        "GROUP": group,
        "GATED": gated,
        "PLANES": 1 if dp4a else 2,
        "EMULATE": False,
        "ALIGNED": not tail,
        "TAIL": tail,
        "BN": tile.rows,
        "QUADS": tile.quads,
        "num_warps": tile.warps,
    }
    name = f"gemv {widths} {8 if dp4a else 16}-bit activations group {group} {tuple(tile)}"
    return name, triton_decode.grouped_gemv, types, constants


def gemm(widths: tuple[int, ...], gated: bool, group: int, tail: bool, tokens: int) -> Case:
    types = {
        "x": "*bf16",
        "halves": "*fp16",
        "factors": "*fp32",
        "sums": "*fp32",
        "count": "i32",
        "unknown_zero": "i32",
        "out": "*bf16",
        "order": "*i64",
        "tiles": "*i32",
        "table": "*i32",
        "weights": tuple(WEIGHT for _ in widths),
        **dict.fromkeys(("rows", "columns", "slots_per_row"), "i32"),
    }
    constants = {
        "WIDTHS": widths,
        "GROUP": group,
        "GATED": gated,
        "TO_SLOTS": not gated,
        "EMULATE": False,
        "TAIL": tail,
        "BM": tokens,
        "BN": 64,
        "STAGES": 3 if tokens <= CODE_TOKENS else 2,
        "CODES": group % 128 == 0 and tokens <= CODE_TOKENS,
    }
    return f"gemm {widths} group {group} x {tokens}", triton_gemm.grouped_gemm, types, constants


def dequantise(widths: tuple[int, ...], group: int) -> Case:
    types = {
        "out": "*bf16",
        "unknown_zero": "i32",
        "table": "*i32",
        "weights": tuple(WEIGHT for _ in widths),
        **dict.fromkeys(("rows", "columns", "first", "count", "height"), "i32"),
    }
    constants = {"WIDTHS": widths, "GROUP": group, "EMULATE": False, "BN": 64}
    return f"dequantise {widths} group {group}", triton_dequantise.dequantise_rows, types, constants


def rounding(planes: int, chained: bool = False) -> Case:
    types = {"x": "*bf16", "planes": "*i8", "scales": "*fp32", "sums": "*fp32", "columns": "i32"}
    constants = {"PLANES": planes, "CHAINED": chained}
    return f"round to {planes} bytes", triton_planes.round_activations, types, constants


def combining() -> Case:
    types = {"y": "*bf16", "chosen": "*i64", "routing": "*fp32", "out": "*bf16"}
    types |= dict.fromkeys(("width", "experts", "slots_per_row"), "i32")
    return "combine", triton_combine.combine_slots, types, {"BH": 512}


def helpers() -> Iterator[Case]:
    """The kernels around the products, and those of quantising."""
    for planes, chained in itertools.product((1, 2), (False, True)):
        yield rounding(planes, chained)
    types = {"x": "*bf16", "halves": "*fp16", "factors": "*fp32", "sums": "*fp32", "columns": "i32"}
    yield "prepare rows", triton_halves.prepare_rows, types, {"AT_ONCE": 16}
    yield combining()
    types = {"chosen": "*i64", "order": "*i64", "ends": "*i32", "tiles": "*i32"}
    types |= dict.fromkeys(("slots", "experts", "tile_count", "height"), "i32")
    for bins in (4, 16, 512):
        constants = {"BINS": bins, "SLOTS": 1024, "TILES": 128}
        yield f"sort into {bins}", triton_sort.sort_by_expert, types, constants
    pointers = ("exact", "updates", "top", "codes", "errors")
    types = dict.fromkeys(pointers, "*fp32")
    strides = ("exact_stride", "updates_stride", "updates_row", "updates_column", "errors_stride")
    types |= dict.fromkeys(("rows", "columns", *strides), "i32")
    block = {"COMPENSATE": True, "N": 128, "BR": triton_gptq.ROWS}
    yield "gptq", triton_gptq.quantise_column_block, types, block
    for top, columns in ((1, 128), (3, 32), (3, 128), (3, 256)):
        yield search(top, columns)


def search(top: int, columns: int) -> Case:
    types: dict[str, str] = dict.fromkeys(triton_search.UNKNOWN, "i32")
    pointers = ("weights", "importance", "candidates", "scales", "offsets")
    types |= dict.fromkeys(pointers, "*fp32")
    types |= dict.fromkeys(("top", "step", "smallest", "largest"), "fp32")
    constants = triton_search.launch_constants(top, columns) | {"BR": triton_search.ROWS}
    name = "of 1 bit" if top == 1 else "of ranges"
    return f"search {name} group {columns}", triton_search.search_rows, types, constants


def cases(all_: bool) -> Iterator[Case]:
    yield from helpers()
    yield gemv((2,), dp4a=False, gated=True, group=128, tail=False)
    yield gemv((3,), dp4a=False, gated=True, group=128, tail=False)
    yield gemv((3,), dp4a=True, gated=True, group=128, tail=False)
    yield gemm((3,), gated=True, group=128, tail=False, tokens=16)
    yield dequantise((3,), group=128)
    if not all_:
        return
    for group in (32, 128):
        yield dequantise((1, 2, 3, 4, 8), group)
    for widths in ((1,), (2,), (4,), (8,), (1, 2, 3), (1, 2, 3, 4, 8)):
        for dp4a in (False, True):
            yield gemv(widths, dp4a, gated=True, group=128, tail=False)
        yield gemm(widths, gated=True, group=128, tail=False, tokens=64)
        yield gemm(widths, gated=True, group=128, tail=False, tokens=128)
    sizes = itertools.product(TILES, (None, 32))
    tiles = dict.fromkeys(tile_of(columns, 128, rows) for columns, rows in sizes)
    for dp4a, tile in itertools.product((False, True), tiles):
        yield gemv((1, 2, 3), dp4a, gated=True, group=128, tail=False, tile=tile)
    for dp4a, rows in itertools.product((False, True), (None, 32)):
        tile = tile_of(4096, 32, rows)
        yield gemv((1, 2, 3, 4, 8), dp4a, gated=False, group=32, tail=True, tile=tile)
    yield gemm((1, 2, 3), gated=False, group=100, tail=True, tokens=32)


def compiled(kernel: Any, types: Mapping[str, Any], constants: Mapping[str, Any], arch: int) -> Any:
    """A kernel in machine code; pointers, rows and columns are taken to be divisible by 16."""
    names = list(kernel.arg_names)
    constants = dict(constants)
    if "OVERLAP" in names:
        constants["OVERLAP"] = arch // 10 >= OVERLAPPING[0]
    options = {"num_warps": constants.pop("num_warps", WARPS)}
    aligned = [["tt.divisibility", 16]]
    attributes: dict[tuple[int, ...], Any] = {}
    for name, kind in types.items():
        at = names.index(name)
        if isinstance(kind, tuple):
            attributes |= {(at, i, j): aligned for i in range(len(kind)) for j in range(3)}
        elif kind.startswith("*") or name in {"rows", "columns"}:
            attributes[(at,)] = aligned
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def tool(name: str, code: bytes, option: str) -> str:
    """What one of the tools that come with triton says about machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(TOOLS / name), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions_in_longest_loop(code: bytes) -> int:
    """Machine instructions of the longest stretch that a branch goes back over."""
    listing = tool("cuobjdump", code, "-sass")
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", listing)
    addresses = [int(address, 16) for address, _ in lines]
    longest = 0
    for address, (_, text) in zip(addresses, lines, strict=True):
        branch = re.search(r"BRA.* 0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            target = int(branch[1], 16)
            longest = max(longest, sum(target <= at <= address for at in addresses))
    return longest


def quads_of_thread(constants: Mapping[str, Any]) -> int:
    """How many quads of weights a thread of a matrix-vector kernel multiplies at a time."""
    return constants["BN"] * constants["QUADS"] // (32 * constants["num_warps"])


def instructions_per_code(result: Any, constants: Mapping[str, Any]) -> float:
    """Of a matrix-vector kernel for one width."""
    width = constants["WIDTHS"][0]
    codes = quads_of_thread(constants) * (128 // (2 if width == 3 else width))
    return instructions_in_longest_loop(result.asm["cubin"]) / codes


def check(name: str, result: Any, constants: Mapping[str, Any], capability: int) -> None:
    """End where a kernel needs what such a GPU has not, or loads what it has loaded already."""
    if result.metadata.shared > SHARED_BYTES[capability]:
        raise SystemExit(f"{name}: {result.metadata.shared} bytes of shared memory")
    if "QUADS" in constants and len(constants["WIDTHS"]) == 1:
        ptx = result.asm["ptx"]
        found = (ptx.count("no_allocate.v4"), ptx.count("global.v4"))
        if found != expected_quads(constants):
            raise SystemExit(f"{name}: {found} loads of quads, not {expected_quads(constants)}")


def expected_quads(constants: Mapping[str, Any]) -> tuple[int, int]:
    """Places where a matrix-vector kernel for one width loads a quad past the nearest cache, and
    where through it: weights before the loop and in it, at 3 bits through it and with third bits,
    and activations."""
    width, quads = constants["WIDTHS"][0], quads_of_thread(constants)
    activations = constants["PLANES"] * 8 // (2 if width == 3 else width)
    return (0, 3 * quads + activations) if width == 3 else (2 * quads, activations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capability", type=int, choices=sorted(SHARED_BYTES))
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    for name, kernel, types, constants in cases(options.all):
        result = compiled(kernel, types, constants, options.capability)
        usage = tool("cuobjdump", result.asm["cubin"], "--dump-resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise SystemExit(f"{name}: no machine code came out")
        check(name, result, constants, options.capability)
        line = f"sm_{options.capability} {name}: {found[1]} registers, {found[2]} bytes spilled"
        if name.startswith("gemv") and len(constants["WIDTHS"]) == 1:
            line += f", {instructions_per_code(result, constants):.1f} instructions per code"
        print(line)


if __name__ == "__main__":
    main()
