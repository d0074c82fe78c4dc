# SPDX-License-Identifier: Apache-2.0
"""What engines call when they import their plugins, where there is no engine or an unknown one.

What happens inside the engines themselves is tested in tests/engines.
"""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points

import pytest

from attention_plugin.engines import plugins


@pytest.fixture
def warnings_of(caplog):
    def run(function):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="attention_plugin.engines.plugins"):
            function()
        return [record.getMessage() for record in caplog.records]

    return run


@pytest.mark.parametrize(
    "group, function", [("vllm.general_plugins", "register_vllm"), ("sglang.srt.plugins", "register_sglang")]
)
def test_the_package_declares_an_entry_point(group, function):
    (found,) = [each for each in entry_points(group=group) if each.name == "my_triton"]
    assert found.load() is getattr(plugins, function)


@pytest.mark.parametrize(
    "function, engine, option",
    [
        (plugins.register_vllm, "vLLM", "--attention-backend MY_TRITON"),
        (plugins.register_sglang, "SGLang", "--attention-backend my_triton"),
    ],
)
@pytest.mark.parametrize("version", [None, "0.1.0", "99.0", "99.0rc1"])
def test_an_unknown_release_gets_one_warning(monkeypatch, warnings_of, function, engine, option, version):
    monkeypatch.setattr(plugins, "_installed_version", lambda names: version)
    (message,) = warnings_of(function)
    assert f"{engine} {version or 'of an unknown version'} is not known" in message
    assert f"`{option}` is not available" in message
    assert "as if the plugin were not installed" in message


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.32.0rc1", "0.33.1+cpu"])
def test_known_releases_of_vllm_are_served(version, monkeypatch, warnings_of):
    monkeypatch.setattr(plugins, "_installed_version", lambda names: version)
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed, or broken
    monkeypatch.delitem(sys.modules, "attention_plugin.engines.vllm", raising=False)
    (message,) = warnings_of(plugins.register_vllm)
    assert "this installation of vLLM lacks what an attention backend needs (" in message
    assert "`--attention-backend MY_TRITON` is not available" in message


def test_a_known_release_of_sglang_without_its_parts_gets_one_warning(monkeypatch, warnings_of):
    monkeypatch.setattr(plugins, "_installed_version", lambda names: "0.5.23")
    monkeypatch.setitem(sys.modules, "sglang", None)
    monkeypatch.delitem(sys.modules, "attention_plugin.engines.sglang", raising=False)
    (message,) = warnings_of(plugins.register_sglang)
    assert "this installation of SGLang lacks what an attention backend needs (" in message
    assert "`--attention-backend my_triton` is not available" in message
