# SPDX-License-Identifier: Apache-2.0
"""The wheel: pure Python, typed, and nothing but the two packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", ".*_cache", ".hypothesis", "build", "*.egg-info", "__pycache__", "checkpoints", "results"
)


def test_wheel_holds_the_two_packages_and_nothing_else(tmp_path):
    # From a copy, so that what a build leaves behind does not end in the working tree.
    source = shutil.copytree(REPOSITORY, tmp_path / "source", ignore=NOT_SOURCE)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "attention_kernels",
        "attention_plugin",
        "my_triton_attention",
    }
    assert {"attention_kernels/py.typed", "attention_plugin/py.typed"} <= set(names)
    # Every module of both, however deep: the list of packages in pyproject.toml is kept by hand.
    modules = {str(path.relative_to(root)) for root in (source, source / "kernels") for path in root.rglob("*.py")}
    own = {name for name in modules if name.split("/")[0] in ("attention_kernels", "attention_plugin")}
    assert {name for name in names if name.endswith(".py")} == own and len(own) > 50
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "my-triton = attention_plugin.__main__:main" in archive.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)
