# SPDX-License-Identifier: Apache-2.0
"""The reference model: a small language model that every attention back end and every engine can load."""
