# SPDX-License-Identifier: Apache-2.0
"""Every shipped configuration compiles ahead of time, for each GPU, within its limits."""

from __future__ import annotations

import pytest
import torch

from attention_kernels.configs import BACKWARD_CONFIGS, CONFIGS, DECODE_CONFIGS, SHARED_MEMORY, forward_config
from attention_kernels.operators import interpreting, triton_installed

if triton_installed():
    from attention_kernels.compiled.shipped import shipped
else:

    def shipped():
        return iter(())


def marked(configuration):
    """`make test` compiles for the chip whose limits are strictest (nothing may spill there), in 16 bits."""
    strictest = configuration.architecture == "sm_90" and configuration.element_size == 2
    marks = () if strictest else pytest.mark.exhaustive
    return pytest.param(configuration, id=configuration.name.replace(" ", "-"), marks=marks)


@pytest.mark.skipif(interpreting(), reason="the interpreter does not compile")
@pytest.mark.parametrize("configuration", [marked(each) for each in shipped()])
def test_configuration_compiles_within_limits(configuration):
    compiled = configuration.compile()
    assert compiled.shared_memory <= SHARED_MEMORY[configuration.architecture]
    # The backward pass spills nothing at 512 columns either.
    if configuration.architecture == "sm_90" and (
        configuration.dim <= 256 or configuration.kernel not in ("forward", "decode")
    ):
        assert compiled.spills == 0


def test_the_chips_that_are_shipped_for():
    assert {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"} == set(SHARED_MEMORY)


def test_every_architecture_has_every_row():
    tables: tuple[dict, ...] = (CONFIGS, BACKWARD_CONFIGS, DECODE_CONFIGS)
    for table in tables:
        assert table.keys() == {*SHARED_MEMORY, "interpreter"}
        assert all(configs.keys() == table["sm_90"].keys() for configs in table.values())


@pytest.mark.parametrize("dim", [1, 16, 17, 64, 65, 80, 129, 256, 300, 512])
def test_a_configuration_for_every_head_dim(dim):
    for architecture in CONFIGS:
        config = forward_config(architecture, torch.float32, dim, dim, 100, has_tiles=False)
        assert config.chunk_d == 0 or config.chunk_d < max(dim, 32)
