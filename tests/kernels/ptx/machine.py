# SPDX-License-Identifier: Apache-2.0
"""One program of a kernel: its threads, in groups that are at the same place, and what they share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .arithmetic import UNSIGNED
from .matrix import load_matrix, multiply, multiply_from_shared, store_matrix
from .memory import GlobalMemory, SharedMemory
from .program import Program
from .tensor_memory import TensorMemory
from .tile_maps import TileMap
from .translate import ENDS, Translator
from .turns import Turns

POISON = 0xDEADBEEFDEADBEEF
"""What is in registers that nobody has set."""

ENDED = -1
"""Where threads are that have returned."""

PARAMETERS = 0x7000_0000
"""Address of the first parameter, in 32 bits as in 64."""


Positions = np.ndarray
"""Numbers of threads in a group."""

Work = Callable[["Group", Positions, Positions], None]
"""What is under way: of the group that waits for it, of those that began it which it is for, and where they are now."""

Lots = list[list[tuple[Work, Positions]]]
"""What has been begun and not been waited for; the last lot is still open."""


class Deadlock(Exception):
    """All threads wait for each other."""


class Unfinished(Exception):
    """Threads ended before what they had begun."""


class Block(NamedTuple):
    """Instructions without a choice between, and what ends them."""

    run: Callable
    end: Any  # Instruction | None
    first: int


class Code:
    """A program, translated when it is first come by."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.translator = Translator(program)
        starts = {0, *program.labels.values()}
        for place, each in enumerate(program.instructions):
            if each.name[0] in ENDS:
                starts.add(place + 1)
        self.starts = sorted(starts)
        self.blocks: dict[int, Block] = {}
        self.next = dict(zip(self.starts, [*self.starts[1:], len(program.instructions)], strict=True))
        self.parameters, offset = {}, 0
        for name, bits, _ in program.parameters:
            size = bits // 8
            offset = -(-offset // min(size, 64)) * min(size, 64)
            self.parameters[name] = offset
            offset += size
        self.parameter_bytes = offset

    def block(self, first: int) -> Block:
        """The instructions that begin at one."""
        if (block := self.blocks.get(first)) is None:
            instructions = self.program.instructions[first : self.next[first]]
            end = instructions[-1] if instructions and instructions[-1].name[0] in ENDS else None
            run = self.translator.block(instructions[: len(instructions) - (end is not None)])
            block = self.blocks[first] = Block(run, end, first)
        return block


class Registers(dict[str, np.ndarray]):
    """Those of a group. Compilers read some that nobody has set, where it does not matter what is in them."""

    def __init__(self, program: Program, size: int, values: dict[str, np.ndarray]) -> None:
        super().__init__(values)
        self.program, self.size = program, size

    def __missing__(self, name: str) -> np.ndarray:
        kind = UNSIGNED[self.program.bits_of(name)]
        return np.full(self.size, np.uint64(POISON).astype(kind))


class Barrier:
    """An mbarrier: it is passed when as many have arrived, and as many bytes, as are expected."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.phase = self.bytes = 0

    def settle(self) -> None:
        """Go on to the next phase if this one is over."""
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
        assert self.pending >= 0, "more arrived at a barrier than it expects"


class Machine:
    """A program that runs.

    Attributes:
        late: whether what runs beside the threads happens as late as it may; else as soon.
        order: draws which warps go on; None for an order that is the same each time.
        turns: counts those of memory.
        events: how often something happened that others may wait for.
        lots: what has begun and is waited for by those who began it (`Group.begin`).
    """

    def __init__(
        self,
        code: Code,
        memory: GlobalMemory,
        parameters: np.ndarray,
        tile_maps: dict[int, TileMap],
        shared_size: int,
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
        *,
        late: bool = False,
        order: random.Random | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.code, self.memory, self.parameters, self.tile_maps = code, memory, parameters, tile_maps
        self.shared = SharedMemory(shared_size)
        self.place, self.grid, self.late, self.order, self.turns = place, grid, late, order, turns
        self.groups = [Group(self, np.arange(code.program.threads), {}, 0)]
        self.barriers: dict[int, Barrier] = {}
        self.tensor_memory = TensorMemory()
        # What the hardware does in the order in which it was begun: copies, and products in tensor memory.
        self.queues: dict[str, list[Callable[[], None]]] = {"copies": [], "products": []}
        self.events = 0
        self.lots: dict[tuple[str, int], Lots] = {}

    def run(self) -> None:
        """Until all threads have ended.

        Raises:
            Deadlock: some wait for what will not come.
            Unfinished: something was not waited for.
        """
        while self.groups:
            group = self._choose()
            if group is None:
                waiting = [each for each in self.queues.values() if each]
                if waiting:
                    (waiting[0] if self.order is None else self.order.choice(waiting)).pop(0)()
                    continue
                where = "; ".join(f"threads {g.threads[0]}-{g.threads[-1]} at {g.where()}" for g in self.groups)
                raise Deadlock(where)
            self._step(group)
        if any(self.queues.values()) or any(each for lots in self.lots.values() for each in lots):
            raise Unfinished("all threads have ended, and something that they began has not been waited for")

    def _choose(self) -> Group | None:
        """Who goes on: who is furthest behind, so that others are met again, or whole warps as they are drawn."""
        able = [each for each in self.groups if each.waits_at is None and each.saw != self.events]
        if not able:
            return None
        first = min(able, key=lambda each: each.at)
        if self.order is None or len(able) == 1:
            return first
        whole = [each for each in able if each.size % 32 == 0]
        return first if len(whole) < len(able) else self.order.choice(whole)

    def _step(self, group: Group) -> None:
        block = self.code.block(group.at)
        group.spun = False
        block.run(group.registers, group)
        group.saw = self.events if group.spun else -1
        following = self.code.next[group.at]
        end = block.end
        if end is None:
            group.at = following
        elif end.name[0] == "bra":
            target = self.code.program.labels[end.operands[0]]
            self._split(group, np.where(group.mask(end.predicate), target, following))
        elif end.name[0] == "brx":
            assert end.predicate is None
            table = [self.code.program.labels[each] for each in self.code.program.tables[end.operands[1]]]
            chosen = np.array(table)[group.registers[end.operands[0]].astype(np.int64)]
            self._split(group, chosen)
        elif end.name[0] in ("ret", "exit"):
            self._split(group, np.where(group.mask(end.predicate), ENDED, following))
        elif end.name[0] == "trap":
            if group.mask(end.predicate).any():
                raise RuntimeError("trap")
            group.at = following
        elif end.name[1] == "warp":
            group.at = following
        else:
            self._arrive(group, end, following)
        self._join(group)

    def _split(self, group: Group, chosen: np.ndarray) -> None:
        """Send each thread where it goes on."""
        places = np.unique(chosen)
        if len(places) == 1:
            if places[0] == ENDED:
                self.groups.remove(group)
            group.at = int(places[0])
            return
        self.groups.remove(group)
        for place in places.tolist():
            if place != ENDED:
                here = chosen == place
                part = Group(
                    self, group.threads[here], {name: each[here] for name, each in group.registers.items()}, place
                )
                part.saw = group.saw
                self.groups.append(part)
                self._join(part)

    def _join(self, group: Group) -> None:
        """Make one group of two that have come to the same place."""
        if group not in self.groups or group.waits_at is not None:
            return
        for other in self.groups:
            if other is not group and other.at == group.at and other.waits_at is None:
                self._merge(group, other)
                return

    def _merge(self, group: Group, other: Group) -> None:
        threads = np.concatenate([group.threads, other.threads])
        order = np.argsort(threads)
        registers = {
            name: np.concatenate([group.registers[name], other.registers[name]])[order]
            for name in group.registers.keys() | other.registers.keys()
        }
        self.groups.remove(group)
        self.groups.remove(other)
        merged = Group(self, threads[order], registers, group.at)
        merged.saw = -1
        self.groups.append(merged)

    def _arrive(self, group: Group, end: Any, following: int) -> None:
        assert end.predicate is None
        number = int(end.operands[0], 0) if end.operands else 0
        expected = int(end.operands[1], 0) if len(end.operands) > 1 else self.code.program.threads
        group.waits_at, group.at = number, following
        waiting = [each for each in self.groups if each.waits_at == number]
        arrived = sum(each.size for each in waiting)
        assert arrived <= expected, "more threads at a barrier than it is for"
        if arrived == expected:
            self.events += 1
            for each in waiting:
                each.waits_at = None
            for each in waiting:
                self._join(each)


class Group:
    """Threads that are at the same place, with their registers.

    Attributes:
        at: the instruction that is next.
        waits_at: the number of the barrier (`bar.sync`) that it waits at.
        spun: whether it has just asked an mbarrier in vain.
        saw: how many events there had been then: before another it need not ask again.
    """

    def __init__(self, machine: Machine, threads: np.ndarray, registers: dict[str, np.ndarray], at: int) -> None:
        self.machine, self.threads, self.at, self.size = machine, threads, at, len(threads)
        self.registers = Registers(machine.code.program, self.size, registers)
        self.waits_at: int | None = None
        self.saw, self.spun = -1, False

    def where(self) -> str:
        """For messages."""
        code = self.machine.code
        if self.waits_at is not None:
            return f"barrier {self.waits_at}, before instruction {self.at}"
        block = code.program.instructions[self.at : code.next[self.at]]
        return f"instruction {self.at}: {block[0] if block else ''} ... {block[-1] if block else ''}"

    # Registers

    def filled(self, values):
        """One for each thread."""
        values = np.asarray(values)
        return values if values.shape else np.full(self.size, values)

    def mask(self, predicate) -> np.ndarray:
        """For which threads it holds."""
        if predicate is None:
            return np.ones(self.size, bool)
        values = self.registers[predicate[0]]
        return ~values if predicate[1] else values

    def special(self, name: str):
        """A register that the hardware sets."""
        axis = "xyz".find(name[-1])
        machine = self.machine
        if name.startswith("%tid"):
            return self.threads.astype(np.uint32) if axis == 0 else np.zeros(self.size, np.uint32)
        if name == "%laneid":
            return (self.threads % 32).astype(np.uint32)
        if name == "%warpid":
            return (self.threads // 32).astype(np.uint32)
        if name.startswith("%ntid"):
            return np.full(self.size, machine.code.program.threads if axis == 0 else 1, np.uint32)
        if name.startswith("%nctaid"):
            return np.full(self.size, machine.grid[axis], np.uint32)
        if name.startswith("%ctaid"):
            return np.full(self.size, machine.place[axis], np.uint32)
        return np.zeros(self.size, np.uint32)

    def symbol(self, name: str) -> np.uint64:
        """An address by name."""
        if name == "global_smem":
            return np.uint64(SharedMemory.BASE)
        return np.uint64(PARAMETERS + self.machine.code.parameters[name])

    def parameter(self, name: str, offset: int, size: int):
        """A parameter, or a part of it."""
        first = self.machine.code.parameters[name] + offset
        kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size]
        return self.machine.parameters[first : first + size].view(kind)[0]

    # Between threads

    def warps(self) -> np.ndarray:
        """The number of each thread's warp."""
        return self.threads // 32

    def whole_warps(self) -> int:
        """How many warps these are, all of whose threads are here."""
        first = self.threads[::32]
        assert self.size % 32 == 0 and (first % 32 == 0).all() and (self.threads == np.repeat(first, 32) + np.tile(
            np.arange(32), len(first))).all(), "threads of a warp are elsewhere"  # fmt: skip
        return len(first)

    def shuffle(self, how: str, values, other, clamp, mask):
        """What the thread says that each asks; and whether there is one."""
        warps = self.whole_warps()
        assert (clamp & 31 == 31).all() or how == "up", "parts of warps"
        assert (clamp >> 8 == 0).all()
        lane = np.tile(np.arange(32), warps)
        other = other.astype(np.int64)
        asked = {"bfly": lane ^ other, "idx": other & 31, "up": lane - other, "down": lane + other}[how]
        valid = (asked >= 0) & (asked < 32)
        asked = np.where(valid, asked, lane)
        return values[np.repeat(np.arange(warps) * 32, 32) + asked], valid

    def reduced(self, how: str, values):
        """Of each warp, the same for all its threads."""
        rows = values.reshape(self.whole_warps(), 32)
        combine = {
            "max": np.fmax.reduce,  # which pass over NaN
            "min": np.fmin.reduce,
            "add": np.sum,
            "or": np.bitwise_or.reduce,
            "and": np.bitwise_and.reduce,
        }
        return np.repeat(combine[how](rows, axis=1).astype(values.dtype), 32)

    def vote(self, how: str, values):
        """Of each warp."""
        rows = self.filled(values).reshape(self.whole_warps(), 32)
        if how == "ballot":
            return np.repeat((rows.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32), 32)
        return np.repeat({"any": np.any, "all": np.all}[how](rows, axis=1), 32)

    def elected(self) -> np.ndarray:
        """One thread of each warp."""
        self.whole_warps()
        return self.threads % 32 == 0

    # Memory

    def _note(self, space: str, addresses, size: int, mask=None) -> None:
        """Have turns counted, where they are."""
        if self.machine.turns is not None and (mask is None or mask.any()):
            active = slice(None) if mask is None else mask
            self.machine.turns.count(space, addresses[active], size, self.threads[active])

    def load(self, space: str, addresses, unit: int, count: int, mask):
        """`count` numbers for each thread; 0 where the mask says that it reads none."""
        self._note(space, addresses, unit * count, mask)
        memory = self.machine.memory if space == "global" else self.machine.shared
        if mask is None:
            return memory.read(addresses, unit, count)
        kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[unit]
        results = [np.zeros(self.size, kind) for _ in range(count)]
        if mask.any():
            for result, each in zip(results, memory.read(addresses[mask], unit, count), strict=True):
                result[mask] = each
        return results

    def store(self, space: str, addresses, unit: int, values, mask) -> None:
        """Numbers from each thread that the mask has."""
        self._note(space, addresses, unit * len(values), mask)
        if mask is not None:
            if not mask.any():
                return
            addresses, values = addresses[mask], [each[mask] for each in values]
        if space == "global":
            self.machine.memory.write(addresses, unit, values)
        else:
            warps = self.warps() if mask is None else self.warps()[mask]
            self.machine.shared.write(addresses, unit, values, warps)

    def load_matrix(self, addresses, count: int, transposed: bool):
        """`ldmatrix`: of each matrix 8 threads have the addresses of its rows."""
        self._note("shared", addresses, 16, self.threads % 32 < 8 * count)
        return load_matrix(self.machine.shared, addresses.reshape(self.whole_warps(), 32), count, transposed)

    def store_matrix(self, addresses, values, transposed: bool) -> None:
        """`stmatrix`."""
        self._note("shared", addresses, 16, self.threads % 32 < 8 * len(values))
        warps = self.whole_warps()
        store_matrix(self.machine.shared, addresses.reshape(warps, 32), values, transposed, self.threads[::32] // 32)

    def multiply(self, shape: str, kind: str, a, b, c):
        """`mma.sync`."""
        self.whole_warps()
        return multiply(shape, kind, a, b, c)

    def fence(self) -> None:
        """What these threads wrote to shared memory, the hardware's copies and products see from now on."""
        self.machine.shared.fence(np.unique(self.warps()))

    # What runs beside the threads

    def _lots(self, kind: str) -> Iterator[tuple[Positions, Lots]]:
        """Of each warp, or of each warp group for products: which threads of this group it is, and its lots."""
        width = 128 if kind == "products" else 32
        for unit in np.unique(self.threads // width).tolist():
            yield np.flatnonzero(self.threads // width == unit), self.machine.lots.setdefault((kind, unit), [[]])

    def begin(self, kind: str, work: Work) -> None:
        """Something that is over when these threads have waited for it."""
        if not self.machine.late:
            everyone = np.arange(self.size)
            work(self, everyone, everyone)
            return
        for positions, lots in self._lots(kind):
            lots[-1].append((work, positions))

    def commit(self, kind: str) -> None:
        """What has begun since the last time is one lot to wait for."""
        if self.machine.late:
            for _, lots in self._lots(kind):
                lots.append([])

    def wait(self, kind: str, pending: int) -> None:
        """Until no more lots are under way."""
        if not self.machine.late:
            return
        due: dict[Work, list[tuple[Positions, Positions]]] = {}
        for positions, lots in self._lots(kind):
            while len(lots) - 1 > pending:
                for work, issued in lots.pop(0):
                    due.setdefault(work, []).append((issued, positions))
        for work, parts in due.items():
            work(self, *(np.concatenate(each) for each in zip(*parts, strict=True)))

    def copy_later(self, target, source, size: int, read, mask) -> None:
        """`cp.async`: of `size` bytes those up to `read`, and zeros."""
        active = np.ones(self.size, bool) if mask is None else mask
        self._note("shared", target, size, active)
        self._note("global", source, size, active & (read == size))
        assert ((read == size) | (read == 0)).all()

        def work(group: Group, issued: Positions, _: Positions) -> None:
            here = issued[active[issued]]
            if not len(here):
                return
            values = [np.zeros(len(here), np.uint32) for _ in range(size // 4)]
            reads = read[here] == size
            if reads.any():
                found = group.machine.memory.read(source[here[reads]], 4, size // 4)
                for value, each in zip(values, found, strict=True):
                    value[reads] = each
            group.machine.shared.write(target[here], 4, values, None)

        self.begin("copies", work)

    def multiply_later(self, columns: int, kind: str, results, a, b, adds, transposed) -> None:
        """`wgmma`: its results are there once it has been waited for. Products in flight add up in their order."""
        if isinstance(a, list):
            a = [self.filled(each) for each in a]

        def work(group: Group, issued: Positions, now: Positions) -> None:
            sums = [group.registers[each] for each in results]
            products = multiply_from_shared(
                group.machine.shared, group.threads[now], columns, kind,
                [each[issued] for each in a] if isinstance(a, list) else a[issued], b[issued],
                [each[now] for each in sums], adds[issued], transposed,
            )  # fmt: skip
            for name, before, product in zip(results, sums, products, strict=True):
                group.registers[name] = after = before.copy()
                after[now] = product

        self.begin("products", work)

    def load_tile(self, descriptor, coordinates, target, barrier, mask) -> None:
        """A tile that the hardware copies to shared memory."""
        mask = np.ones(self.size, bool) if mask is None else mask
        for thread in np.flatnonzero(mask):
            tile_map = self.machine.tile_maps[int(descriptor[thread])]
            place = [int(each[thread]) for each in coordinates]
            where, reached = int(target[thread]), int(barrier[thread])

            def work(tile_map=tile_map, place=place, where=where, reached=reached) -> None:
                tile_map.load(self.machine.shared, place, where)
                self._arrived(reached, 0, -tile_map.size)

            self.queue("copies", work)

    def queue(self, kind: str, work: Callable[[], None]) -> None:
        """Something that the hardware does after what of its kind was begun before."""
        if self.machine.late:
            self.machine.queues[kind].append(work)
        else:
            work()

    def store_tile(self, descriptor, coordinates, source, mask) -> None:
        """A tile that the hardware copies from shared memory."""
        mask = np.ones(self.size, bool) if mask is None else mask
        for thread in np.flatnonzero(mask):
            tile_map = self.machine.tile_maps[int(descriptor[thread])]
            place, where = [int(each[thread]) for each in coordinates], int(source[thread])

            def work(_: Group, issued: Positions, __: Positions, thread=thread, t=tile_map, p=place, w=where) -> None:
                if thread in issued:
                    t.store(self.machine.shared, p, w)

            self.begin("stores", work)

    # Tensor memory

    def tensor_allocate(self, target, columns: int, mask) -> None:
        """Write down in shared memory where there are as many columns."""
        if mask is None or mask.any():
            first = np.full(1, self.machine.tensor_memory.allocate(columns), np.uint32)
            self.machine.shared.write(target[:1].astype(np.uint32), 4, [first], None)

    def tensor_load(self, shape: str, count: int, addresses, half: int):
        """`tcgen05.ld`."""
        self.whole_warps()
        memory = self.machine.tensor_memory
        found = memory.cells[memory.places(shape, count, addresses, self.warps(), self.threads % 32, half)]
        return [np.ascontiguousarray(found[:, each]) for each in range(count)]

    def tensor_store(self, shape: str, addresses, half: int, values, mask) -> None:
        """`tcgen05.st`."""
        self.whole_warps()
        if mask is not None and not mask.any():
            return
        assert mask is None or mask.all(), "some threads of a warp"
        memory = self.machine.tensor_memory
        where = memory.places(shape, len(values), addresses, self.warps(), self.threads % 32, half)
        memory.cells[where] = np.stack(values, -1)

    def tensor_multiply(self, target, a, in_tensor_memory: bool, b, instruction, adds, mask) -> None:
        """`tcgen05.mma`, by the threads that the mask has."""
        for thread in np.flatnonzero(np.ones(self.size, bool) if mask is None else mask):
            operands = int(target[thread]), int(a[thread]), in_tensor_memory, int(b[thread])
            given = *operands, int(instruction[thread]), bool(adds[thread])
            self.queue("products", partial(self.machine.tensor_memory.multiply, self.machine.shared, *given))

    def tensor_commit(self, barrier, mask) -> None:
        """Arrive at a barrier once all products that were begun before are there."""
        for thread in np.flatnonzero(np.ones(self.size, bool) if mask is None else mask):
            self.queue("products", partial(self._arrived, int(barrier[thread]), 1, 0))

    # Barriers

    def barrier_init(self, addresses, count, mask) -> None:
        """Make one."""
        mask = np.ones(self.size, bool) if mask is None else mask
        for address in np.unique(addresses[mask]).tolist():
            assert address % 8 == 0
            self.machine.barriers[address] = Barrier(int(np.asarray(count)))
            self.machine.shared.places(np.array([address], np.uint32), 8, 1)

    def barrier_arrive(self, addresses, count, amount, mask) -> None:
        """Arrive at it, and say how many bytes will."""
        count, amount = self.filled(count), self.filled(amount)
        mask = np.ones(self.size, bool) if mask is None else mask
        for thread in np.flatnonzero(mask):
            self._arrived(int(addresses[thread]), int(count[thread]), int(amount[thread]))

    def _arrived(self, address: int, count: int, amount: int) -> None:
        barrier = self.machine.barriers[address]
        barrier.bytes += amount
        barrier.pending -= count
        barrier.settle()
        self.machine.events += 1

    def barrier_passed(self, addresses, parity, mask):
        """Whether the phase of this parity is over."""
        assert mask is None
        parity = self.filled(parity)
        pairs = {(int(a), int(p)) for a, p in zip(addresses, parity, strict=True)}
        known = {(a, p): self.machine.barriers[a].phase != p & 1 for a, p in pairs}
        passed = np.array([known[int(a), int(p)] for a, p in zip(addresses, parity, strict=True)])
        self.spun |= not passed.all()
        return passed
