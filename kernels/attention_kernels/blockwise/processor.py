# SPDX-License-Identifier: Apache-2.0
"""What this processor has that decides which of several ways is the fastest."""

from __future__ import annotations

import platform

import torch

AMX: bool = torch.cpu._is_amx_tile_supported()
"""Instructions for products of matrices of 16 bits, which have their operands packed first."""

AVX512: bool = "AVX512" in torch.backends.cpu.get_cpu_capability()

MULTIPLIES_16_BITS: bool = AMX or platform.machine() not in ("x86_64", "AMD64")
"""Products of 16 bits are faster than those of float32. AVX-512 has some for bfloat16, with which torch's fused
attention is no faster. Other processors than x86 are not known: they are taken to have them."""
