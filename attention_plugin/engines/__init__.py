# SPDX-License-Identifier: Apache-2.0
"""Inference engines, one file each: what an engine needs beyond the registered attention."""
