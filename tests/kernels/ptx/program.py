# SPDX-License-Identifier: Apache-2.0
"""PTX, the text that Triton hands to NVIDIA's assembler, taken apart into instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

WIDTHS = {"pred": 1, **{f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)}}
WIDTHS |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "f16x2": 32, "bf16x2": 32, "f32x2": 64}
"""Bits of each type."""

_DECLARED = {"%p": "pred", "%rs": "b16", "%r": "b32", "%rd": "b64", "%f": "f32", "%fd": "f64"}


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        name: the opcode's parts, `("add", "s32")`.
        operands: as written; names of inner scopes made unique.
        predicate: the register that says for which threads it happens, and whether it says for which it does not.
    """

    name: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: tuple[str, bool] | None

    def __str__(self) -> str:
        return f"{'.'.join(self.name)} {', '.join(self.operands)}"


class Program(NamedTuple):
    """One kernel.

    Attributes:
        name: of the kernel.
        parameters: of each its name, its bits, and whether it is a tensor map.
        instructions: in order.
        labels: which instruction each label stands before.
        tables: labels among which `brx.idx` chooses.
        registers: bits of each register that an inner scope declares.
        threads: of a program.
    """

    name: str
    parameters: list[tuple[str, int, bool]]
    instructions: list[Instruction]
    labels: dict[str, int]
    tables: dict[str, list[str]]
    registers: dict[str, int]
    threads: int

    def bits_of(self, register: str) -> int:
        """Bits of a register; 1 of a predicate."""
        if (bits := self.registers.get(register)) is not None:
            return bits
        return WIDTHS[_DECLARED[register.rstrip("0123456789")]]


def parse(text: str) -> Program:
    """The one kernel of a PTX module."""
    name, parameters, threads, body = _entry(text)
    program = Program(name, parameters, [], {}, {}, {}, threads)
    statements = list(_statements(body))
    inner = _names_of_scopes(statements)
    scopes: list[dict[str, str]] = [{}]
    for place, statement in enumerate(statements):
        if statement == "{":
            scopes.append(inner[place])
        elif statement == "}":
            scopes.pop()
        elif declared := _DECLARATION.fullmatch(statement):
            for each in scopes[-1].keys() & _declared(declared[2]):  # those of the kernel tell their type by name
                program.registers[scopes[-1][each]] = WIDTHS[declared[1]]
        elif statement.endswith(":"):
            program.labels[_renamed(statement[:-1], scopes)] = len(program.instructions)
        elif table := re.fullmatch(r"(\S+):\s*\.branchtargets(.*)", statement, re.DOTALL):
            program.tables[table[1]] = [each.strip() for each in table[2].split(",")]
        elif not statement.startswith("."):
            program.instructions.append(_instruction(statement, scopes))
    return program


_DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)


def _declared(names: str) -> set[str]:
    """Registers of a declaration: of `a, b<3>` a, b0, b1 and b2."""
    declared = set()
    for each in names.split(","):
        name, _, count = each.strip().rstrip(">").partition("<")
        declared |= {f"{name}{number}" for number in range(int(count))} if count else {name}
    return declared


def _names_of_scopes(statements: list[str]) -> dict[int, dict[str, str]]:
    """What each inner scope, known by where it begins, calls its own; and a name for each that no other scope has."""
    scopes: dict[int, dict[str, str]] = {}
    within: list[int] = []
    for place, statement in enumerate(statements):
        if statement == "{":
            within.append(place)
            scopes[place] = {}
        elif statement == "}":
            within.pop()
        elif within:
            names = {statement[:-1]} if statement.endswith(":") else set()
            if declared := _DECLARATION.fullmatch(statement):
                names = _declared(declared[2])
            scopes[within[-1]] |= {each: f"{each}@{within[-1]}" for each in names}
    return scopes


def _entry(text: str) -> tuple[str, list[tuple[str, int, bool]], int, str]:
    text = re.sub(r"//[^\n]*", "", text)
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith((".loc", ".file")))
    head = re.search(r"\.entry\s+(\w+)\((.*?)\)(.*?)\{", text, re.DOTALL)
    assert head and len(re.findall(r"\.entry", text)) == 1, "a module of one kernel"
    parameters = []
    for each in head[2].split(","):
        if declared := re.search(r"\.param\s+\.(\w+)\s.*?(\w+)(?:\[(\d+)\])?\s*$", each.strip(), re.DOTALL):
            kind, name, size = declared.groups()
            parameters.append((name, 128 * 8 if size else WIDTHS[kind], size is not None))
    threads = int(re.search(r"\.reqntid\s+(\d+)", head[3])[1])
    rest = text[head.end() :]
    depth = 1
    for at, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if not depth:
            return head[1], parameters, threads, rest[:at]
    raise ValueError("the kernel does not end")


def _statements(body: str) -> Iterator[str]:
    """Statements, labels, and braces that begin and end a scope."""
    at = 0
    token = re.compile(r"\s*(?:([{}])|([\w$.]+:(?!:)(?!\s*\.branchtargets))|([^;]*);)", re.DOTALL)
    while found := token.match(body, at):
        at = found.end()
        brace, label, statement = found.groups()
        if brace or label:
            yield brace or label
        elif statement.strip():
            yield statement.strip()
    assert not body[at:].strip(), body[at : at + 80]


def _instruction(statement: str, scopes: list[dict[str, str]]) -> Instruction:
    predicate = None
    if statement.startswith("@"):
        guard, statement = statement.split(None, 1)
        predicate = _renamed(guard.lstrip("@!"), scopes), guard[1] == "!"
    opcode, _, rest = re.sub(r"\s+", " ", statement).partition(" ")
    return Instruction(
        tuple(opcode.split(".")), tuple(_renamed(each, scopes) for each in split_operands(rest)), predicate
    )


def split_operands(text: str) -> list[str]:
    """At commas that are inside no braces and brackets."""
    operands, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            operands.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*operands, last] if last else operands


def _renamed(operand: str, scopes: list[dict[str, str]]) -> str:
    for scope in reversed(scopes):
        for name, unique in scope.items():
            operand = re.sub(rf"(?<![\w%$]){re.escape(name)}(?![\w@])", unique, operand)
    return operand
