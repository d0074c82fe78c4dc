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
    """Spans as kernels take them, and what decides which kernels serve them."""

    kind: tuple
    operand: SpanOperand | None

    def are(self, *tensors: Tensor | None) -> bool:
        """Whether it is of these tensors: hooks for saved tensors may give back copies."""
        return self.operand is not None and all(
            given is None or given.data_ptr() == known.data_ptr()
            for given, known in zip(tensors, _tensors_of(self.operand), strict=True)
        )


def _tensors_of(spans: SpanOperand) -> tuple[Any, ...]:
    return spans.start_ptr, spans.end_ptr, spans.key_mask_ptr, spans.gap_count_ptr


NO_SPANS = KnownSpans((), None)
"""Of kernels that take none."""


class Step(NamedTuple):
    """A compiled kernel with its grid, its arguments, and where among these something goes that differs each time.

    What goes there is known by its number: the spans, then the inputs, then memory.
    """

    run: Callable[..., object]
    arguments: list[Any]
    whole: list[tuple[int, int]]
    """Places and numbers of what goes there as it is."""
    operands: list[tuple[int, int, type[tuple], tuple]]
    """Places and numbers of tensors that go there as operands; the kind of operand, and the rest of it."""
    descriptors: list[tuple[int, int, Any]]
    """Places and numbers of tensors whose tiles the hardware copies; descriptors of such, without a tensor."""


class Tape:
    """What was launched for one kind of call, to be launched for another."""

    def __init__(
        self, recorded: Recording, spans: SpanOperand | None, inputs: Sequence[Tensor | None], results: Results
    ):
        """Of a call that has been made.

        Args:
            recorded: while it was made.
            spans: its spans, if it has some.
            inputs: its other tensors, in the order in which they are given again; the first is on its device.
            results: what it gave: inputs, memory that was recorded, or None. Empty ones from elsewhere count as None.

        Raises:
            LookupError: kernels took something besides these that may differ from call to call.
        """
        things = [spans, *inputs, *recorded.memory]
        numbers = Numbers(things)
        self.memory = [(each.shape, each.stride(), each.dtype) for each in recorded.memory]
        self.results = [
            None if each is None or not (each.numel() or numbers.has(each)) else numbers.of(each) for each in results
        ]
        self.steps = [
            Step(compiled[(*grid, 1, 1)[:3]], *_without_tensors(arguments, spans, numbers))
            for compiled, grid, arguments in recorded.kernels
        ]
        assert inputs[0] is not None
        device = inputs[0].device
        self.device_type, self.device_index = device.type, device.index

    def __call__(self, spans: SpanOperand | None, inputs: Sequence[Tensor | None]) -> Results | None:
        """Results, or None if memory came to lie where the kernels were not compiled for."""
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
        return tuple([None if number is None else given[number] for number in self.results])

    def _launch(self, given: list[Any]) -> None:
        new = tuple.__new__  # a named tuple's own takes twice as long
        for run, template, whole, operands, descriptors in self.steps:
            arguments = template.copy()
            for place, number in whole:
                arguments[place] = given[number]
            for place, number, operand, rest in operands:
                arguments[place] = new(operand, (given[number], *rest))
            for place, number, like in descriptors:
                arguments[place] = _of_tensor(like, given[number])
            run(*arguments)


class Numbers:
    """Which of the things that are given is meant by a tensor among a kernel's arguments."""

    def __init__(self, things: Sequence[Any]) -> None:
        """Of the spans, the inputs and memory, in this order.

        Raises:
            LookupError: a tensor is among them twice, and need not be next time.
        """
        self.known = {id(each): number for number, each in enumerate(things) if each is not None}
        if len(self.known) < sum(each is not None for each in things):
            raise LookupError("a tensor was given twice")
        self.addresses: dict[int, list[int]] = {}
        for number, each in enumerate(things):
            if isinstance(each, Tensor):
                self.addresses.setdefault(each.data_ptr(), []).append(number)

    def has(self, tensor: Tensor) -> bool:
        """Whether it is one of them."""
        return id(tensor) in self.known

    def of(self, tensor: Tensor) -> int:
        """Of one of them, or of a view of it that begins where it does: kernels see an address, and strides beside it.

        Raises:
            LookupError: it is none of them, or one of several.
        """
        if (number := self.known.get(id(tensor))) is not None:
            return number
        if len(several := self.addresses.get(tensor.data_ptr(), [])) != 1:
            raise LookupError("a tensor came from elsewhere, or begins where several do")
        return several[0]


