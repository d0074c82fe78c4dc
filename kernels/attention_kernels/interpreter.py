# SPDX-License-Identifier: Apache-2.0
"""A mend of Triton's interpreter, in which tests run kernels; kernels that are compiled know nothing of it."""

from __future__ import annotations

from typing import Any

import triton
from packaging.version import Version


def mend_loop_bounds() -> None:
    """Let kernels loop between bounds that they have computed, with Triton 3.6 and NumPy 2.4 too.

    That Triton makes a Python number of an array of shape `[1]` by `int`, which NumPy has refused since 2.4. Triton 3.7
    takes the array's shape off first. Does nothing for a Triton that does.
    """
    if Version(triton.__version__) >= Version("3.7"):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
