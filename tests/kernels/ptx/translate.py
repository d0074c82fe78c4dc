# SPDX-License-Identifier: Apache-2.0
"""Instructions as Python source: a function for all that follow each other without a choice between."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from . import arithmetic
from .arithmetic import NUMPY, UNSIGNED
from .program import WIDTHS, Instruction, Program, split_operands

ENDS = {"bra", "brx", "ret", "exit", "bar", "barrier", "trap"}
"""Instructions after which other threads may be elsewhere."""

SPECIAL = {"%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z"}
SPECIAL |= {"%ntid.x", "%laneid", "%warpid", "%clusterid.x", "%cluster_ctarank"}

PAIRS = {
    "bf16x2": ("bfloat16_to_float({})", "float_to_bfloat16({})"),
    "f16x2": ("({}).view(F2)", "np.asarray({}, F2).view(U2)"),
    "f32x2": ("({}).view(F4)", "np.asarray({}, F4).view(U4)"),
}
"""Of types that hold two numbers, source of a half as a number, and of a number as a half."""

_FORMULAS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}",
    "neg": "-{0}", "abs": "np.abs({0})", "copysign": "np.copysign({1}, {0})", "ex2": "exp2({0})", "lg2": "np.log2({0})",
    "rcp": "F4(1) / {0}", "sqrt": "np.sqrt({0})", "rsqrt": "F4(1) / np.sqrt({0})",
}  # fmt: skip


UNKNOWN = {"rz", "rm", "rp", "sat", "xorsign"}
"""Words of an opcode that change what it computes, and are not known: other roundings, and limits of results."""


def type_of(name: tuple[str, ...]) -> str:
    """The last type that an opcode names."""
    return next(part for part in reversed(name) if part in WIDTHS)


class Translator:
    """Of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants: dict[str, np.generic] = {}

    def block(self, instructions: list[Instruction]) -> Callable:
        """What these instructions do to the registers `r` of a group of threads `g`."""
        lines = ["def block(r, g):", "    pass"]
        for each in instructions:
            lines += [f"    {line}" for line in self.lines(each)]
        types = {each.__name__: each for each in (*UNSIGNED.values(), *NUMPY.values())}
        namespace = vars(arithmetic) | types | {"np": np} | self.constants
        exec(compile("\n".join(lines), f"<{self.program.name}>", "exec"), namespace)
        return namespace["block"]

    # Operands

    def read(self, operand: str, kind: str) -> str:
        """Source of an operand as numbers of a type."""
        bits = WIDTHS[kind]
        if operand[0] in "-0123456789":
            return self.constant(immediate(operand, kind))
        if operand in SPECIAL:
            source, own = f"g.special({operand!r})", 32
        elif operand.startswith("%") or "@" in operand:
            source, own = f"r[{operand!r}]", self.program.bits_of(operand)
        else:
            source, own = f"g.symbol({operand!r})", 64
        if bits != own:
            source = f"{source}.astype({UNSIGNED[bits].__name__})"
        if kind == "bf16":
            return f"bfloat16_to_float({source})"
        return f"{source}.view({NUMPY[kind].__name__})" if kind in NUMPY else source

    def filled(self, operand: str, kind: str) -> str:
        """The same with a number for each thread, whatever it is."""
        return f"g.filled({self.read(operand, kind)})"

    def constant(self, value: np.generic) -> str:
        """A name for a value."""
        name = f"C_{type(value).__name__}_{value.tobytes().hex()}"
        self.constants[name] = value
        return name

    def write(self, target: str, source: str, kind: str, predicate: tuple[str, bool] | None) -> str:
        """Source of a statement that sets a register to numbers of a type."""
        if target == "_":
            return source
        bits, own = WIDTHS[kind], self.program.bits_of(target)
        if kind == "bf16":
            source = f"float_to_bfloat16({source})"
        elif kind in NUMPY:
            source = f"np.asarray({source}, {NUMPY[kind].__name__})"
            if kind[0] == "s" and bits < own:  # the register takes the sign, too
                source, bits = f"{source}.astype({NUMPY[f's{own}'].__name__})", own
            source = f"{source}.view({UNSIGNED[bits].__name__})"
        if bits != own:
            source = f"np.asarray({source}).astype({UNSIGNED[own].__name__})"
        if predicate is not None:
            return f"r[{target!r}] = np.where({self.mask(predicate)}, {source}, r[{target!r}])"
        return f"r[{target!r}] = g.filled({source})"

    def mask(self, predicate: tuple[str, bool] | None) -> str:
        """Source of which threads do it."""
        if predicate is None:
            return "None"
        name, negated = predicate
        return f"~r[{name!r}]" if negated else f"r[{name!r}]"

    def address(self, operand: str, bits: int) -> str:
        """Source of the address in `[register + offset]`."""
        inner = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        assert inner, operand
        base = self.read(inner[1], f"b{bits}")
        offset = int(inner[2], 0) if inner[2] else 0
        whole = f"{base} + {self.constant(UNSIGNED[bits](offset & (1 << bits) - 1))}" if offset else base
        return f"g.filled({whole})"

    # Instructions

    def lines(self, instruction: Instruction) -> list[str]:
        """Source of one instruction."""
        name, operands, predicate = instruction
        special = getattr(self, f"_{name[0]}", None)
        try:
            known = {"rz"} if name[:2] == ("cvt", "rz") and name[-1] == "f32" else set()
            known |= {"xorsign"} if name[0] in ("min", "max") else set()
            assert not UNKNOWN - known & {*name}, "a word that is not known"
            if special is not None:
                return special(name, operands, predicate)
            return self._plain(name, operands, predicate)
        except (KeyError, StopIteration, AssertionError, TypeError, ValueError) as error:
            raise NotImplementedError(f"{instruction}: {error!r}") from error

    def _plain(self, name, operands, predicate) -> list[str]:
        kind = type_of(name)
        if kind.endswith("x2"):
            return self._in_halves(name, operands, predicate)
        if kind in ("bf16", "f16") and "f32" in name:  # from sm_100 on a sum may take a narrow number as it is
            assert name[0] in ("add", "sub") and len(operands) == 3
            sign, given = "+-"[name[0] == "sub"], (self.read(operands[1], kind), self.read(operands[2], "f32"))
            return [self.write(operands[0], f"{given[0]} {sign} {given[1]}", "f32", predicate)]
        given = [self.read(each, kind) for each in operands[1:]]
        if name[0] in ("min", "max"):
            function = f"np.{name[0]}imum" if "NaN" in name else f"np.f{name[0]}"  # which passes over NaN
            absolute = "abs" in name
            source, *others = (f"np.abs({each})" for each in given) if absolute else given
            for each in others:  # from sm_100 on there may be three
                source = f"{function}({source}, {each})"
            if "xorsign" in name:
                assert absolute and len(given) == 2
                source = f"with_sign_of_product({source}, {given[0]}, {given[1]})"
        else:
            source = _FORMULAS[name[0]]
            assert source.count("{") == len(given)
            source = source.format(*given)
        if "relu" in name:
            assert kind == "s32"
            source = f"np.maximum({source}, 0)"
        if kind in ("f32", "f64") and "ftz" in name:
            source = f"flushed({source})"
        return [self.write(operands[0], source, kind, predicate)]

    def _in_halves(self, name, operands, predicate) -> list[str]:
        kind = type_of(name)
        to_number, to_bits = PAIRS[kind]
        formula = {"fma": "fma({0}, {1}, {2})", "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}"}
        formula |= {"max": "np.fmax({0}, {1})", "min": "np.fmin({0}, {1})", "neg": "-{0}"}
        assert not {"NaN", "relu"} & {*name} and len(operands) == 1 + formula[name[0]].count("{")
        bits = f"b{WIDTHS[kind]}"
        parts = []
        for half in (0, 1):
            given = (to_number.format(f"halves({self.read(each, bits)})[{half}]") for each in operands[1:])
            source = formula[name[0]].format(*given)
            parts.append(to_bits.format(f"flushed({source})" if "ftz" in name else source))
        return [self.write(operands[0], f"joined({parts[0]}, {parts[1]})", bits, predicate)]

    def _mul(self, name, operands, predicate, addend: str | None = None) -> list[str]:
        kind = type_of(name)
        if kind.endswith("x2"):
            return self._in_halves(name, operands, predicate)
        a, b = (self.read(each, kind) for each in operands[1:3])
        result = kind
        if "wide" in name:
            result = f"{kind[0]}{2 * WIDTHS[kind]}"
            wide = NUMPY.get(result, UNSIGNED[WIDTHS[result]]).__name__
            a, b = (f"np.asarray({each}).astype({wide})" for each in (a, b))
        elif "hi" in name:
            assert kind in ("u32", "s32")
            wide = "U8" if kind == "u32" else "I8"
            source = f"((np.asarray({a}).astype({wide}) * np.asarray({b}).astype({wide})) >> {wide}(32)).astype(U4)"
            return [self.write(operands[0], source, "b32", predicate)]
        source = f"{a} * {b}"
        if addend is not None:
            source = f"{source} + {self.read(addend, result)}"
        if "ftz" in name:
            source = f"flushed({source})"
        return [self.write(operands[0], source, result, predicate)]

    def _mad(self, name, operands, predicate) -> list[str]:
        return self._mul(name, operands[:3], predicate, operands[3])

    def _fma(self, name, operands, predicate) -> list[str]:
        kind = type_of(name)
        if kind.endswith("x2"):
            return self._in_halves(name, operands, predicate)
        source = "fma({}, {}, {})".format(*(self.read(each, kind) for each in operands[1:]))
        if "ftz" in name:
            source = f"flushed({source})"
        return [self.write(operands[0], source, kind, predicate)]

    def _shl(self, name, operands, predicate) -> list[str]:
        kind = type_of(name)
        source = f"shift_left({self.read(operands[1], kind)}, {self.read(operands[2], 'u32')})"
        return [self.write(operands[0], source, kind, predicate)]

    def _shr(self, name, operands, predicate) -> list[str]:
        kind = type_of(name)
        source = f"shift_right({self.read(operands[1], kind)}, {self.read(operands[2], 'u32')})"
        return [self.write(operands[0], source, kind, predicate)]

    def _bfe(self, name, operands, predicate) -> list[str]:
        kind = type_of(name)
        position, length = (self.read(each, "u32") for each in operands[2:])
        source = f"bit_field({self.read(operands[1], kind)}, {position}, {length})"
        return [self.write(operands[0], source, kind, predicate)]

    def _prmt(self, name, operands, predicate) -> list[str]:
        assert name == ("prmt", "b32")
        source = f"permute_bytes({', '.join(self.read(each, 'b32') for each in operands[1:])})"
        return [self.write(operands[0], source, "b32", predicate)]

    def _lop3(self, name, operands, predicate) -> list[str]:
        a, b, c = (self.read(each, "b32") for each in operands[1:4])
        table = int(operands[4].rstrip("U"), 0)
        terms = [
            f"({a if row & 4 else f'~{a}'} & {b if row & 2 else f'~{b}'} & {c if row & 1 else f'~{c}'})"
            for row in range(8)
            if table >> row & 1
        ]
        return [self.write(operands[0], " | ".join(terms), "b32", predicate)]

    def _div(self, name, operands, predicate) -> list[str]:
        kind = type_of(name)
        a, b = (self.read(each, kind) for each in operands[1:])
        source = f"{a} / {b}" if kind[0] == "f" else f"quotient({a}, {b})"
        return [self.write(operands[0], source, kind, predicate)]

    def _rem(self, name, operands, predicate) -> list[str]:
        kind = type_of(name)
        a, b = (self.read(each, kind) for each in operands[1:])
        return [self.write(operands[0], f"remainder({a}, {b})", kind, predicate)]

    def _selp(self, name, operands, predicate) -> list[str]:
        kind = f"b{WIDTHS[type_of(name)]}"
        a, b = (self.read(each, kind) for each in operands[1:3])
        return [self.write(operands[0], f"np.where({self.read(operands[3], 'pred')}, {a}, {b})", kind, predicate)]

    def _setp(self, name, operands, predicate) -> list[str]:
        kind, comparison = type_of(name), name[1]
        if kind.endswith("x2"):
            number = PAIRS[kind][0]
            lines = []
            for half, target in enumerate(operands[0].split("|")):
                given = (number.format(f"halves({self.read(each, 'b32')})[{half}]") for each in operands[1:])
                lines.append(self.write(target, f"compare({comparison!r}, {', '.join(given)})", "pred", predicate))
            return lines
        source = f"compare({comparison!r}, {', '.join(self.read(each, kind) for each in operands[1:3])})"
        for word in ("and", "or"):
            if word in name:
                source = f"({source}) {'&' if word == 'and' else '|'} {self.read(operands[3], 'pred')}"
        return [self.write(operands[0], source, "pred", predicate)]

    def _cvt(self, name, operands, predicate) -> list[str]:
        types = [part for part in name if part in WIDTHS or part in arithmetic.FLOAT8]
        to, of = types
        if to in arithmetic.FLOAT8:
            assert of == "f32" and "satfinite" in name
            source = f"float_pair_to_float8({self.read(operands[1], of)}, {self.read(operands[2], of)}, {to!r})"
            return [self.write(operands[0], source, "b16", predicate)]
        if of in arithmetic.FLOAT8:
            source = f"float8_pair_to_half({self.read(operands[1], 'b16')}, {of!r})"
            return [self.write(operands[0], source, "b32", predicate)]
        assert "relu" not in name
        assert "rz" not in name or to in ("f16", "f16x2")
        if to.endswith("x2"):
            assert "satfinite" not in name
            number = PAIRS[to][1].replace("{}", "truncated_half({})" if "rz" in name else "{}")
            high, low = (number.format(self.read(each, of)) for each in operands[1:3])
            return [self.write(operands[0], f"joined({low}, {high})", "b32", predicate)]
        rounding = next((part for part in name if part in ("rz", "rni", "rzi", "rmi", "rpi")), None)
        source = f"convert({self.read(operands[1], of)}, {to!r}, {rounding!r})"
        if to == "bf16":
            return [self.write(operands[0], source, "b16", predicate)]
        return [self.write(operands[0], source, to, predicate)]

    def _mov(self, name, operands, predicate) -> list[str]:
        target, source = operands
        kind = type_of(name)
        bits = WIDTHS[kind]
        if target.startswith("{"):
            parts = split_operands(target[1:-1])
            part = bits // len(parts)
            whole = self.read(source, f"b{bits}")
            shifts = (f"({whole} >> {UNSIGNED[bits].__name__}({part * at}))" for at in range(len(parts)))
            return [
                self.write(each, f"{shift}.astype({UNSIGNED[part].__name__})", f"b{part}", predicate)
                for each, shift in zip(parts, shifts, strict=True)
            ]
        if source.startswith("{"):
            parts = split_operands(source[1:-1])
            part, whole = bits // len(parts), UNSIGNED[bits].__name__
            joined = " | ".join(
                f"np.asarray({self.read(each, f'b{part}')}).astype({whole}) << {whole}({part * at})"
                for at, each in enumerate(parts)
            )
            return [self.write(target, joined, f"b{bits}", predicate)]
        kind = "pred" if kind == "pred" else f"b{bits}"
        return [self.write(target, self.read(source, kind), kind, predicate)]

    def _cvta(self, name, operands, predicate) -> list[str]:
        return [self.write(operands[0], self.read(operands[1], "b64"), "b64", predicate)]

    # Between threads

    def _shfl(self, name, operands, predicate) -> list[str]:
        assert predicate is None
        target, _, valid = operands[0].partition("|")
        source = f"g.shuffle({name[2]!r}, {', '.join(self.filled(each, 'b32') for each in operands[1:5])})"
        lines = [f"shuffled = {source}", self.write(target, "shuffled[0]", "b32", None)]
        return [*lines, self.write(valid, "shuffled[1]", "pred", None)] if valid else lines

    def _redux(self, name, operands, predicate) -> list[str]:
        assert not {"NaN", "abs"} & {*name}
        kind = type_of(name)
        source = f"g.reduced({name[2]!r}, g.filled({self.read(operands[1], kind)}))"
        return [self.write(operands[0], source, kind, predicate)]

    def _vote(self, name, operands, predicate) -> list[str]:
        return [
            self.write(operands[0], f"g.vote({name[2]!r}, {self.read(operands[1], 'pred')})", type_of(name), predicate)
        ]

    def _elect(self, name, operands, predicate) -> list[str]:
        _, _, chosen = operands[0].partition("|")
        return [self.write(chosen, "g.elected()", "pred", predicate)]

    # Memory

    def _ld(self, name, operands, predicate) -> list[str]:
        kind = type_of(name)
        space = next(part for part in name if part.split("::")[0] in ("global", "shared", "param")).split("::")[0]
        targets = split_operands(operands[0][1:-1]) if operands[0].startswith("{") else [operands[0]]
        if space == "param":
            inner = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", operands[1])
            source = f"g.parameter({inner[1]!r}, {int(inner[2] or 0)}, {WIDTHS[kind] // 8})"
            return [self.write(targets[0], source, f"b{WIDTHS[kind]}", predicate)]
        bits = 64 if space == "global" else 32
        lines = [
            f"loaded = g.load({space!r}, {self.address(operands[1], bits)}, {WIDTHS[kind] // 8}, {len(targets)}, "
            f"{self.mask(predicate)})"
        ]
        kind = kind if kind[0] == "s" else f"b{WIDTHS[kind]}"
        view = f".view({NUMPY[kind].__name__})" if kind in NUMPY else ""
        return lines + [self.write(each, f"loaded[{at}]{view}", kind, predicate) for at, each in enumerate(targets)]

    def _st(self, name, operands, predicate) -> list[str]:
        kind = type_of(name)
        space = next(part for part in name if part.split("::")[0] in ("global", "shared")).split("::")[0]
        sources = split_operands(operands[1][1:-1]) if operands[1].startswith("{") else [operands[1]]
        bits = 64 if space == "global" else 32
        values = ", ".join(self.filled(each, f"b{WIDTHS[kind]}") for each in sources)
        address, unit = self.address(operands[0], bits), WIDTHS[kind] // 8
        return [f"g.store({space!r}, {address}, {unit}, [{values}], {self.mask(predicate)})"]

    def _ldmatrix(self, name, operands, predicate) -> list[str]:
        assert predicate is None and "m8n8" in name and "b16" in name
        targets = split_operands(operands[0][1:-1]) if operands[0].startswith("{") else [operands[0]]
        lines = [f"loaded = g.load_matrix({self.address(operands[1], 32)}, {len(targets)}, {'trans' in name})"]
        return lines + [self.write(each, f"loaded[{at}]", "b32", None) for at, each in enumerate(targets)]

    def _stmatrix(self, name, operands, predicate) -> list[str]:
        assert "m8n8" in name and "b16" in name and predicate is None
        sources = split_operands(operands[1][1:-1]) if operands[1].startswith("{") else [operands[1]]
        values = ", ".join(self.read(each, "b32") for each in sources)
        return [f"g.store_matrix({self.address(operands[0], 32)}, [{values}], {'trans' in name})"]

    def _mma(self, name, operands, predicate) -> list[str]:
        shape, kinds = name[3], name[6:]
        assert predicate is None and kinds[0] == kinds[3] == "f32", name
        results, *given = (split_operands(each[1:-1]) for each in operands)
        a, b, c = (f"[{', '.join(self.filled(each, 'b32') for each in part)}]" for part in given)
        lines = [f"product = g.multiply({shape!r}, {kinds[1]!r}, {a}, {b}, {c})"]
        return lines + [self.write(each, f"product[{at}]", "b32", None) for at, each in enumerate(results)]

    def _wgmma(self, name, operands, predicate) -> list[str]:
        if name[1] == "fence":
            return []
        if name[1] == "commit_group":
            return ["g.commit('products')"]
        if name[1] == "wait_group":
            return [f"g.wait('products', {operands[0]})"]
        assert name[1] == "mma_async" and name[5] == "f32" and predicate is None, name
        results, a, b, scale_d, *rest = operands
        a_source = (
            f"[{', '.join(self.read(each, 'b32') for each in split_operands(a[1:-1]))}]"
            if a.startswith("{")
            else f"g.filled({self.read(a, 'b64')})"
        )
        adds = self.read(scale_d, "pred") if scale_d.startswith("%") else f"np.full(g.size, {scale_d} != 0)"
        flags = [int(each) for each in rest]
        assert flags[:2] == [1, 1], "products are not negated"
        transposed = flags[2:] if not a.startswith("{") else [0, *flags[2:]]
        return [
            f"g.multiply_later({int(name[4][name[4].index('n') + 1 : name[4].index('k')])}, {name[6]!r}, "
            f"{split_operands(results[1:-1])!r}, {a_source}, g.filled({self.read(b, 'b64')}), {adds}, {transposed!r})"
        ]

    def _tcgen05(self, name, operands, predicate) -> list[str]:
        mask = self.mask(predicate)
        if name[1] == "alloc":
            return [f"g.tensor_allocate({self.address(operands[0], 32)}, {int(operands[1], 0)}, {mask})"]
        if name[1] in ("dealloc", "relinquish_alloc_permit", "wait::ld", "wait::st", "fence"):
            return []
        if name[1] == "commit":
            return [f"g.tensor_commit({self.address(operands[0], 32)}, {mask})"]
        if name[1] == "ld":
            targets, half = split_operands(operands[0][1:-1]), int(operands[2], 0) if len(operands) > 2 else 0
            source = f"g.tensor_load({name[4]!r}, {len(targets)}, {self.address(operands[1], 32)}, {half})"
            writes = [self.write(each, f"loaded[{at}]", "b32", predicate) for at, each in enumerate(targets)]
            return [f"loaded = {source}", *writes]
        if name[1] == "st":
            half = int(operands[1], 0) if len(operands) > 2 else 0
            values = ", ".join(self.filled(each, "b32") for each in split_operands(operands[-1][1:-1]))
            return [f"g.tensor_store({name[4]!r}, {self.address(operands[0], 32)}, {half}, [{values}], {mask})"]
        assert name[1:] == ("mma", "cta_group::1", "kind::f16") and len(operands) == 5, name
        target, a, b, instruction, adds = operands
        inside = a.startswith("[")
        left = self.address(a, 32) if inside else self.filled(a, "b64")
        given = f"{self.filled(b, 'b64')}, {self.filled(instruction, 'b32')}, {self.filled(adds, 'pred')}"
        return [f"g.tensor_multiply({self.address(target, 32)}, {left}, {inside}, {given}, {mask})"]

    # Copies and barriers

    def _cp(self, name, operands, predicate) -> list[str]:
        if name[:3] == ("cp", "async", "bulk"):
            return self._bulk(name, operands, predicate)
        if name[2] == "commit_group":
            return ["g.commit('copies')"]
        if name[2] in ("wait_group", "wait_all"):
            return [f"g.wait('copies', {operands[0] if operands else 0})"]
        assert name[2] in ("ca", "cg"), name
        target, source = self.address(operands[0], 32), self.address(operands[1], 64)
        size = int(operands[2], 0)
        read = self.read(operands[3], "b32") if len(operands) > 3 else f"np.full(g.size, {size}, U4)"
        return [f"g.copy_later({target}, {source}, {size}, g.filled({read}), {self.mask(predicate)})"]

    def _bulk(self, name, operands, predicate) -> list[str]:
        if "commit_group" in name:
            return ["g.commit('stores')"]
        if "wait_group" in name:
            return [f"g.wait('stores', {operands[0]})"]
        assert name[3] == "tensor", name
        loads = name[5].startswith("shared")
        shared, whole = (operands[0], operands[1]) if loads else (operands[1], operands[0])
        descriptor, coordinates = split_operands(whole[1:-1])
        places = ", ".join(f"g.filled({self.read(each, 's32')})" for each in split_operands(coordinates[1:-1]))
        descriptor = self.address(f"[{descriptor}]", 64)
        if loads:
            barrier = self.address(operands[2], 32)
            return [
                f"g.load_tile({descriptor}, [{places}], {self.address(shared, 32)}, {barrier}, {self.mask(predicate)})"
            ]
        return [f"g.store_tile({descriptor}, [{places}], {self.address(shared, 32)}, {self.mask(predicate)})"]

    def _mbarrier(self, name, operands, predicate) -> list[str]:
        mask = self.mask(predicate)
        if name[1] == "init":
            return [f"g.barrier_init({self.address(operands[0], 32)}, {self.read(operands[1], 'u32')}, {mask})"]
        if name[1] == "inval":
            return []
        if name[1] == "arrive":
            amount = self.read(operands[2], "u32") if "expect_tx" in name else "0"
            count = self.read(operands[2], "u32") if len(operands) > 2 and "expect_tx" not in name else "1"
            return [f"g.barrier_arrive({self.address(operands[1], 32)}, {count}, {amount}, {mask})"]
        assert name[1] == "try_wait" and "parity" in name, name
        source = f"g.barrier_passed({self.address(operands[1], 32)}, {self.read(operands[2], 'u32')}, {mask})"
        return [self.write(operands[0], source, "pred", predicate)]

    def _fence(self, name, operands, predicate) -> list[str]:
        return ["g.fence()"] if name[1] == "proxy" else []

    def _nothing(self, name, operands, predicate) -> list[str]:
        return []

    _setmaxnreg = _membar = _prefetch = _nanosleep = _griddepcontrol = _nothing


def immediate(text: str, kind: str) -> np.generic:
    """A number in the text as one of a type."""
    if kind == "pred":
        return np.bool_(int(text, 0) != 0)
    bits = WIDTHS[kind]
    if text[:2] in ("0f", "0F"):
        value = np.uint32(int(text[2:], 16)).view(np.float32)
        return value if kind == "f32" else np.uint32(int(text[2:], 16))
    if text[:2] in ("0d", "0D"):
        return np.uint64(int(text[2:], 16)).view(np.float64)
    whole = UNSIGNED[bits](int(text.rstrip("U"), 0) & (1 << bits) - 1)
    if kind == "bf16":
        return arithmetic.bfloat16_to_float(whole)[()]
    return whole.view(NUMPY[kind]) if kind in NUMPY else whole