def _without_tensors(arguments: list[Any], spans: SpanOperand | None, numbers: Numbers) -> tuple:
    """All but the first of a `Step`; the arguments have None where something differs each time."""
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
            whole.append((place, numbers.of(argument)))
        elif isinstance(argument, tuple):
            tensor, *rest = argument
            operands.append((place, numbers.of(tensor), type(argument), tuple(rest)))
        elif hasattr(argument, "block_shape"):
            descriptors.append((place, numbers.of(argument.base), _of_tensor(argument, None)))
        else:
            raise LookupError(f"{type(argument)} may hold addresses")
    return template, whole, operands, descriptors


def _parts(argument: Any) -> tuple:
    return argument if isinstance(argument, tuple) else (argument,)


def _of_tensor(descriptor: Any, tensor: Tensor | None) -> Any:
    """A descriptor like another, which has been checked, of a tensor of the same kind or of none."""
    other = copy.copy(descriptor)
    other.base = tensor
    return other


def kind_of(spans: KnownSpans, inputs: Sequence[Tensor | None], asked: tuple) -> tuple | None:
    """All that decides how a call is checked and which kernels serve it; None unless 16 divides every address.

    Args:
        spans: its spans.
        inputs: its other tensors; None for those that it has not.
        asked: the rest of it.
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
    """What a call launches, if one of its kind has been checked and made; query and key come first among its inputs."""
    if not _tapes or (known := known_spans(spans)) is None or (kind := kind_of(known, inputs, asked)) is None:
        return None
    tape, query, key = _tapes.get(kind), inputs[0], inputs[1]
    if tape is None or query is None or key is None:
        return None
    device_type = tape.device_type
    if torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) != query.dtype:
        return None
    # Of spans that are broadcast the kind has no lengths.
    fit = spans.query_len == query.shape[2] and spans.key_len == key.shape[2]
    return (known, tape) if fit else None


def launched(
    launch: Callable[[], Results | None], spans: KnownSpans | None, inputs: Sequence[Tensor | None], asked: tuple
) -> Results:
    """What `launch` returns, by calling it, or by launching again what it launched for another call of the kind.

    It must do nothing but launch kernels (`launch.launch`), on these inputs and on memory of its own (`launch.memory`).
    An empty result that is neither may be None.
    """
    if spans is None or torch.compiler.is_compiling() or (kind := kind_of(spans, inputs, asked)) is None:
        return launch() or ()
    tape = _tapes.get(kind)
    if tape is not None and (results := tape(spans.operand, inputs)) is not None:
        return results
    from .launch import recording  # imports Triton, which takes time

    if "torch._dynamo" in sys.modules:  # of frames that it compiles nothing would be noted
        launch = torch.compiler.disable(launch)
    with recording() as recorded:
        results = launch() or ()
    # In the interpreter nothing is compiled.
    if recorded.kernels and all(compiled is not None for compiled, _, _ in recorded.kernels):
        remember(kind, recorded, spans.operand, inputs, results)
    return results


def remember(
    kind: tuple, recorded: Recording, spans: SpanOperand | None, inputs: Sequence[Tensor | None], results: Results
) -> None:
    """Launch again from now on, unless kernels took what only this call has."""
    try:
        tape = Tape(recorded, spans, inputs, results)
    except LookupError:
        return  # a copy of sinks with gaps
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
