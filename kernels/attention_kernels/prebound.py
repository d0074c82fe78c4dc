# SPDX-License-Identifier: Apache-2.0
"""Launching again what was launched before: kernels already compiled, with other tensors of the same kind.

The layers of a model make the same call with tensors that differ in their addresses alone. Checking arguments, choosing
tiles and having Triton find the compiled kernel takes several times as long as handing it the addresses. So what the
first call of a kind launches is recorded, and remembered by all that the checks and Triton's specialisation look at:
shapes, strides, dtypes, devices and numbers. Addresses count by whether 16 divides them: only such calls are
remembered.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .spans import Spans

if TYPE_CHECKING:
    from .launch import Recording
    from .tiles import SpanOperand

ALIGNMENT = 15
"""Bits of an address that are 0 where Triton takes it as divisible by 16."""

MOST_TAPES = 64
"""Kinds of calls that are remembered. A growing cache makes a new kind with every token."""

Results = tuple[Any, ...]
"""Tensors, or None where one is not wanted."""

_tapes: dict[tuple, Tape] = {}
_known_spans: WeakKeyDictionary[Spans, KnownSpans | None] = WeakKeyDictionary()


class KnownSpans(NamedTuple):
    """Spans as kernels take them.

    Attributes:
        kind: shapes, strides, dtypes and devices of their tensors, which decide the kernels that serve them.
        operand: what kernels are given; None for kernels that take no spans.
    """

    kind: tuple
    operand: SpanOperand | None

    def are(self, *tensors: Tensor | None) -> bool:
        """Whether the spans are made of these tensors: hooks for saved tensors may have given back copies."""
        return self.operand is not None and all(
            given is None or given.data_ptr() == known.data_ptr()
            for given, known in zip(tensors, _tensors_of(self.operand), strict=True)
        )


def _tensors_of(spans: SpanOperand) -> tuple[Any, ...]:
    return spans.start_ptr, spans.end_ptr, spans.key_mask_ptr, spans.gap_count_ptr


NO_SPANS = KnownSpans((), None)
"""For kernels that take no spans."""


class Step(NamedTuple):
    """One launch: a compiled kernel bound to its grid, and how its arguments are filled in for a new call.

    Most arguments are the same in every call. Each that is not is filled from one of the call's sources, which are
    counted from 0: the spans, then the inputs, then the memory that was taken (see `Sources`).
    """

    run: Callable[..., object]
    arguments: list[Any]
    """The arguments in order; None where one differs from call to call."""
    whole: list[tuple[int, int]]
    """For arguments that are a source as it is: place among the arguments, and the source."""
    operands: list[tuple[int, int, type[tuple], tuple]]
    """For operands (`tiles.Operand` and its like): place, source of the tensor, kind of operand, the rest of it."""
    descriptors: list[tuple[int, int, Any]]
    """For TMA descriptors: place, source of the tensor, and a descriptor like it without a tensor."""


class Tape:
    """What was launched for one call, to be launched again for others of its kind."""

    def __init__(
        self, recorded: Recording, spans: SpanOperand | None, inputs: Sequence[Tensor | None], results: Results
    ):
        """Of a call that has been made.

        Args:
            recorded: the launches of the call, and the memory that it took.
            spans: its spans, if it has some.
            inputs: its other tensors, in the order in which later calls give theirs; the first is on its device.
            results: what it returned: inputs, recorded memory, or None. An empty tensor from elsewhere counts as None.

        Raises:
            LookupError: kernels took something besides these that may differ from call to call.
        """
        sources = Sources([spans, *inputs, *recorded.memory])
        self.memory = [(each.shape, each.stride(), each.dtype) for each in recorded.memory]
        self.results = [
            None if each is None or not (each.numel() or sources.has(each)) else sources.of(each) for each in results
        ]
        self.steps = [
            Step(compiled[(*grid, 1, 1)[:3]], *_without_tensors(arguments, spans, sources))
            for compiled, grid, arguments in recorded.kernels
        ]
        assert inputs[0] is not None
        device = inputs[0].device
        self.device_type, self.device_index = device.type, device.index

    def __call__(self, spans: SpanOperand | None, inputs: Sequence[Tensor | None]) -> Results | None:
        """Launch for another call and return its results; None if new memory is not aligned as the kernels need it."""
        given: list[Any] = [spans, *inputs]
        like, addresses = given[1], 0
        for shape, strides, dtype in self.memory:
            memory = like.new_empty_strided(shape, strides, dtype=dtype)
            addresses |= memory.data_ptr()
            given.append(memory)
        if addresses & ALIGNMENT:
            return None
        # Triton launches on the current device.
        if self.device_index is None or torch.cuda.current_device() == self.device_index:
            self._launch(given)
        else:
            with torch.cuda.device(self.device_index):
                self._launch(given)
        return tuple([None if source is None else given[source] for source in self.results])

    def _launch(self, given: list[Any]) -> None:
        new = tuple.__new__  # a named tuple's own takes twice as long
        for run, template, whole, operands, descriptors in self.steps:
            arguments = template.copy()
            for place, source in whole:
                arguments[place] = given[source]
            for place, source, operand, rest in operands:
                arguments[place] = new(operand, (given[source], *rest))
            for place, source, like in descriptors:
                arguments[place] = _of_tensor(like, given[source])
            run(*arguments)


class Sources:
    """From which of a call's sources a tensor among a kernel's arguments comes; sources are counted from 0."""

    def __init__(self, given: Sequence[Any]) -> None:
        """The spans, the inputs and the memory of a call, in this order.

        Raises:
            LookupError: a tensor is among them twice, which it need not be in the next call.
        """
        self.known = {id(each): source for source, each in enumerate(given) if each is not None}
        if len(self.known) < sum(each is not None for each in given):
            raise LookupError("a tensor was given twice")
        self.addresses: dict[int, list[int]] = {}
        for source, each in enumerate(given):
            if isinstance(each, Tensor):
                self.addresses.setdefault(each.data_ptr(), []).append(source)

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is itself a source."""
        return id(tensor) in self.known

    def of(self, tensor: Tensor) -> int:
        """The source that a tensor is, or that it is a view of.

        A view counts if it begins where the source does: a kernel sees its address, and the strides are arguments that
        do not differ between calls.

        Raises:
            LookupError: there is no such source, or several begin there.
        """
        if (source := self.known.get(id(tensor))) is not None:
            return source
        if len(several := self.addresses.get(tensor.data_ptr(), [])) != 1:
            raise LookupError("a tensor came from elsewhere, or begins where several do")
        return several[0]


