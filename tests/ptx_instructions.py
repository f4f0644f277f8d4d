"""What PTX instructions do, for all threads of a program at once: those that our kernels have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ptx_machine import Program

Array = NDArray[Any]
Parts = Sequence[str]
Do = Callable[..., Array]

COMPARE: Mapping[str, Do] = {
    "eq": np.equal, "ne": np.not_equal,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
WARP: Mapping[str, Do] = {"max": np.max, "min": np.min, "add": np.sum}
ROUND: Mapping[str, Do] = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}
WIDE = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}


def _type(name: str) -> Any:
    from ptx_machine import TYPES

    return TYPES[name]


def _elementwise(do: Do, program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    """A function of operands of the type that the instruction ends with, or of pairs of it."""
    dtype = _type(parts[-1].removesuffix("x2"))
    count = 2 if parts[-1].endswith("x2") else 1
    whole = _type(f"b{8 * count * np.dtype(dtype).itemsize}") if count > 1 else dtype
    values = [_parts_of(program.read(operand, whole), dtype, count) for operand in operands[1:]]
    with np.errstate(all="ignore"):
        value = do(*values).astype(dtype)
    program.write(operands[0], _parts_of(value, whole, 1)[:, 0], mask)


def _product(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    """``mul`` and ``mad``: of the operands' width, or twice it, of all or of the high bits."""
    if parts[-1].startswith("f"):
        return _elementwise(np.multiply, program, parts, operands, mask)
    own = _type(parts[-1])
    wide = WIDE.get(parts[-1], own)
    a, b = (program.read(operand, own).astype(wide) for operand in operands[1:3])
    with np.errstate(over="ignore"):
        value = a * b
        if parts[1] == "hi":
            value = value >> (4 * value.dtype.itemsize)
        result = wide if parts[1] == "wide" else own
        value = value.astype(result)
        if parts[0] == "mad":
            value = value + program.read(operands[3], result)
    return program.write(operands[0], value, mask)


def _fused(a: Array, b: Array, c: Array) -> Array:
    return a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)


