# SPDX-License-Identifier: Apache-2.0
"""Inputs of models whose arguments the generic ones do not fit, by class name."""

INPUTS = {}
