"""The CUDA kernels compiled for the CPU, and lamp_fast.ops.cuda on top of them.

The headers beside this file stand in for CUDA's; csrc/*.cu and their bindings compile unchanged.
"""

import hashlib
import importlib
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

import lamp_fast

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = ("retrieve", "prefix_attention")


def why_not() -> str | None:
    """What is missing here to compile them; None: nothing."""
    if shutil.which("g++") is None:
        return "no g++"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python.h"
    return None


def build(folder: Path) -> Path:
    """Compile to ``folder``, unless that was done for these very sources; the extension's path."""
    # torch brings the headers of pybind11, which need not be installed to run tests.
    includes = [HERE, CSRC, Path(torch.__file__).parent / "include", sysconfig.get_path("include")]
    # Few blocks at once, so that small inputs need several rounds of a kernel's loop over them.
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DLAMP_MAX_BLOCKS=3", "-w"]
    flags += [f"-I{path}" for path in includes]
    sources = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp"), *CSRC.iterdir()])
    digest = hashlib.sha256(repr((flags, torch.__version__, sys.version)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    built = folder / f"{digest.hexdigest()[:16]}.so"
    if built.exists():
        return built
    objects, running = [], []
    # An access that is not aligned as its type, or an overflow, ends the process. The bindings are
    # slow to optimise and quick to run.
    checks = "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
    kernel_options = ["-O1", "-ffp-contract=off", checks, "-fsanitize-undefined-trap-on-error"]
    for source, options in [
        (HERE / "module.cpp", ["-O0"]),
        *((CSRC / f"{name}.cu", [*kernel_options, "-x", "c++"]) for name in KERNELS),
    ]:
        objects.append(folder / f"{built.stem}_{source.stem}.o")
        command = ["g++", *flags, *options, "-c", source, "-o", objects[-1]]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate()[1] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("\n".join(errors))
    linked = built.with_suffix(".linked")
    subprocess.run(["g++", "-shared", *objects, "-o", linked], check=True)
    linked.rename(built)
    for each in objects:
        each.unlink()
    return built


def load_native(path: Path) -> ModuleType:
    """The extension, in place of ``lamp_fast._C``."""
    loader = importlib.machinery.ExtensionFileLoader("_C", str(path))
    native = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
    loader.exec_module(native)
    return native


def load_ops(native) -> ModuleType:
    """lamp_fast.ops.cuda as it would be with ``native`` for ``lamp_fast._C``, for CPU tensors.

    Raises:
        ImportError: as the module does.
    """
    replaced = ("lamp_fast._C", "lamp_fast.ops.native", "lamp_fast.ops.cuda")
    before = {name: sys.modules.pop(name, None) for name in replaced}
    extension = getattr(lamp_fast, "_C", None)
    sys.modules["lamp_fast._C"] = lamp_fast._C = native
    try:
        module = importlib.import_module("lamp_fast.ops.cuda")
    finally:
        for name in replaced:
            sys.modules.pop(name, None)
            if before[name] is not None:
                sys.modules[name] = before[name]
        if extension is None:
            del lamp_fast._C
        else:
            lamp_fast._C = extension
    # The one thing that a CPU has not: a stream. What is enqueued is done at once.
    module.enqueue = lambda function, *arguments: function(*arguments, 0)
    return module
