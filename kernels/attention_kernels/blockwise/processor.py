# SPDX-License-Identifier: Apache-2.0
"""What this processor has that decides which of several ways is the fastest."""

from __future__ import annotations

import platform

import torch

AMX: bool = torch.cpu._is_amx_tile_supported()
"""Whether it has instructions for matrix products of 16-bit numbers, whose operands must be packed first."""

AVX512: bool = "AVX512" in torch.backends.cpu.get_cpu_capability()
"""Whether torch uses vectors of 512 bits, 16 numbers of float32."""

MULTIPLIES_16_BITS: bool = AMX or platform.machine() not in ("x86_64", "AMD64")
"""Whether products of 16-bit numbers are faster than those of float32. AVX-512 has instructions for bfloat16, but
torch's fused attention is no faster with them. Of processors other than x86 it is assumed."""