def _without_tensors(arguments: list[Any], spans: SpanOperand | None, sources: Sources) -> tuple:
    """The fields of a `Step` after `run`, from the arguments that a kernel was launched with.

    Raises:
        LookupError: an argument may hold an address, and comes from none of the sources.
    """
    template: list[Any] = []
    whole, operands, descriptors = [], [], []
    for place, argument in enumerate(arguments):
        fixed = all(each is None or isinstance(each, int | float | str) for each in _parts(argument))
        template.append(argument if fixed else None)
        if fixed:
            continue
        if spans is not None and isinstance(argument, type(spans)):
            whole.append((place, 0))
        elif isinstance(argument, Tensor):
            whole.append((place, sources.of(argument)))
        elif isinstance(argument, tuple):
            tensor, *rest = argument
            operands.append((place, sources.of(tensor), type(argument), tuple(rest)))
        elif hasattr(argument, "block_shape"):
            descriptors.append((place, sources.of(argument.base), _of_tensor(argument, None)))
        else:
            raise LookupError(f"{type(argument)} may hold addresses")
    return template, whole, operands, descriptors


def _parts(argument: Any) -> tuple:
    return argument if isinstance(argument, tuple) else (argument,)


def _of_tensor(descriptor: Any, tensor: Tensor | None) -> Any:
    """A copy of a descriptor for another tensor, or none; `copy` spares the checks, which the first one has passed."""
    other = copy.copy(descriptor)
    other.base = tensor
    return other


