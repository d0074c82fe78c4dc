# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of the kernels, seen without a GPU: ahead of time, for every chip and configuration."""
