# SPDX-License-Identifier: Apache-2.0
"""Every model family of transformers that calls its attention interface, built tiny and compared with eager."""
