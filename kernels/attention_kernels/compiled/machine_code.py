# SPDX-License-Identifier: Apache-2.0
"""What the inner loop of a compiled kernel is made of, read from its machine code.

The inner loop is the one that a call spends its time in: of the loops that hold no other, that with the most
exponentials, and then with the most matrix products. The loop that looks for NaN has fewer of both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

KINDS: dict[str, tuple[str, ...]] = {
    "matrix": ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "QGMMA", "v_mfma"),
    "exponential": ("MUFU", "v_exp", "v_log", "v_rcp"),
    "float32": ("FFMA", "FADD", "FMUL", "FMNMX", "FSETP", "FSEL", "F2FP", "F2F", "FCHK", "v_fma", "v_pk", "v_add_f",
                "v_mul_f", "v_max", "v_sub_f", "v_cvt", "v_mac", "v_fmac"),
    "shared memory": ("LDS", "STS", "LDSM", "STSM", "ATOMS", "LDT", "STT", "LDTM", "STTM", "UTCCP", "ds_"),
    "asynchronous copy": ("UTMALDG", "LDGSTS", "UBLKCP"),
    "global memory": ("LDG", "STG", "LD.", "ST.", "global_", "buffer_"),
    "local memory": ("LDL", "STL", "scratch_"),
    "shuffle": ("SHFL", "v_permlane", "v_mov_b32_dpp", "REDUX"),
    "barrier": ("BAR", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "SYNCS", "UTCBAR", "FENCE", "s_barrier",
                "s_waitcnt"),
    "branch": ("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "s_cbranch", "s_branch"),
}  # fmt: skip
"""Kinds of instruction by the beginnings of their names; all others are "integer and moves"."""

OTHER = "integer and moves"

SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
AMD_LINE = re.compile(r"^\s+([a-z]\w+)\s*(.*)$")
AMD_LABEL = re.compile(r"^(\.?L?BB\w+):")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its place, its name with all modifiers, and its operands as text."""

    place: int
    name: str
    operands: str

    @property
    def kind(self) -> str:
        """One of `KINDS`, or `OTHER`."""
        for kind, beginnings in KINDS.items():
            if self.name.startswith(beginnings):
                return kind
        return OTHER


@dataclass(frozen=True)
class Loop:
    """The inner loop of a kernel.

    Attributes:
        instructions: in their order.
        counts: number of instructions by kind.
        in_flight: whether exponentials are computed while a matrix product is under way, None where products are not
            asynchronous and the question does not arise.
    """

    instructions: Sequence[Instruction]
    counts: dict[str, int]
    in_flight: bool | None

    def matrix_names(self) -> dict[str, int]:
        """How often each matrix instruction occurs, by its name with its shape."""
        return dict(Counter(each.name for each in self.instructions if each.kind == "matrix"))


def parse(code: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """Instructions, and the first and last place of every loop: from a branch's target back to the branch."""
    return _parse_amd(code) if ".amdgcn_target" in code or "s_endpgm" in code else _parse_sass(code)


def _parse_sass(code: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    instructions = [
        Instruction(int(match[1], 16), match[2], match[3].strip()) for match in map(SASS_LINE.search, code.splitlines())
        if match is not None
    ]  # fmt: skip
    loops = []
    for each in instructions:
        target = re.search(r"0x([0-9a-f]+)", each.operands) if each.name.startswith("BRA") else None
        # The last instruction of all branches to itself.
        if target is not None and int(target[1], 16) < each.place:
            loops.append((int(target[1], 16), each.place))
    return instructions, loops


def _parse_amd(code: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    loops = []
    for line in code.splitlines():
        if (label := AMD_LABEL.match(line)) is not None:
            labels[label[1]] = len(instructions)
        elif (match := AMD_LINE.match(line)) is not None:
            place = len(instructions)
            instructions.append(Instruction(place, match[1], match[2]))
            target = match[2].split(";")[0].strip()
            if match[1].startswith(("s_cbranch", "s_branch")) and target in labels:
                loops.append((labels[target], place))
    return instructions, loops


def inner_loop(code: str) -> Loop | None:
    """The loop that a call spends its time in, or None where there is none."""
    instructions, loops = parse(code)
    innermost = [
        (first, last) for first, last in loops
        if not any(first <= low and high <= last and (low, high) != (first, last) for low, high in loops)
    ]  # fmt: skip
    bodies = [[each for each in instructions if first <= each.place <= last] for first, last in innermost]
    if not bodies:
        return None

    def work(body: Sequence[Instruction]) -> tuple[int, ...]:
        return tuple(sum(each.kind == kind for each in body) for kind in ("exponential", "matrix", "float32"))

    body = without_detours(max(bodies, key=work))
    return Loop(body, dict(Counter(each.kind for each in body)), exponentials_overlap(body))


def without_detours(body: Sequence[Instruction]) -> list[Instruction]:
    """The loop's instructions but for those that a branch jumps over and that hold no product and no exponential.

    Such is the mask, which most tiles do not take.
    """
    skipped: set[int] = set()
    for each in body:
        target = re.search(r"0x([0-9a-f]+)", each.operands) if each.name.startswith("BRA") else None
        if target is not None and each.place < (place := int(target[1], 16)) <= body[-1].place:
            between = [one for one in body if each.place < one.place < place]
            if not any(one.kind in ("matrix", "exponential") for one in between):
                skipped |= {one.place for one in between}
    return [each for each in body if each.place not in skipped]


def exponentials_overlap(body: Sequence[Instruction]) -> bool | None:
    """Whether an exponential comes between the issue of a matrix product and the wait for it."""
    if not any(each.name.startswith(("HGMMA", "QGMMA")) for each in body):
        return None
    under_way = False
    for each in (*body, *body):  # what is under way at the end of the loop is so at its beginning
        if each.name.startswith(("HGMMA", "QGMMA")):
            under_way = True
        elif each.name.startswith("WARPGROUP.DEPBAR") and waits_for_all(each):
            under_way = False
        elif each.kind == "exponential" and under_way:
            return True
    return False


def waits_for_all(barrier: Instruction) -> bool:
    """Whether a barrier lets no product stay under way: `WARPGROUP.DEPBAR.LE gsb0, 0x0`."""
    left = re.search(r"0x([0-9a-f]+)", barrier.operands)
    return left is None or int(left[1], 16) == 0
