# SPDX-License-Identifier: Apache-2.0
"""The loop over spans in plain torch: what CPU tensors run, and devices that Triton does not serve.

The rows are cut into pieces that see a simple part of the keys: a rectangle, a causal triangle or a band without any
mask, or a tile with a small one (`pieces`). On the CPU a piece runs torch's own fused attention where that can express
it (`fused`); everything else (softcap, dropout, gradients of a bias, other devices, NaN among the inputs) runs a
softmax over the tile (`written_out`). Partial results over disjoint keys are merged by their log-sum-exp (`attend`;
`gradients` is the backward pass). Decoding goes a shorter way (`tokens`), and so do calls like one that was checked
before (`remembered`). Memory grows with tokens, never with their square.
"""

from .attend import forward
from .gradients import backward
from .problem import Problem, accumulator, how_to_share

__all__ = ["Problem", "accumulator", "backward", "forward", "how_to_share"]
