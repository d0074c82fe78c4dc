# SPDX-License-Identifier: Apache-2.0
"""A machine for compiled kernels: it runs the PTX that Triton hands to NVIDIA's assembler, on a CPU.

What Triton's interpreter cannot tell, this can: whether what the compiler made of a kernel computes the same, in its
own dtypes; whether it reads or writes where it was given nothing; whether each warp waits for what it needs. All
threads that are at the same place go on together, a NumPy operation for each instruction. With a seed the order is
drawn among those that could go on, and copies and products that run beside the threads may happen as late as a wait for
them allows (`late`): where something is not waited for, results are wrong, or somebody waits forever.

It knows what kernels here use of sm_80 to sm_120, and says so of an instruction that it does not know.
What it cannot tell: time, what the assembler makes of PTX, and the last bits of the hardware's approximations and
products.
"""

from .driver import Device, device
from .machine import Deadlock, Unfinished
from .memory import MemoryFault

__all__ = ["Deadlock", "Device", "MemoryFault", "Unfinished", "device"]
