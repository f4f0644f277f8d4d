"""Reading PTX, the assembly that Triton compiles kernels to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COMMENT = re.compile(r"//.*")
LABEL = re.compile(r"(\$?\w[\w$]*):\s*")
TARGETS = re.compile(r"\.branchtargets[^;]*;")
STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)$", re.DOTALL)
PARAMETER = re.compile(r"\.param [^,)]*?(\w+_param_\d+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction, done by the threads whose ``guard`` is not ``negated``.

    Attributes
    ----------
    name : as written, e.g. ``ld.global.v4.b32``; ``parts`` are what its points divide.
    operands : the result first; what braces or brackets hold together is one.
    """

    guard: str
    negated: bool
    name: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """A kernel: instructions, label -> the number of the one behind it, the labels of each list of
    branch targets, and the names of parameters in their order."""

    instructions: Sequence[Instruction]
    labels: Mapping[str, int]
    targets: Mapping[str, Sequence[str]]
    parameters: Sequence[str]


def parse(ptx: str) -> Code:
    """The only kernel in the text."""
    entry = ptx.index(".entry")
    body = COMMENT.sub("", ptx[ptx.index("\n{", entry) + 2 :])
    body = TARGETS.sub(lambda found: " ".join(found[0].split()), body)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    targets: dict[str, list[str]] = {}
    for statement in re.split(r"[;\n]", body):
        line = statement.strip()
        while label := LABEL.match(line):
            line = line[label.end() :]
            labels[label[1]] = len(instructions)
            if line.startswith(".branchtargets"):
                targets[label[1]] = re.findall(r"\$\w+", line)
        if line and line[0] not in ".{}":
            instructions.append(_instruction(line))
    return Code(instructions, labels, targets, PARAMETER.findall(ptx, entry))


def _instruction(line: str) -> Instruction:
    found = STATEMENT.match(line)
    if found is None:
        raise ValueError(f"no PTX instruction: {line}")
    negated, guard, name, operands = found.groups()
    return Instruction(
        guard or "", bool(negated), name, tuple(name.split(".")), tuple(_operands(operands))
    )


def _operands(text: str) -> list[str]:
    """What commas divide, outside braces and brackets."""
    found = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [operand.strip() for operand in found if operand.strip()]
