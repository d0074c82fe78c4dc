# SPDX-License-Identifier: Apache-2.0
"""Runs Gluon kernels for Hopper on a CPU: Triton has no interpreter for them.

Each partition of warps is a thread, and barriers block. What the hardware does beside a partition (copies, products) is
done at once or when it is waited for; whether it had to be waited for is judged not by chance but by vector clocks
(Mattern, 1988): an access to shared memory must be ordered, by barriers, after the copy that filled it and before the
copy that fills it again. What is not simulated: layouts, which the compiler checks, and rounding, which is torch's.
"""

from __future__ import annotations

import ast
import builtins
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_kernels import tiles

DEADLOCK_SECONDS = 20.0

CONSTANTS = {name: getattr(tiles, name).value for name in ("FAR", "LN2", "LOG2E", "NEG_INF")}
"""What kernels import from their neighbours."""

Clock = dict[Hashable, int]
"""How much a partition knows to have happened: of each partition's accesses, and of each buffer's copies."""


class Number(Tensor):
    """A tensor whose `type` has a layout, which nothing looks at."""

    type = SimpleNamespace(layout=None)


def number(value: Any, dtype: torch.dtype | None = None) -> Number:
    """Any number or tensor as one of the simulation."""
    return torch.as_tensor(value, dtype=dtype).as_subclass(Number)


# ---------------------------------------------------------------------- global memory


class Pointer:
    """An address in a tensor, or addresses: its storage and offsets in elements."""

    def __init__(self, storage: Tensor, offset: Any) -> None:
        self.storage, self.offset = storage, offset
        self.dtype = SimpleNamespace(element_ty=storage.dtype)

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        """The address of a tensor's first element."""
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        return cls(tensor.as_strided((size,), (1,), 0), tensor.storage_offset())

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.storage, self.offset + offset)

    def _places(self, mask: Any) -> tuple[Tensor, Tensor]:
        places = torch.as_tensor(self.offset).as_subclass(Tensor).long()
        mask = torch.as_tensor(True if mask is None else mask).as_subclass(Tensor)
        mask, places = torch.broadcast_tensors(mask, places)
        used = places[mask]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < self.storage.numel():
            raise IndexError(f"an access outside the tensor: {int(used.min())} to {int(used.max())}")
        return places.masked_fill(~mask, 0), mask

    def load(self, mask: Any, other: Any) -> Number:
        """What is there, `other` where not `mask`."""
        places, mask = self._places(mask)
        return number(torch.where(mask, self.storage[places], 0 if other is None else other))

    def store(self, value: Any, mask: Any) -> None:
        """Write where `mask`."""
        places, mask = self._places(mask)
        self.storage[places[mask]] = torch.as_tensor(value).as_subclass(Tensor).broadcast_to(places.shape)[mask]


