# SPDX-License-Identifier: Apache-2.0
"""transformers' mask arguments to spans: the AttentionMaskInterface function.

transformers describes a mask as a `mask_function(batch, head, q_idx, kv_idx)`, a closure put together from a few known
ones. Those are recognised by their code and read as spans, row by row in closed form, without touching a
`query_len x key_len` array and without reading anything back from the device. Any other function is evaluated a few
rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import masking_utils

from attention_kernels import Spans
from attention_kernels.checks import is_one_or
from attention_kernels.spans import is_traced

from .reading import Frame, read_chunks, read_spans
from .support import (
    log_once,
    may_compute_with_masks,
    measures_masks,
    needs_tensor,
    negates_masks,
    refuse_foreign_use,
    refuse_model,
    refuse_padding_mask,
    refuse_writing,
)
from .symbolic import recognise

WRITING = [f"__{name}__" for name in "setitem iadd isub imul itruediv ifloordiv ipow iand ior ixor".split()]
"""Operators that change a tensor in place."""

CHUNK_ELEMENTS = 1 << 22
"""Elements of an unknown mask function that are evaluated at once."""


@dataclass(eq=False)
class SpanMask:
    """What travels through a model as its attention mask: spans, and the little of a tensor that models ask of a mask.

    Attributes:
        spans: what each row sees.
        attended: bool `[batch, key_len]`, the 2D attention mask, or None: which tokens are real.
        holes: bool `[batch, 1, query_len, key_len]` or None; a mask whose rows see more than one run of keys. The
            kernels apply it on top of `spans`.
        batch_size: batch of the scores that it is for, as `spans` have a batch of 1 where all sequences share them;
            None: that of the spans.
        everything: whether it hides nothing but padding, and transformers would leave it out without padding. Then it
            holds for any number of keys: some models attend to more keys than they asked a mask for.
        dense_dtype: dtype of the dense mask that a model is given if it computes with its mask; None if that is
            refused. See `computed_with`.
        chunks: size of the chunks that `spans` are cut into, and the spans without them. None if there are no chunks,
            and for a batch or a single query, where lengths of documents cannot be given.
    """

    spans: Spans
    attended: Tensor | None = None
    holes: Tensor | None = None
    batch_size: int | None = None
    everything: bool = False
    dense_dtype: torch.dtype | None = None
    chunks: tuple[int, Spans] | None = None
    _dense: Tensor | None = field(default=None, repr=False)
    _dense_version: int = field(default=0, repr=False)
    _packed: tuple[Tensor, Spans] | None = field(default=None, repr=False)

    @property
    def shape(self) -> torch.Size:
        """`[batch, 1, query_len, key_len]`, as that of a dense mask."""
        return torch.Size((self.batch_size or self.spans.batch, 1, self.spans.query_len, self.spans.key_len))

    @property
    def ndim(self) -> int:
        """Always 4."""
        return 4

    @property
    def device(self) -> torch.device:
        """Where the spans live."""
        return self.spans.device

    def dim(self) -> int:
        """Always 4."""
        return 4

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape, or one number of it."""
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> SpanMask | Tensor:
        """The mask itself, or what a model has made of it: `generate` asks for this with a static cache."""
        return self if self.rewritten is None else self.rewritten.contiguous()

    def to(self, *args: Any, **kwargs: Any) -> SpanMask | Tensor:
        """On another device. A change of dtype has no meaning for spans and is ignored; what was rewritten has one."""
        if self.rewritten is not None:
            return self.rewritten.to(*args, **kwargs)
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is None or device == self.device:
            return self
        attended, holes = (None if part is None else part.to(device) for part in (self.attended, self.holes))
        chunks = None if self.chunks is None else (self.chunks[0], self.chunks[1].to(device))
        spans = self.spans.to(device)
        return replace(self, spans=spans, attended=attended, holes=holes, chunks=chunks, _dense=None, _packed=None)

    def to_dense(self) -> Tensor:
        """The boolean mask `[batch or 1, 1, query_len, key_len]` that transformers' `sdpa_mask` would have built."""
        dense = self.spans.to_dense()[:, None]
        return dense if self.holes is None else dense & self.holes

    @property
    def counts_chunks(self) -> bool:
        """Whether its chunks can be counted anew, from the first token of each document. What a model wrote stays."""
        return self.chunks is not None and self.rewritten is None

    def without_chunks(self) -> SpanMask:
        """The mask as it was before its spans were cut into chunks; for masks that have some."""
        assert self.chunks is not None
        return replace(self, spans=self.chunks[1], chunks=None, _dense=None, _packed=None)

    def fitted(self, query_len: int, key_len: int) -> SpanMask:
        """The mask for scores of this size: a single row or column is repeated, as a tensor's would be.

        Some models describe padding by a mask of one query, and `generate` in pieces describes an encoder by a mask of
        one key. A mask that hides nothing fits any scores.
        """
        own = self.spans
        if self.everything and (own.query_len, own.key_len) != (query_len, key_len):
            repeats = is_one_or(own.query_len, query_len) and is_one_or(own.key_len, key_len)
            if self.attended is None or (not repeats and self._shows_all_tokens(key_len)):
                return SpanMask(Spans.full(query_len, key_len, device=self.device))
        repeats_row, repeats_column = own.query_len == 1 != query_len, own.key_len == 1 != key_len
        if not repeats_row and not repeats_column:
            return self
        query_len = query_len if repeats_row else own.query_len
        if not repeats_column:
            return replace(self, spans=replace(own, query_len=query_len), _dense=None, _packed=None)
        shown = own.end > own.start if own.key_mask is None else (own.end > own.start) & own.key_mask
        end = torch.where(shown, key_len, 0).to(torch.int32)
        spans = Spans(torch.zeros_like(end), end, query_len, key_len)
        return replace(self, spans=spans, attended=None, _dense=None, _packed=None)

    def _shows_all_tokens(self, key_len: int) -> bool:
        """Whether the 2D mask hides no token. It looks: transformers does, too, where it may leave a mask out."""
        assert self.attended is not None
        if is_traced(self.attended) or self.attended.is_meta or not bool(self.attended.all()):
            return False
        log_once(
            f"a 2D mask that hides none of {self.attended.shape[1]} tokens is taken to hide none of the {key_len} keys "
            "of a layer, as under eager attention; what is padding beyond them cannot be told"
        )
        return True

    def spans_within_documents(self, position_ids: Tensor) -> Spans:
        """The spans, cut at the boundaries of packed documents that `position_ids` `[batch or 1, query_len]` show.

        transformers finds packed documents only where there is no 2D mask. Positions that go back, between two attended
        tokens, are as clear a sign beside one. All layers of a model hand in the same tensor, so the answer is kept.
        """
        if self._packed is not None and self._packed[0] is position_ids:
            return self._packed[1]
        spans = self.spans & Spans.packed(document_ids(position_ids, self.attended))
        if not torch.compiler.is_compiling():  # compilers find what is computed twice, and want no side effects
            self._packed = (position_ids, spans)
        return spans

    # A model that computes with its mask. One that leaves attention to transformers' interface is given what eager
    # attention would have been given, and goes on with the tensor that it makes of it. Any other computes attention
    # itself: it must not go on with an object that it misunderstands, and Python's TypeError would help nobody.
    def computed_with(self, operation: str, error: type[Exception] = TypeError, *, writes: bool = False) -> Tensor:
        """The additive mask of eager attention, `[batch, 1, query_len, key_len]`, for a model to compute with.

        Args:
            operation: that is applied, in words.
            error: that is raised where the model is not known to leave attention to transformers' interface.
            writes: whether the operation changes the mask in place. The next one finds what it has written.

        Raises:
            `error`: as said.
            RuntimeError: it would write in compiled code, where that would be lost. Unless it was asked for the whole
                graph, torch.compile then leaves the operation to Python.
        """
        if self.dense_dtype is None:
            refuse_foreign_use(operation, error)
        log_once(f"a model applied {operation} to its attention mask: it is given a dense one, a number for each score")
        if torch.compiler.is_compiling():  # as for `spans_within_documents`
            if writes:
                refuse_writing(operation)
            return self._as_eager_has_it() if self._dense is None else self._dense
        if self._dense is None:
            with torch.inference_mode(False):  # in which torch would not count what is written to it
                self._dense = self._as_eager_has_it().contiguous()
            self._dense_version = self._dense._version
        return self._dense

    def _as_eager_has_it(self) -> Tensor:
        dense = self.to_dense()
        if self.dense_dtype is not None and self.dense_dtype != torch.bool:
            dense = additive(dense, self.dense_dtype)
        return dense.expand(self.shape)

    @property
    def rewritten(self) -> Tensor | None:
        """What a model has made of the dense mask by writing to it, which holds from then on; None where none has.

        In code that is compiled nobody can tell, so there it is what the model was given before, if it was.
        """
        if self._dense is None or torch.compiler.is_compiling():
            return self._dense
        return None if self._dense._version == self._dense_version else self._dense

    def __getstate__(self) -> dict[str, Any]:
        """Without the dense mask, unless a model has written to it: the version of a copy tells nothing."""
        return self.__dict__ | ({"_dense": None} if self.rewritten is None else {"_dense_version": -1})

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        if name == "tag_activation_checkpoint":  # torch.compile's checkpointing: carries the mask, computes nothing
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        args, kwargs = tree_map(
            lambda part: part.computed_with(name) if isinstance(part, cls) else part, (args, kwargs)
        )
        return function(*args, **(kwargs or {}))

    def _computed(name: str) -> Callable:  # type: ignore[misc]
        def method(self: SpanMask, *args: Any) -> Any:
            return getattr(self.computed_with("an operator", writes=name in WRITING), name)(*args)

        return method

    for _name in """
        add radd sub rsub mul rmul matmul rmatmul truediv rtruediv floordiv rfloordiv pow rpow neg abs and rand or ror
        xor rxor invert eq ne lt le gt ge bool float int getitem contains iter len
    """.split():
        locals()[f"__{_name}__"] = _computed(f"__{_name}__")
    for _name in WRITING:
        locals()[_name] = _computed(_name)
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "dtype" and self.dense_dtype is not None:
            return self.dense_dtype
        writes = name.endswith("_")  # by torch's convention
        return getattr(self.computed_with(f"`.{name}`", error=AttributeError, writes=writes), name)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as eager attention takes it: 0 where visible, else the least number of `dtype`."""
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)


def span_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | SpanMask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    **kwargs: Any,
) -> SpanMask | Tensor | None:
    """The mask that transformers asks for, as spans. Registered in `AttentionMaskInterface`.

    Args:
        batch_size, q_length, kv_length: sizes of the scores.
        q_offset: position of the first query; a tensor with a static cache, which is never read back.
        kv_offset: position of the first key (sliding caches forget the oldest).
        mask_function: transformers' description of the mask.
        attention_mask: `[batch, tokens]`, 0 at padding, or None; a mask that was prepared in advance is returned as it
            is.
        use_vmap: whether `mask_function` holds a user's function that may not be index-based.
        config: the model's configuration; used to refuse models that compute attention themselves.
        dtype: of the additive mask that eager attention would be given.
        allow_is_bidirectional_skip: whether no mask is needed where everything is visible.
        local_size: keys of the window or chunk that `mask_function` stands for, if it does.
        kwargs: what transformers hands to other implementations.

    Raises:
        ValueError: `attention_mask` is of another shape, or the model's attention cannot be replaced.

    Returns:
        The mask; as an additive tensor for a model that would pass over anything else; None, where nothing is hidden,
        for a model that would stumble over its sizes.
    """
    refuse_model(config)
    if isinstance(attention_mask, SpanMask):  # prepared in advance, by `generate` with a static cache for example
        return attention_mask
    if isinstance(attention_mask, Tensor) and not (
        attention_mask.ndim == 2 and is_one_or(attention_mask.shape[0], batch_size)
    ):
        refuse_padding_mask(attention_mask, batch_size)
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
    mask = _read_mask(*sizes, mask_function, attention_mask, use_vmap, torch.device(device))
    # A window that is wider than there are keys hides none of them.
    shows_all = mask_function is masking_utils.bidirectional_mask_function or kv_length < (local_size or 0)
    everything = allow_is_bidirectional_skip and shows_all
    mask.batch_size, mask.everything = batch_size, everything
    if config is None or not may_compute_with_masks(config):
        return mask
    if everything and attention_mask is None and measures_masks(config):
        return None
    mask.dense_dtype = torch.bool if negates_masks(config) else dtype
    if not needs_tensor(config):
        return mask
    return mask.computed_with("columns of its own")


def _read_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable,
    attention_mask: Tensor | None,
    use_vmap: bool,
    device: torch.device,
) -> SpanMask:
    """What a mask function and a 2D mask hide together, as spans where the function is known, else as it evaluates."""
    padding = None
    if attention_mask is not None:
        padding = _key_padding(attention_mask.to(device=device, dtype=torch.bool), kv_length, kv_offset)
    frame = Frame(batch_size, q_length, kv_length, q_offset, kv_offset, device)
    # A compiler cannot look into the closures of functions that it traces; it can call them.
    known = recognise(mask_function) if torch.compiler.is_dynamo_compiling() else mask_function
    if known is not None and (spans := read_spans(known, frame)) is not None:
        # Chunks are counted anew only where lengths of documents are given, which describe a batch of 1.
        chunks = read_chunks(known, frame) if batch_size == 1 != q_length else None
        if chunks is not None:
            chunks = chunks[0], _padded(chunks[1], padding, frame)
        return SpanMask(_padded(spans, padding, frame), padding, chunks=chunks)
    name = mask_function.__qualname__ if hasattr(mask_function, "__qualname__") else type(mask_function).__qualname__
    log_once(
        f"the mask function {name!r} cannot be read as spans: it is evaluated for every query and key, some rows at a "
        "time"
    )
    return replace(evaluate(mask_function, frame, attention_mask, use_vmap), attended=padding)


def _padded(spans: Spans, padding: Tensor | None, frame: Frame) -> Spans:
    """Spans without the keys that are padding.

    For static caches their shapes do not depend on the values of the padding: a step is compiled once, and the shapes
    of its mask are part of what is compiled. Without this the step that fills the cache would be another one.
    """
    if padding is None:
        return spans
    spans = spans & Spans.padded(padding, frame.query_len)
    if not isinstance(frame.q_offset, Tensor):
        return spans
    start, end = (bound.expand(frame.batch, -1).contiguous() for bound in (spans.start, spans.end))
    return replace(spans, start=start, end=end)


def _key_padding(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The part of a 2D mask that lies over the keys, bool `[batch, kv_length]`; keys beyond it are not attended to."""
    missing = kv_offset + kv_length - attention_mask.shape[1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


# ---------------------------------------------------------------------- other mask functions, packing


def evaluate(mask_function: Callable, frame: Frame, attention_mask: Tensor | None, use_vmap: bool) -> SpanMask:
    """Spans of any mask function, evaluated by transformers' own `sdpa_mask` a few rows at a time.

    Only where some row sees more than one run of keys is the boolean mask kept, one byte for each query and key; under
    tracing, where nobody can tell, it always is.
    """
    if is_traced(torch.empty(0, device=frame.device)):
        # The compiled code must hold for all values. For all rows at once, or their number would be part of it.
        dense = _dense_rows(mask_function, frame, attention_mask, use_vmap, 0, frame.query_len)
        return SpanMask(Spans(*_outer_bounds(dense), frame.query_len, frame.key_len), holes=dense[:, None])
    step = max(1, CHUNK_ELEMENTS // max(1, frame.batch * frame.key_len))
    pieces, starts, ends = [], [], []
    for row in range(0, frame.query_len, step):
        rows = min(step, frame.query_len - row)
        dense = _dense_rows(mask_function, frame, attention_mask, use_vmap, row, rows)
        spans = Spans.from_dense(dense)
        start, end = _outer_bounds(dense) if spans is None else (spans.start, spans.end)
        pieces.append(dense if spans is None else spans)
        starts.append(start)
        ends.append(end)
    spans = Spans(torch.cat(starts, 1), torch.cat(ends, 1), frame.query_len, frame.key_len)
    if all(isinstance(piece, Spans) for piece in pieces):
        return SpanMask(spans)
    log_once("a mask has rows that see more than one run of keys: it is kept dense, one byte for each query and key")
    holes = torch.cat([piece.to_dense() if isinstance(piece, Spans) else piece for piece in pieces], 1)
    return SpanMask(spans, holes=holes[:, None])


def _dense_rows(
    mask_function: Callable, frame: Frame, attention_mask: Tensor | None, use_vmap: bool, row: int, rows: int
) -> Tensor:
    """The boolean mask `[batch, rows, key_len]` of some rows, beginning with `row`."""
    if attention_mask is not None:
        attention_mask = attention_mask.to(frame.device, torch.bool)
    arguments: dict[str, Any] = {
        "batch_size": frame.batch,
        "q_length": rows,
        "kv_length": frame.key_len,
        "q_offset": frame.q_offset + row,
        "kv_offset": frame.kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": False,
        "use_vmap": use_vmap,
        "device": frame.device,
    }
    dense = masking_utils.sdpa_mask(**arguments)
    assert dense is not None  # it skips no mask unless asked to
    return dense[:, 0]


def _outer_bounds(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First visible key of each row and one past the last, whatever lies between; int32 `[batch, rows]`."""
    key_len = mask.shape[-1]
    index = torch.arange(key_len, device=mask.device, dtype=torch.int32)
    return torch.where(mask, index, key_len).amin(-1), torch.where(mask, index + 1, 0).amax(-1)


def document_ids(position_ids: Tensor, attended: Tensor | None) -> Tensor:
    """Number of the document that each token belongs to, int64 `[batch, tokens]`.

    A document begins where the position is 0 once more, or that of the row's first token, in rows whose positions count
    on by one everywhere else: other positions that go back (branches of a tree, groups of tokens that share one) are no
    packing. Positions of padding mean nothing and begin no document.
    """
    tokens = position_ids.shape[1]
    if attended is None:
        attended = torch.ones_like(position_ids, dtype=torch.bool)
    batch = max(position_ids.shape[0], attended.shape[0])
    position_ids, attended = position_ids.expand(batch, -1), attended.expand(batch, -1)
    index = torch.arange(tokens, device=position_ids.device)
    last_attended = torch.where(attended, index, -1).cummax(1).values
    before = torch.where(index == 0, -1, last_attended.roll(1, 1))
    previous = position_ids.gather(1, before.clamp(min=0))
    first = position_ids.gather(1, attended.int().argmax(1, keepdim=True))
    has_previous = attended & (before >= 0)
    restarts = has_previous & ((position_ids == 0) | (position_ids == first)) & (position_ids <= previous)
    step = position_ids - previous  # one, or more where padding between them was counted
    regular = ~has_previous | restarts | (step == 1) | (step == index - before)
    counts = attended & (position_ids > first.clamp(min=0))  # as positions that are all the same do not
    is_packed = regular.all(1, keepdim=True) & counts.any(1, keepdim=True)
    return (restarts & is_packed).cumsum(1)
