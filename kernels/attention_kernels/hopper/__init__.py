# SPDX-License-Identifier: Apache-2.0
"""The forward pass for Hopper GPUs in Gluon, for those who ask for it: no GPU has run it yet.

`enable()` switches it on in this process, wherever the device and the call allow; other calls go on with the Triton
kernel, and why is logged once. Tests run it in a simulation, and compiled, on a machine for PTX. It stays off until a
GPU has compared it with the reference.
"""

from __future__ import annotations

_wanted = False


def enable(wanted: bool = True) -> None:
    """Run the forward pass in Gluon from now on, where it can be; `enable(False)` takes it back.

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


def enabled() -> bool:
    """Whether it has been asked for."""
    return _wanted