def _shift(do: Do, program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    dtype = _type(parts[-1])
    bits = 8 * np.dtype(dtype).itemsize
    by = program.read(operands[2], np.uint32)
    value = do(program.read(operands[1], dtype), np.minimum(by, bits - 1).astype(dtype))
    if parts[0] == "shl" or parts[-1][0] != "s":
        value = np.where(by < bits, value, 0).astype(dtype)
    program.write(operands[0], value, mask)


def _extract_bits(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    value = program.read(operands[1], _type(parts[-1])).astype(np.int64)
    first, count = (program.read(operand, np.uint32).astype(np.int64) for operand in operands[2:])
    value = (value >> first) & ((1 << count) - 1)
    if parts[-1] == "s32":
        value = np.where((value >> (count - 1)) & 1, value - (1 << count), value)
    program.write(operands[0], value.astype(_type(parts[-1])), mask)


def _dp4a(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    kinds = {"u32": np.uint8, "s32": np.int8}
    a, b = (
        _parts_of(program.read(operand, np.uint32), kinds[kind], 4).astype(np.int32)
        for operand, kind in zip(operands[1:3], parts[1:3], strict=True)
    )
    value = (a * b).sum(1, dtype=np.int32) + program.read(operands[3], np.int32)
    program.write(operands[0], value, mask)


def _parts_of(value: Array, dtype: Any, count: int) -> Array:
    return np.ascontiguousarray(value).view(dtype).reshape(-1, count)


def _permute_bytes(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    both = (_parts_of(program.read(operand, np.uint32), np.uint8, 4) for operand in operands[1:3])
    source = np.concatenate(list(both), 1)
    chosen = program.read(operands[3], np.uint32)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
    byte = np.take_along_axis(source, (chosen & 7).astype(np.int64), 1)
    byte = np.where(chosen & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint8)
    program.write(operands[0], _parts_of(byte, np.uint32, 1)[:, 0], mask)


def _count_ones(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    bits = np.unpackbits(_parts_of(program.read(operands[1], np.uint32), np.uint8, 4), axis=1)
    program.write(operands[0], bits.sum(1).astype(np.uint32), mask)


def _compare(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    a, b = (program.read(operand, _type(parts[-1])) for operand in operands[1:])
    program.write(operands[0], COMPARE[parts[1]](a, b), mask)


def _select(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    a, b = (program.read(operand, _type(parts[-1])) for operand in operands[1:3])
    program.write(operands[0], np.where(program.read(operands[3], np.bool_), a, b), mask)


def _move(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    """Also to or from several registers of a part of the width each."""
    dtype = _type(parts[-1])
    target, source = _registers(operands[0]), _registers(operands[1])
    count = max(len(target), len(source))
    part = _type(f"b{8 * np.dtype(dtype).itemsize // count}") if count > 1 else dtype
    values = [program.read(register, part if len(source) > 1 else dtype) for register in source]
    if len(source) > 1:
        values = [_parts_of(np.stack(values, 1), dtype, 1)[:, 0]]
    elif count > 1:
        values = list(_parts_of(values[0], part, count).T)
    for register, value in zip(target, values, strict=True):
        program.write(register, value, mask)


def _registers(operand: str) -> list[str]:
    return [register.strip() for register in operand.strip("{} ").split(",")]


def _bfloat16(bits: Array) -> Array:
    """Bits of fp32 rounded to those of bf16, the nearest one, of two the even one."""
    wide = bits.astype(np.uint64)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def _convert(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    to, source = parts[-2:]
    if to == "bf16":
        value = _bfloat16(program.read(operands[1], np.uint32))
    elif to == "bf16x2":
        high, low = (_bfloat16(program.read(operand, np.uint32)) for operand in operands[1:])
        value = _parts_of(np.stack([low, high], 1), np.uint32, 1)[:, 0]
    elif source == "bf16":
        bits = program.read(operands[1], np.uint16).astype(np.uint32) << 16
        value = bits.view(np.float32)
    else:
        value = program.read(operands[1], _type(source))
        for name in set(parts) & set(ROUND):
            value = ROUND[name](value)
        with np.errstate(all="ignore"):
            value = value.astype(_type(to))
        if to in {"s8", "u8"}:
            value = value.astype(np.int16)
    program.write(operands[0], value, mask)


def _shuffle(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    assert operands[3] == "31", "lanes are those of a whole warp"
    lane = program.read(operands[2], np.uint32).astype(np.int64)
    other = {"bfly": program.thread ^ lane, "idx": program.thread // 32 * 32 + lane % 32}[parts[2]]
    program.write(operands[0], program.read(operands[1], np.uint32)[other], mask)


def _reduce_warp(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    do = WARP[parts[2]]
    value = program.read(operands[1], _type(parts[-1])).reshape(-1, 32)
    program.write(operands[0], np.repeat(do(value, axis=1).astype(value.dtype), 32), mask)


def _load(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    dtype = _type(parts[-1])
    if parts[1] == "param":
        value = np.asarray(program.parameters[operands[1].strip("[]")]).astype(dtype)
        return program.write(operands[0], np.broadcast_to(value, mask.shape), mask)
    registers, size = _registers(operands[0]), np.dtype(dtype).itemsize
    whole = size * len(registers)
    source, place = program.place(operands[1], parts[1], whole, mask, store=False)
    loaded = source[place[:, None] + np.arange(whole)]
    for i, register in enumerate(registers):
        value = _parts_of(loaded[:, i * size : (i + 1) * size], dtype, 1)[:, 0]
        program.write(register, value, mask)
    return None


def _store(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    dtype = _type(parts[-1])
    values = [program.read(register, dtype) for register in _registers(operands[1])]
    raw = _parts_of(np.stack(values, 1), np.uint8, len(values) * np.dtype(dtype).itemsize)
    target, place = program.place(operands[0], parts[1], raw.shape[1], mask, store=True)
    target[place[mask, None] + np.arange(raw.shape[1])] = raw[mask]


def _depend(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    if parts[1] == "wait":
        program.early = False
    else:
        program.let_next_begin_early |= program.early


def _wait_for_threads(program: Program, parts: Parts, operands: Parts, mask: Array) -> None:
    """Threads are in step."""
    assert mask.all()


ELEMENTWISE: Mapping[str, Do] = {
    "abs": np.abs, "add": np.add, "and": np.bitwise_and, "div": np.divide, "ex2": np.exp2,
    "fma": _fused, "max": np.fmax, "min": np.fmin, "neg": np.negative, "not": np.invert,
    "or": np.bitwise_or, "rcp": np.reciprocal, "sub": np.subtract, "xor": np.bitwise_xor,
}  # fmt: skip

INSTRUCTIONS: Mapping[str, Callable[[Program, Parts, Parts, Array], None]] = {
    **{name: partial(_elementwise, do) for name, do in ELEMENTWISE.items()},
    "bar": _wait_for_threads,
    "bfe": _extract_bits,
    "cvt": _convert,
    "dp4a": _dp4a,
    "griddepcontrol": _depend,
    "ld": _load,
    "mad": _product,
    "mov": _move,
    "mul": _product,
    "popc": _count_ones,
    "prmt": _permute_bytes,
    "redux": _reduce_warp,
    "selp": _select,
    "setp": _compare,
    "shfl": _shuffle,
    "shl": partial(_shift, np.left_shift),
    "shr": partial(_shift, np.right_shift),
    "st": _store,
}
"""Name, without types -> what it does to a program."""
