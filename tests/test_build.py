"""The native build, what a missing one says, and what a wheel and an sdist carry."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from lamp_fast import ops
from lamp_fast.errors import InputError

ROOT = Path(__file__).parents[1]


def installed():
    try:
        return importlib.metadata.version("lamp_fast")
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.mark.skipif(installed() is None, reason="runs from a source tree that is not installed")
def test_an_installed_package_has_the_build():
    found = ops.implementations("retrieve")
    assert found["reference"] is found["cpp"] is None
    import lamp_fast.kernels

    assert lamp_fast.kernels.__doc__


def test_implementations_of_an_unknown_op():
    with pytest.raises(InputError, match=r"op=.retrive.: expected one of .*, retrieve"):
        ops.implementations("retrive")


def test_build_info_says_what_was_built():
    _C = pytest.importorskip("lamp_fast._C")
    info = _C.build_info()
    assert re.fullmatch(r"\w+ [\d.]+", info["compiler"])
    assert "-O3" in info["flags"]
    assert "fast-math" not in info["flags"]
    assert info["cuda"] == (info["cuda_reason"] == "") == hasattr(_C, "cuda_devices")
    assert bool(info["cuda_compiler"]) == bool(info["cuda_architectures"]) == info["cuda"]


def test_cuda_devices_are_those_of_torch():
    _C = pytest.importorskip("lamp_fast._C")
    if not _C.build_info()["cuda"]:
        pytest.skip(_C.build_info()["cuda_reason"])
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"^cudaGetDeviceCount: \w"):
            _C.cuda_devices()
        return
    wanted = [
        (torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device))
        for device in range(torch.cuda.device_count())
    ]
    assert _C.cuda_devices() == wanted


WITHOUT_BUILD = """
import sys, warnings
sys.modules["lamp_fast._C"] = None
import torch
from lamp_fast import ops
from lamp_fast.errors import InputError
x, bias = torch.eye(3), torch.zeros(3)
assert "reference" in ops.implementations("retrieve")
try:
    ops.retrieve(x, x, bias, 1, impl="cpp")
except InputError as error:
    print(error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert ops.retrieve(x, x, bias, 1)[0].flatten().tolist() == [0, 1, 2]
print(len(caught), caught[0].category.__name__, caught[0].message)
"""


def test_without_the_build_an_explicit_choice_says_why_and_the_default_warns_once():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_BUILD], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    refused, warned = run.stdout.splitlines()
    assert refused.startswith("impl='cpp': retrieve: ")
    assert "lamp_fast._C" in refused
    assert "pip install" in refused
    assert warned.startswith("1 RuntimeWarning retrieve runs the slower reference: cpp: ")


def test_importing_the_ops_imports_no_implementation_but_the_reference():
    code = (
        "import sys, lamp_fast.ops; "
        "native = ('lamp_fast._C', 'lamp_fast.ops.cpp', 'lamp_fast.ops.cuda'); "
        "print([m for m in sys.modules if m in native or m.startswith('lamp_fast.kernels')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.strip() == "[]"


def configure(tmp_path, **environment):
    """Run CMake's configure step alone; LAMP_FAST_CUDA and the like as variables."""
    pybind11 = pytest.importorskip("pybind11")
    cmake = shutil.which("cmake", path=Path(sys.executable).parent) or shutil.which("cmake")
    ninja = shutil.which("ninja", path=Path(sys.executable).parent) or shutil.which("ninja")
    if cmake is None or ninja is None:
        pytest.skip("no cmake or ninja")
    mode = environment.pop("LAMP_FAST_CUDA")
    return subprocess.run(
        [
            *(cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DLAMP_FAST_CUDA={mode}"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def test_cuda_on_fails_without_a_compiler(tmp_path):
    run = configure(tmp_path, LAMP_FAST_CUDA="on", CUDACXX=str(tmp_path / "no-such-nvcc"))
    assert run.returncode != 0
    assert "LAMP_FAST_CUDA=on: CUDACXX=" in " ".join(run.stderr.split())


@pytest.mark.parametrize("broken", [False, True])
def test_cuda_auto_builds_for_the_cpu_without_a_compiler_that_works(tmp_path, broken):
    nvcc = tmp_path / "nvcc"
    if broken:
        nvcc.write_text("#!/bin/sh\nexit 1\n")
        nvcc.chmod(0o755)
    run = configure(tmp_path / "build", LAMP_FAST_CUDA="auto", CUDACXX=str(nvcc))
    assert run.returncode == 0, run.stderr
    assert "CUDA: not built (" in run.stdout
    assert "#define LAMP_HAS_CUDA 0" in (tmp_path / "build" / "build_info.h").read_text()


def test_cuda_option_is_checked(tmp_path):
    run = configure(tmp_path, LAMP_FAST_CUDA="maybe")
    assert run.returncode != 0
    assert "LAMP_FAST_CUDA=maybe: expected auto, on or off" in run.stderr


@pytest.mark.slow
def test_a_wheel_by_way_of_an_sdist_carries_everything(tmp_path):
    pytest.importorskip("pybind11")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", "build", "dist", "runs", "*.so", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    code = f"from setuptools.build_meta import *; build_sdist({str(tmp_path)!r})"
    environment = os.environ | {"LAMP_FAST_CUDA": "off"}
    subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", tmp_path, unpacked], env=environment, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder, packaged in (
        ("lamp_fast", "lamp_fast"),
        ("csrc", "lamp_fast/csrc"),
        ("kernels", "lamp_fast/kernels"),
    ):
        for path in (source / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{packaged}/{path.relative_to(source / folder).as_posix()}" in names
    assert any(re.fullmatch(r"lamp_fast/_C\..*\.so", name) for name in names)
    assert not any(name.split("/")[0] in ("kernels", "csrc", "tests", "build") for name in names)


def test_no_warning_when_the_build_is_there():
    pytest.importorskip("lamp_fast._C")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.retrieve(torch.eye(2), torch.eye(2), torch.zeros(2), 1)
