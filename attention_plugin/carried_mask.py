# SPDX-License-Identifier: Apache-2.0
"""`SpanMask`, what travels through a model as its attention mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from attention_kernels import Spans
from attention_kernels.checks import is_one_or
from attention_kernels.spans import is_traced

from .documents import document_ids
from .support import log_once, refuse_foreign_use, refuse_writing

READING = [f"__{name}__" for name in """
    add radd sub rsub mul rmul matmul rmatmul truediv rtruediv floordiv rfloordiv pow rpow neg abs and rand or ror xor
    rxor invert eq ne lt le gt ge bool float int getitem contains iter len
""".split()]  # fmt: skip
"""Operators that leave a tensor as it is."""

WRITING = [f"__{name}__" for name in "setitem iadd isub imul itruediv ifloordiv ipow iand ior ixor".split()]
"""Operators that change a tensor in place."""


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

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or hasattr(type(self), name):  # or an error inside a property would be the model's
            raise AttributeError(name)
        if name == "dtype" and self.dense_dtype is not None:
            return self.dense_dtype
        writes = name.endswith("_")  # by torch's convention
        return getattr(self.computed_with(f"`.{name}`", error=AttributeError, writes=writes), name)


def _computed(name: str) -> Callable[..., Any]:
    """An operator of `SpanMask`: that of the dense mask. Python looks for operators in the class alone."""

    def method(self: SpanMask, *args: Any) -> Any:
        return getattr(self.computed_with("an operator", writes=name in WRITING), name)(*args)

    return method


for _name in [*READING, *WRITING]:
    setattr(SpanMask, _name, _computed(_name))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as eager attention takes it: 0 where visible, else the least number of `dtype`."""
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)