def kind_of(spans: KnownSpans, inputs: Sequence[Tensor | None], asked: tuple) -> tuple | None:
    """All that decides how a call is checked and which kernels serve it; None unless 16 divides every address.

    Args:
        spans: its spans.
        inputs: its other tensors; None for those that it does without.
        asked: its numbers and flags, with the name of the pass.
    """
    kind: list[Any] = [spans.kind, asked]
    addresses = 0
    for each in inputs:
        if each is None:
            kind.append(None)
        else:
            addresses |= each.data_ptr()
            kind.append((each.shape, each.stride(), each.dtype, each.device))
    return None if addresses & ALIGNMENT else tuple(kind)


def find(spans: Spans, inputs: Sequence[Tensor | None], asked: tuple) -> tuple[KnownSpans, Tape] | None:
    """The spans of a call, and the tape of an earlier one of its kind, if there is one.

    Query and key come first among its inputs.
    """
    if not _tapes or (known := known_spans(spans)) is None or (kind := kind_of(known, inputs, asked)) is None:
        return None
    tape, query, key = _tapes.get(kind), inputs[0], inputs[1]
    if tape is None or query is None or key is None:
        return None
    device_type = tape.device_type
    if torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) != query.dtype:
        return None
    # The kind holds the shapes of spans, in which a broadcast dimension does not show its length.
    fit = spans.query_len == query.shape[2] and spans.key_len == key.shape[2]
    return (known, tape) if fit else None


def launched(
    launch: Callable[[], Results | None], spans: KnownSpans | None, inputs: Sequence[Tensor | None], asked: tuple
) -> Results:
    """What `launch` returns, by calling it, or by launching again what it launched for another call of the kind.

    `launch` must do nothing but launch kernels (`launch.launch`), on these inputs and on memory that it takes
    (`launch.memory`). Of its results an empty tensor that is neither may come back as None.
    """
    if spans is None or torch.compiler.is_compiling() or (kind := kind_of(spans, inputs, asked)) is None:
        return launch() or ()
    tape = _tapes.get(kind)
    if tape is not None and (results := tape(spans.operand, inputs)) is not None:
        return results
    from .launch import recording  # imports Triton, which takes time

    if "torch._dynamo" in sys.modules:  # it might compile `launch`, and compiled code records nothing
        launch = torch.compiler.disable(launch)
    with recording() as recorded:
        results = launch() or ()
    # In the interpreter there is no compiled kernel to launch again.
    if recorded.kernels and all(compiled is not None for compiled, _, _ in recorded.kernels):
        remember(kind, recorded, spans.operand, inputs, results)
    return results


def remember(
    kind: tuple, recorded: Recording, spans: SpanOperand | None, inputs: Sequence[Tensor | None], results: Results
) -> None:
    """Keep the launches of a call for others of its kind, unless kernels took what only this call has."""
    try:
        tape = Tape(recorded, spans, inputs, results)
    except LookupError:
        return  # such as a contiguous copy of sinks, which each call makes anew
    if len(_tapes) >= MOST_TAPES:
        _tapes.clear()
    _tapes[kind] = tape


def forget() -> None:
    """Remember no call any more."""
    _tapes.clear()


def known_spans(spans: Spans) -> KnownSpans | None:
    """As `describe_spans`, looked up where the layers of a model share them: their tensors change in values alone."""
    try:
        return _known_spans[spans]
    except KeyError:
        known = _known_spans[spans] = describe_spans(spans.start, spans.end, spans.key_mask, spans.gap_count)
        return known


def describe_spans(start: Tensor, end: Tensor, key_mask: Tensor | None, gap_count: Tensor | None) -> KnownSpans | None:
    """Spans for calls that are to be remembered; None for unusual ones."""
    from .launch import span_operand

    tensors = [each for each in (start, end, key_mask, gap_count) if each is not None]
    if any(each.data_ptr() & ALIGNMENT or type(each) is not Tensor for each in tensors):
        return None
    if key_mask is not None and not key_mask.is_contiguous():
        return None  # the operand would be a copy, and so miss later changes
    kind = tuple((each.shape, each.stride(), each.dtype, each.device) for each in tensors)
    return KnownSpans(kind, span_operand(start, end, key_mask, gap_count))
