# SPDX-License-Identifier: Apache-2.0
"""What machine code says about a kernel: registers, spills, tensor cores, and what its main loop is made of.

NVIDIA's is read from a cubin with the `cuobjdump` that Triton brings; AMD's is the assembly text that Triton keeps.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import triton

KINDS: dict[str, str] = {
    # What an instruction's first word begins with, and the pipe that it is counted for. The first that fits counts.
    r"HGMMA|HMMA|IMMA|QMMA|QGMMA|IGMMA|OMMA|UTC\w*MMA|DMMA": "matrix",
    r"v_mfma|v_smfmac": "matrix",
    r"MUFU|v_exp|v_log|v_rcp|v_sqrt": "special",
    r"STL|LDL|scratch_": "spill",
    r"UTMA|UBLKCP": "bulk copy",
    r"LDTM|STTM|UTCCP": "tensor memory",
    r"LDGSTS|LDG|STG|LD$|ST$|RED|ATOMG?|global_|buffer_|flat_": "global",
    r"LDS|STS|LDSM|STSM|ATOMS|ds_": "shared",
    r"BAR|SYNCS|WARPSYNC|WARPGROUP|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|UTCBAR|ERRBAR|CCTL|s_barrier|s_waitcnt": "waiting",
    r"FADD|FMUL|FFMA|HADD|HMUL|HFMA|v_(?:pk_)?(?:add|sub|mul|fma|mac|fmac)\w*_(?:f32|f16|bf16)": "float",
    r"FMNMX|FSEL|FSETP|FSET|FCHK|HSETP|HMNMX|v_(?:max|min|cmp|cndmask)\w*": "compare",
    r"F2F|F2I|I2F|F2FP|I2FP|FRND|v_cvt": "convert",
    r"BRA|EXIT|BSSY|BSYNC|CALL|RET|JMP|BREAK|s_cbranch|s_branch|s_endpgm|NOP|s_nop|YIELD|NANOSLEEP": "control",
    r"SHFL|REDUX|VOTE|MATCH": "exchange",
    r"S2R|S2UR|CS2R|LDC|LDCU|ULDC|s_load|R2UR|s_": "uniform",
    r"U[A-Z]": "uniform",
}
"""Everything else counts as "integer"."""

_FIRST = [(re.compile(rf"(?:{pattern})"), kind) for pattern, kind in KINDS.items()]
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


class Instruction(NamedTuple):
    """One instruction: its address, its name with modifiers, and its operands as text."""

    address: int
    name: str
    operands: str

    @property
    def kind(self) -> str:
        """What it is counted as."""
        return kind_of(self.name)


def kind_of(name: str) -> str:
    """The kind of an instruction, by its name."""
    return next((kind for pattern, kind in _FIRST if pattern.match(name)), "integer")


@dataclass(frozen=True)
class Loop:
    """The loop over key (or row) tiles whose code has no masks, as one warp runs it.

    Attributes:
        counts: instructions by kind.
        matrix: names of the matrix instructions, with their numbers.
        in_flight: how many exponentials are computed while a matrix instruction may still run; None where the code does
            not tell (instructions that the hardware orders by itself).
        waits: how often it waits for matrix instructions; as often as it has them where the assembler lets only one run
            at a time. None as for `in_flight`.
        shared_bytes: bytes that a warp reads from shared memory or writes to it, as far as the code tells.
        nested: whether there are loops within, whose instructions are counted once.
    """

    counts: dict[str, int]
    matrix: dict[str, int]
    in_flight: int | None
    waits: int | None
    shared_bytes: float
    nested: bool

    @property
    def instructions(self) -> int:
        """How many there are."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class MachineCode:
    """What a kernel's code says.

    Attributes:
        registers: per thread.
        spills: NVIDIA: instructions that read or write local memory; AMD: spilled registers.
        counts: all instructions by kind.
        matrix: names of all matrix instructions, with their numbers.
        bulk_copies: TMA instructions.
        loop: the main loop, or None where no loop has matrix instructions or exponentials.
    """

    registers: int
    spills: int
    counts: dict[str, int]
    matrix: dict[str, int]
    bulk_copies: int
    loop: Loop | None


def read_cubin(cubin: bytes) -> MachineCode:
    """Read NVIDIA's machine code.

    Raises:
        RuntimeError: the tool is not where Triton keeps it, or prints something else than expected.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        raise RuntimeError(f"reading a cubin needs {tool}, which is not there; reinstall triton from its wheel")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
        code = subprocess.run([tool, "--dump-sass", file], capture_output=True, text=True, check=True)
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    if registers is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no register count: {usage.stdout[:200]!r}")
    return read_sass(code.stdout, int(registers.group(1)))


def read_sass(text: str, registers: int) -> MachineCode:
    """Read disassembled code of one kernel.

    Raises:
        RuntimeError: there is no instruction in it.
    """
    code = [Instruction(int(address, 16), name, rest) for address, name, rest in _LINE.findall(text)]
    if not code:
        raise RuntimeError(f"cuobjdump --dump-sass printed no instruction: {text[:200]!r}")
    counts = Counter(each.kind for each in code)
    return MachineCode(
        registers, counts["spill"], dict(counts), _matrix(code), counts["bulk copy"], main_loop(code)
    )  # fmt: skip


def read_amd(assembly: str) -> MachineCode:
    """Read AMD's assembly. Its loops are not looked at."""
    names = re.findall(r"^\s+([vs]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+|scratch_\w+)", assembly, re.MULTILINE)
    code = [Instruction(index, name, "") for index, name in enumerate(names)]
    spills = sum(int(number) for number in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly))
    registers = max((int(number) for number in re.findall(r"\.vgpr_count:\s*(\d+)", assembly)), default=0)
    return MachineCode(registers, spills, dict(Counter(each.kind for each in code)), _matrix(code), 0, None)