class Descriptor:
    """A tensor of which the hardware copies tiles."""

    def __init__(self, tensor: Tensor, block_shape: Sequence[int]) -> None:
        self.tensor, self.dtype, self.layout = tensor, tensor.dtype, None
        size = tensor.element_size()
        aligned = tensor.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in tensor.stride()[:-1])
        if not aligned or tensor.stride(-1) != 1:
            raise ValueError(f"TMA copies no tiles of strides {tensor.stride()}")
        self.shape = tuple(block_shape)
        self.block_type = SimpleNamespace(nbytes=torch.Size(block_shape).numel() * size)

    def _inside(self, place: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        firsts = [int(each) for each in place]
        counts = [
            max(0, min(size, limit - first))
            for first, size, limit in zip(firsts, self.shape, self.tensor.shape, strict=True)
        ]
        here = tuple(slice(0, count) for count in counts)
        return here, tuple(slice(first, first + count) for first, count in zip(firsts, counts, strict=True))

    def read(self, place: Sequence[Any]) -> Tensor:
        """A tile, 0 beyond the tensor."""
        tile = torch.zeros(self.shape, dtype=self.dtype)
        here, there = self._inside(place)
        tile[here] = self.tensor[there]
        return tile

    def write(self, place: Sequence[Any], tile: Tensor) -> None:
        """What of a tile lies within the tensor."""
        here, there = self._inside(place)
        self.tensor[there] = tile[here]


# ---------------------------------------------------------------------- shared memory


class Slot:
    """What is known about one buffer: its copies, who has accessed it and when, and who still may."""

    def __init__(self) -> None:
        self.copies = 0
        self.accesses: dict[Hashable, int] = {}
        self.running: list[Hashable] = []
        self.unfenced: set[Hashable] = set()


class Buffer:
    """Shared memory, or a view of it."""

    def __init__(self, program: Program, tensor: Tensor, slots: Any) -> None:
        self.program, self.tensor, self.dtype, self.slots = program, tensor, tensor.dtype, slots

    @property
    def slot(self) -> Slot:
        return self.slots

    def index(self, place: Any) -> Buffer:
        """One of those that it consists of."""
        return Buffer(self.program, self.tensor[int(place)], self.slots[int(place)])

    def reshape(self, shape: Sequence[int]) -> Buffer:
        """The same memory in another shape."""
        return Buffer(self.program, self.tensor.view(*shape), self.slots)

    def permute(self, order: Sequence[int]) -> Buffer:
        """The same memory with other dimensions first."""
        return Buffer(self.program, self.tensor.permute(*order), self.slots)

    def load(self, layout: Any) -> Number:
        """What it holds."""
        self.program.begin(self.slot)
        self.program.end(self.slot)
        return number(self.tensor.clone())

    def store(self, value: Tensor) -> None:
        """Write all of it; the hardware's copies see it after a fence only."""
        self.program.begin(self.slot)
        self.tensor.copy_(value.as_subclass(Tensor))
        self.program.end(self.slot)
        self.slot.unfenced.add(self.program.me)
        self.program.mine.written.append(self.slot)


class Barrier:
    """An mbarrier: a phase ends once so many have arrived and all bytes that were expected have come."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0
        self.clock: Clock = {}

    def begin(self, count: int) -> None:
        """What initialising it does."""
        self.count = self.missing = count

    def change(self, arrivals: int, transferred: int, clock: Clock) -> None:
        """Some arrive, or bytes are expected (positive) or have come (negative); what they know goes with it."""
        with self.condition:
            merge(self.clock, clock)
            self.missing -= arrivals
            self.bytes += transferred
            if self.missing < 0:
                raise RuntimeError("more have arrived at a barrier than it counts")
            if self.missing == 0 and self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
            self.condition.notify_all()

    def wait(self, parity: int, clock: Clock) -> None:
        """Until the phase of that parity has ended; what those who arrived know is known then."""
        with self.condition:
            if not self.condition.wait_for(lambda: self.phase & 1 != parity, DEADLOCK_SECONDS):
                raise RuntimeError(f"deadlock: nobody ends phase {self.phase} of a barrier")
            merge(clock, self.clock)


def merge(clock: Clock, other: Clock) -> None:
    """Know what another knows."""
    for key, time in other.items():
        clock[key] = max(time, clock.get(key, 0))


class Barriers:
    """Several of them."""

    def __init__(self, count: int) -> None:
        self.each = [Barrier() for _ in range(count)]

    def index(self, place: Any) -> Barrier:
        """One of them."""
        return self.each[int(place)]


class Running:
    """A matrix instruction under way; it reads its operands when it is waited for."""

    type = SimpleNamespace(layout=None)

    def __init__(self, compute: Callable[[], Number], slots: list[Slot]) -> None:
        self.compute, self.slots = compute, slots
        self.result: Number | None = None


# ---------------------------------------------------------------------- one program


class Partition:
    """What belongs to one partition of warps: what it knows, and what it has not waited for."""

    def __init__(self, name: Hashable) -> None:
        self.name = name
        self.clock: Clock = {}
        self.products: list[Running] = []
        self.stores: list[tuple[Callable[[], None], Slot]] = []
        self.written: list[Slot] = []


class Program:
    """One program, and what its partitions do."""

    def __init__(self, index: int, programs: int) -> None:
        self.index, self.programs = index, programs
        self.local = threading.local()
        self.errors: list[BaseException] = []

    @property
    def mine(self) -> Partition:
        """The partition that asks."""
        if "partition" not in self.local.__dict__:
            self.local.partition = Partition("before")
        return self.local.partition

    @property
    def me(self) -> Hashable:
        """The name of the partition that asks."""
        return self.mine.name

    def begin(self, slot: Slot) -> None:
        """An access begins: the copy into the buffer must be known to have ended."""
        if self.mine.clock.get(slot, 0) != slot.copies:
            raise RuntimeError(f"partition {self.me} uses a buffer that it does not know to be filled")
        slot.running.append(self.me)

    def end(self, slot: Slot) -> None:
        """An access has ended."""
        slot.running.remove(self.me)
        self.mine.clock[self.me] = self.mine.clock.get(self.me, 0) + 1
        slot.accesses[self.me] = self.mine.clock[self.me]

    def copy_in(self, descriptor: Descriptor, place: Sequence[Any], barrier: Barrier, buffer: Buffer) -> None:
        """The hardware fills a buffer: nobody may use it any more, and that must be known here."""
        slot, known = buffer.slot, self.mine.clock
        late = [who for who, time in slot.accesses.items() if who != self.me and time > known.get(who, 0)]
        if slot.running or late:
            raise RuntimeError(f"partition {self.me} fills a buffer that {(slot.running + late)[0]} may still use")
        slot.copies += 1
        buffer.tensor.copy_(descriptor.read(place))
        barrier.change(0, -descriptor.block_type.nbytes, {slot: slot.copies})

    def copy_out(self, descriptor: Descriptor, place: Sequence[Any], buffer: Buffer) -> None:
        """The hardware will have read a buffer once it has been waited for."""
        if buffer.slot.unfenced:
            raise RuntimeError("the hardware copies out what has been written without a fence after it")
        place = [int(each) for each in place]
        self.begin(buffer.slot)
        self.mine.stores.append((lambda: descriptor.write(place, buffer.tensor), buffer.slot))

    def store_wait(self, pending: int) -> None:
        """Until so many copies out are unfinished."""
        while len(self.mine.stores) > pending:
            store, slot = self.mine.stores.pop(0)
            store()
            self.end(slot)

    def fence(self) -> None:
        """Let the hardware see what this partition has written into shared memory."""
        while self.mine.written:
            self.mine.written.pop().unfenced.discard(self.me)

    def multiply(self, a: Any, b: Buffer, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Any:
        """A matrix instruction of a warp group."""

        def compute() -> Number:
            left = a.tensor if isinstance(a, Buffer) else a.as_subclass(Tensor)
            product = left.float() @ b.tensor.float()
            return number(product + acc.as_subclass(Tensor) if use_acc else product)

        slots = [operand.slot for operand in (a, b) if isinstance(operand, Buffer)]
        for slot in slots:
            self.begin(slot)
        self.mine.products.append(Running(compute, slots))
        return self.mine.products[-1] if is_async else self.multiply_wait(0, [self.mine.products[-1]])

    def multiply_wait(self, outstanding: int, deps: Sequence[Any]) -> Any:
        """Until so many matrix instructions are unfinished."""
        while len(self.mine.products) > outstanding:
            product = self.mine.products.pop(0)
            product.result = product.compute()
            for slot in product.slots:
                self.end(slot)
        results = [each.result if isinstance(each, Running) else each for each in deps]
        if any(each is None for each in results):
            raise RuntimeError("a product is used that has not been waited for")
        return results[0] if len(results) == 1 else tuple(results)

    def specialize(self, parts: Sequence[tuple[Callable[..., Any], Sequence[Any]]], warps: Any, registers: Any) -> None:
        """Run partitions beside each other. What they know is known afterwards."""
        before = self.mine.clock
        partitions = [Partition(index) for index in range(len(parts))]

        def run(partition: Partition, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
            self.local.partition = partition
            merge(partition.clock, before)
            try:
                function(*arguments)
                if partition.stores or partition.products:
                    raise RuntimeError("a partition ends with work that nobody has waited for")
            except BaseException as error:
                self.errors.append(error)

        pairs = zip(partitions, parts, strict=True)
        threads = [threading.Thread(target=run, args=(partition, *part)) for partition, part in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        for partition in partitions:
            merge(before, partition.clock)

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        """Shared memory with nothing sensible in it; barriers where the layout is theirs."""
        if layout == "barriers":
            return Barriers(shape[0])
        nonsense = float("nan") if dtype.is_floating_point else -(2**30)
        return Buffer(self, torch.full(tuple(shape), nonsense, dtype=dtype), defaultdict(Slot))


# ---------------------------------------------------------------------- the language


def language(program: Program) -> dict[str, Any]:
    """The names that a Gluon module imports, for one program."""

    def reduce(operation: Callable[..., Tensor]) -> Callable[[Tensor, int], Number]:
        return lambda tensor, axis: number(operation(tensor.as_subclass(Tensor), axis))

    def pair(operation: Callable[..., Tensor]) -> Callable[[Any, Any], Number]:
        return lambda a, b: number(operation(torch.as_tensor(a), torch.as_tensor(b)))

    def nothing(*arguments: Any) -> None:
        return None

    layouts = ("Blocked", "Slice", "NVMMADistributed", "DotOperand", "SwizzledShared")
    gl = SimpleNamespace(
        **{f"{name}Layout": nothing for name in layouts},
        constexpr=lambda value: value,
        float32=torch.float32,
        int32=torch.int32,
        int64=torch.int64,
        allocate_shared_memory=program.allocate,
        arange=lambda first, last, layout=None: number(torch.arange(first, last, dtype=torch.int32)),
        barrier=nothing,
        cast=lambda value, dtype: number(value).to(dtype),
        cdiv=lambda a, b: -(-a // b),
        convert_layout=lambda tensor, layout: tensor,
        exp2=torch.exp2,
        full=lambda shape, value, dtype, layout=None: number(torch.full(shape, value, dtype=dtype)),
        load=lambda pointer, mask=None, other=None: pointer.load(mask, other),
        log2=torch.log2,
        max=reduce(torch.amax),
        maximum=pair(torch.maximum),
        min=reduce(torch.amin),
        minimum=pair(torch.minimum),
        num_programs=lambda axis: program.programs,
        num_warps=lambda: 1,
        program_id=lambda axis: number(program.index),
        static_range=range,
        store=lambda pointer, value, mask=None: pointer.store(value, mask),
        sum=reduce(torch.sum),
        warp_specialize=program.specialize,
        where=lambda condition, a, b: number(torch.where(torch.as_tensor(condition), a, b)),
        zeros=lambda shape, dtype, layout=None: number(torch.zeros(shape, dtype=dtype)),
    )
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=lambda barrier, count: barrier.begin(count),
        expect=lambda barrier, size: barrier.change(1, size, program.mine.clock),
        arrive=lambda barrier, count=1: barrier.change(count, 0, program.mine.clock),
        wait=lambda barrier, phase, pred=True: barrier.wait(int(phase), program.mine.clock) if pred else None,
    )
    tma = SimpleNamespace(async_load=program.copy_in, async_store=program.copy_out, store_wait=program.store_wait)
    return dict(
        Any=Any,
        NamedTuple=NamedTuple,
        at_head=lambda operand, b, h: operand._replace(ptr=operand.ptr + b * operand.stride_b + h * operand.stride_h),
        fence_async_shared=program.fence,
        gl=gl,
        gluon=SimpleNamespace(jit=lambda function: function, constexpr_function=lambda function: function),
        mbarrier=mbarrier,
        range=lambda *bounds: map(number, builtins.range(*map(int, bounds))),
        settle_keys=lambda module: None,
        tma=tma,
        warpgroup_mma=program.multiply,
        warpgroup_mma_wait=program.multiply_wait,
    )


def simulate(source: str, kernel: str, programs: int, arguments: Mapping[str, Any]) -> None:
    """Run a kernel of a Gluon module, program after program.

    Args:
        source: the module's text; its imports are replaced.
        kernel: the kernel's name.
        programs: how many there are.
        arguments: by name; tensors stand for pointers, also within named tuples, `Descriptor`s for descriptors.

    Raises:
        RuntimeError: a deadlock, a race, a missing fence, an arrival too many, work that nobody waits for.
        IndexError: an access outside a tensor.
    """
    tree = ast.parse(source)
    tree.body = [each for each in tree.body if not isinstance(each, ast.Import | ast.ImportFrom)]
    code = compile(tree, f"<{kernel}>", "exec")
    given = {name: _operand(value) for name, value in arguments.items()}
    for index in range(programs):
        names = CONSTANTS | language(Program(index, programs))
        exec(code, names)
        names[kernel](**given)


def _operand(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer.to(value)
    return type(value)(*map(_operand, value)) if isinstance(value, tuple) else value
