"""Runs what Triton compiled without a GPU: programs one after the other, their threads in step.

Unlike the interpreter this has the compiled code itself: inline assembly, the places of values in
threads, and what is aligned. It knows the instructions of :mod:`ptx_instructions`, and fails where
threads of a program part ways, where an address is misaligned or belongs to nothing, and where a
kernel that may begin early reads what the one before it writes, or writes, before it has waited, or
ends without having done so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_code import Code, Instruction, parse
from ptx_instructions import INSTRUCTIONS

Array = NDArray[Any]

UNSET = np.uint64(0x5A5A5A5A5A5A5A5A)
"""What a register holds that was not written: code may move it beside what it needs."""

SHARED = "global_smem"
BRANCHES = {"bra", "brx", "ret"}
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
REGISTERS = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64}
TYPES: dict[str, Any] = {
    **{f"{kind}{bits}": RAW[bits // 8] for kind in "bu" for bits in (8, 16, 32, 64)},
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "pred": np.bool_,
}  # fmt: skip


class Memory:
    """The device's memory: that of the arrays which a kernel is given.

    Attributes
    ----------
    late : first and last address of what the kernels before write that have not ended when this one
        begins.
    written : the same of what this one has written.
    """

    def __init__(self) -> None:
        self.late: list[tuple[int, int]] = []
        self.written: set[tuple[int, int]] = set()
        self._arrays: list[tuple[int, Array]] = []

    def hold(self, arrays: Iterable[Array]) -> None:
        """Have these arrays of bytes, and no others, in memory."""
        self._arrays = [(array.ctypes.data, array) for array in arrays]

    def find(self, address: Array, size: int) -> tuple[int, Array]:
        """Start and bytes of the array that holds ``size`` bytes at each address."""
        for start, array in self._arrays:
            if start <= address.min() and address.max() + size <= start + len(array):
                return start, array
        raise AssertionError("an address belongs to nothing")

    def is_late(self, address: Array) -> bool:
        return any(((first <= address) & (address <= last)).any() for first, last in self.late)


class Program:
    """One program of a launch: its registers, a value for each thread, and shared memory."""

    def __init__(
        self,
        memory: Memory,
        parameters: Mapping[str, int],
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
        threads: int,
        early: bool,
    ) -> None:
        self.memory, self.parameters, self.early = memory, parameters, early
        self.let_next_begin_early = False
        self.shared = np.zeros(1 << 16, np.uint8)
        self.thread = np.arange(threads)
        self._registers: dict[str, Array] = {}
        self._special: dict[str, Any] = {"%tid.x": self.thread, "%ntid.x": threads}
        for axis, own, count in zip("xyz", place, grid, strict=True):
            self._special |= {f"%ctaid.{axis}": own, f"%nctaid.{axis}": count}

    def run(self, code: Code) -> None:
        at = 0
        while at < len(code.instructions):
            instruction = code.instructions[at]
            mask = self._mask(instruction)
            at += 1
            if instruction.parts[0] not in BRANCHES:
                _known(instruction)(self, instruction.parts, instruction.operands, mask)
            elif mask.any():
                assert mask.all(), f"threads part at {instruction}"
                at = self._target(instruction, code)

    def _mask(self, instruction: Instruction) -> Array:
        """Which threads do it."""
        if not instruction.guard:
            return np.ones(len(self.thread), np.bool_)
        return self._registers[instruction.guard] ^ instruction.negated

    def _target(self, instruction: Instruction, code: Code) -> int:
        """The number of the instruction that a branch goes to."""
        if instruction.parts[0] == "ret":
            return len(code.instructions)
        label = instruction.operands[0]
        if instruction.parts[0] == "brx":
            index = self.read(label, np.uint32)
            assert (index == index[0]).all(), f"threads part at {instruction}"
            label = code.targets[instruction.operands[1]][index[0]]
        return code.labels[label]

    def read(self, operand: str, dtype: Any) -> Array:
        """An operand's bits as numbers of a type, [threads]; of a wider register the lowest."""
        size = np.dtype(dtype).itemsize
        if operand.rstrip("0123456789") in REGISTERS:
            value = self._registers.get(operand, np.full(self.thread.shape, UNSET))
            if dtype is np.bool_:
                return value.astype(dtype)
            return value.astype(RAW[size]).view(dtype)
        if operand.startswith("0f"):
            value = np.uint32(int(operand[2:], 16)).view(dtype)
        else:
            number = self._special.get(operand, 0 if operand == SHARED else None)
            number = int(operand.rstrip("U"), 0) if number is None else number
            value = np.asarray(number % (1 << 8 * size)).astype(RAW[size]).view(dtype)
        return np.broadcast_to(value, self.thread.shape)

    def write(self, register: str, value: Array, mask: Array) -> None:
        """Set a register's lowest bits where ``mask``; the rest of a wider one become 0. ``_`` is
        none."""
        if register == "_":
            return
        dtype = REGISTERS[register.rstrip("0123456789")]
        if dtype is not np.bool_:
            value = np.ascontiguousarray(value).view(RAW[value.dtype.itemsize])
        old = self._registers.get(register, np.zeros(len(self.thread), dtype))
        self._registers[register] = np.where(mask, value, old).astype(dtype)

    def addresses(self, operand: str) -> Array:
        """int64 [threads] of an operand in brackets."""
        register, _, offset = operand.strip("[] ").partition("+")
        start = self.read(register.strip(), np.uint64).astype(np.int64)
        return start + int(offset.strip() or "0", 0)

    def place(
        self, operand: str, space: str, size: int, mask: Array, *, store: bool
    ) -> tuple[Array, Array]:
        """The bytes of a space, and where in them threads find ``size``; int64 [threads].

        Where ``mask`` is not set, they find any.
        """
        address = self.addresses(operand)
        used = address[mask]
        assert not (used % size).any(), f"{operand} is no multiple of {size} bytes"
        if space == "shared":
            return self.shared, np.where(mask, address, 0)
        if not len(used):
            return np.zeros(size, np.uint8), np.zeros_like(address)
        start, array = self.memory.find(used, size)
        if store:
            assert not self.early, f"{operand} is written before the kernel before has ended"
            self.memory.written.add((start, start + len(array) - 1))
        elif self.early:
            assert not self.memory.is_late(used), f"{operand} is read before it is written"
        return array, np.where(mask, address - start, 0)


def _known(instruction: Instruction) -> Any:
    if instruction.parts[0] not in INSTRUCTIONS:
        raise NotImplementedError(f"ptx_instructions.py lacks {instruction.name}")
    return INSTRUCTIONS[instruction.parts[0]]


def launch(
    ptx: str,
    memory: Memory,
    arguments: Sequence[int],
    grid: tuple[int, int, int],
    warps: int,
    *,
    early: bool = False,
) -> None:
    """Run a kernel; with ``early`` it begins before the kernel before it has ended.

    What it writes is late for the next one, and with it all that was late for this one, if the next
    one can begin before this one has waited. Scratch that triton asks for behind the arguments is
    none.
    """
    code = parse(ptx)
    values = [*arguments, *[0] * (len(code.parameters) - len(arguments))]
    parameters = dict(zip(code.parameters, values, strict=True))
    programs = [
        Program(memory, parameters, (x, y, z), grid, 32 * warps, early)
        for z, y, x in np.ndindex(*reversed(grid))
    ]
    memory.written = set()
    for program in programs:
        program.run(code)
        # What waits for this kernel counts on all before it, too.
        assert not program.early, "a program ended that has not waited"
    passed_on = memory.late if all(p.let_next_begin_early for p in programs) else []
    memory.late = [*passed_on, *memory.written]
