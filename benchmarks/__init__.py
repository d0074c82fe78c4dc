# SPDX-License-Identifier: Apache-2.0
"""The benchmark runner: `python -m benchmarks` compares attention implementations on this machine."""
