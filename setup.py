"""Builds ``lamp_fast._C`` with CMake; everything else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# Kept between installs, so that only what changed is compiled again.
BINARY_DIR = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
# Packages that lie outside lamp_fast/ in the tree.
ELSEWHERE = {"lamp_fast.kernels": "kernels", "lamp_fast.csrc": "csrc"}


def tool(name: str) -> str:
    """Find cmake or ninja: beside the interpreter, whose environment may not be activated, or on
    PATH, which is where pip's isolated build has them."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f"{name}: not found; pip install {name}, or let pip isolate the build")
    return found


class CMakeBuild(build_ext):
    """Configures and builds with CMake, then puts the module where setuptools wants it."""

    def build_extension(self, extension: Extension) -> None:
        # The tools of an isolated build live in a new folder each time: name them every time.
        configure = [
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLAMP_FAST_CUDA={os.environ.get('LAMP_FAST_CUDA', 'auto')}",
        ]
        cmake = tool("cmake")
        try:
            subprocess.run(
                [cmake, "-S", ROOT, "-B", BINARY_DIR, "-G", "Ninja", *configure], check=True
            )
            subprocess.run([cmake, "--build", BINARY_DIR], check=True)
        except subprocess.CalledProcessError:
            raise SystemExit("lamp_fast._C was not built; CMake's message is above") from None
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(BINARY_DIR / target.name, target)


setup(
    packages=[
        *find_packages(include=["lamp_fast", "lamp_fast.*"]),
        *ELSEWHERE,
        *(f"lamp_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir=ELSEWHERE,
    package_data={"": ["py.typed", "assets/**/*", "*.jinja", "*.json"], "lamp_fast.csrc": ["*"]},
    ext_modules=[Extension("lamp_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