def main_loop(code: Sequence[Instruction]) -> Loop | None:
    """The loop that does the work: of those with both products and exponentials the one of the unmasked body.

    A loop is what lies between a branch backwards and its target. Masks add instructions and narrow steps have fewer
    products, so the body is the loop with the fewest instructions per product. Masks that a branch jumps over do not
    count.
    """
    spans = _loops(code)
    candidates = []
    for first, last in spans:
        part = without_detours(code[first : last + 1])
        kinds = Counter(each.kind for each in part)
        # Exact float32 products are fused multiply-adds on the ordinary units.
        products = sum(_volume(each.name) for each in part)
        products = products or sum(each.name.startswith("FFMA") for each in part)
        if products and any(each.name.startswith("MUFU.EX2") for each in part):
            inner = any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans)
            candidates.append((len(part) / products, len(part), kinds, part, inner))
    if not candidates:
        return None
    _, _, kinds, part, inner = min(candidates, key=lambda candidate: candidate[:2])
    return Loop(dict(kinds), _matrix(part), in_flight(part), _waits(part), sum(map(shared_bytes, part)), inner)


def without_detours(loop: Sequence[Instruction]) -> Sequence[Instruction]:
    """A loop but for what a branch jumps over that holds neither products nor exponentials: masks, mostly."""
    skipped: set[int] = set()
    for each in loop:
        target = re.search(r"0x([0-9a-f]+)\s*$", each.operands) if each.name.split(".")[0] == "BRA" else None
        place = int(target.group(1), 16) if target else 0
        if each.address < place <= loop[-1].address:
            between = [one for one in loop if each.address < one.address < place]
            if not any(one.kind in ("matrix", "special") for one in between):
                skipped |= {one.address for one in between}
    return [each for each in loop if each.address not in skipped]


def _loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last index of each loop that ends in a branch backwards, but not to itself."""
    places = {each.address: index for index, each in enumerate(code)}
    found: dict[int, int] = {}
    for index, each in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", each.operands) if each.name.split(".")[0] == "BRA" else None
        first = places.get(int(target.group(1), 16)) if target else None
        if first is not None and first < index:
            found[first] = max(index, found.get(first, 0))  # several branches to one head are one loop
    return list(found.items())


def in_flight(loop: Sequence[Instruction]) -> int | None:
    """How many exponentials are computed while an asynchronous matrix instruction is unfinished.

    Of Hopper's code only: `HGMMA` starts one, `WARPGROUP.DEPBAR` waits until at most a given number are unfinished.
    """
    if not any(each.name.startswith("HGMMA") for each in loop):
        return None
    pending, groups, found = False, 0, 0
    for turn, each in [*((0, each) for each in loop), *((1, each) for each in loop)]:
        # Twice round, since what one turn starts the next may wait for; the second counts.
        if each.name.startswith("HGMMA"):
            pending, groups = True, groups + ("gsb0" in each.operands)
        elif each.name.startswith("WARPGROUP.DEPBAR"):
            limit = re.search(r"0x([0-9a-f]+)\s*$", each.operands)
            groups = min(groups, int(limit.group(1), 16) if limit else 0)
            pending = groups > 0
        elif each.name.startswith("MUFU.EX2") and pending:
            found += turn
    return found


def _waits(loop: Sequence[Instruction]) -> int | None:
    if not any(each.name.startswith("HGMMA") for each in loop):
        return None
    return sum(each.name.startswith("WARPGROUP.DEPBAR") for each in loop)


def shared_bytes(each: Instruction) -> float:
    """Bytes of shared memory that an instruction of one warp reads or writes.

    A Hopper matrix instruction reads its right operand from there, and its left one too unless it is in registers: 32
    bytes of each of their rows, a quarter of which counts for each warp of the group. What a bulk copy moves is not
    in the code.
    """
    if each.name.startswith("HGMMA"):
        shape = re.match(r"HGMMA\.(\d+)x(\d+)x", each.name)
        assert shape is not None
        rows, columns = int(shape.group(1)), int(shape.group(2))
        # Operands are the result, the left factor if it is in registers, and the descriptors of what is not.
        left = re.match(r"R\w+,\s*gdesc", each.operands) is not None
        return 32 * (columns + rows * left) / 4
    if each.kind != "shared" and not each.name.startswith("LDGSTS"):
        return 0
    words = each.name.split(".")
    if words[0] in ("LDSM", "STSM"):  # matrices of 8 x 8 numbers of 16 bits
        return 128 * int(words[-1]) if words[-1].isdigit() else 128
    return 32 * (16 if "128" in words else 8 if "64" in words else 4)


def _volume(name: str) -> int:
    """What a matrix instruction counts for: its multiply-adds where the name tells its shape, in 128ths; else 1000."""
    if kind_of(name) != "matrix":
        return 0
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", name)
    return int(shape.group(1)) * int(shape.group(2)) * int(shape.group(3)) // 128 if shape else 1000


def _matrix(code: Sequence[Instruction]) -> dict[str, int]:
    return dict(Counter(each.name for each in code if each.kind == "matrix"))
