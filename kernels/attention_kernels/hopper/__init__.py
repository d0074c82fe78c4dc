# SPDX-License-Identifier: Apache-2.0
"""The forward pass for Hopper GPUs in Gluon: no GPU has run it yet, so it is off until the GPU at hand has proven it.

`my-triton tune` compares it with float64 there, and where it is right and faster, calls that it serves run it from then
on. `enable()` switches it on unproven in this process, wherever the device and the call allow; other calls go on with
the Triton kernel, and why is logged once. `enable(False)` switches it off, proven or not. Tests run it in a simulation,
and compiled, on a machine for PTX.
"""

from __future__ import annotations

import torch

from ..tuned import gluon_key, tuned_rows

_wanted: bool | None = None


def enable(wanted: bool | None = True) -> None:
    """Run the forward pass in Gluon from now on, where it can be; False: never; None, as at first: where it is proven.

    Raises:
        RuntimeError: Triton has no Gluon here.
    """
    global _wanted
    if wanted:
        try:
            from . import gluon_forward  # noqa: F401
        except ImportError as error:
            raise RuntimeError(
                f"enable: the kernel needs triton.experimental.gluon, which cannot be imported ({error}); install "
                "triton 3.6 or newer for NVIDIA GPUs, or do without: the Triton kernels serve every call"
            ) from error
    _wanted = wanted


def wanted() -> bool | None:
    """What was asked for."""
    return _wanted


def is_proven(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `my-triton tune` found it right and faster on a GPU, for heads of so many columns."""
    return gluon_key(dtype, head_dim) in tuned_rows(device)
