"""``python -m lamp_fast.info``: versions, devices, and which implementation each op will use.

The first thing to read, and to send along, when something is slow or does not build.
"""

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lamp_fast import __version__, cli
from lamp_fast.runs.config import default_config

if TYPE_CHECKING:
    import torch

    from lamp_fast.ops import dispatch

PACKAGES = ("torch", "triton", "open_clip_torch", "torchvision", "numpy")


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of what it stands on ("missing" where it is not)."""
    found = {"lamp_fast": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def cuda_line() -> str:
    """``cuda: built for sm_80 sm_90``, or ``cuda: not built (reason)``, from the build itself."""
    try:
        from lamp_fast import _C
    except ImportError as error:
        return f"cuda: not built ({error})"
    build = _C.build_info()
    if not build["cuda"]:
        return f"cuda: not built ({build['cuda_reason']})"
    return f"cuda: built for {build['cuda_architectures']}"


def devices() -> "Iterator[tuple[torch.device, str]]":
    """Every device that runs could use, with a description."""
    import torch

    from lamp_fast.ops import dispatch

    vectors = torch.backends.cpu.get_cpu_capability()
    names = ", ".join(name.upper() for name in dispatch.cpu_bfloat16())
    products = f"products of bfloat16 ({names})" if names else "no products of bfloat16"
    yield torch.device("cpu"), f"{torch.get_num_threads()} threads, {vectors}, {products}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield (
            torch.device("cuda", index),
            f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB",
        )


def op_table(device: "torch.device") -> str:
    """What serves every op on a device in what --precision auto computes in, why, and what else is
    there or is missing."""
    from tabulate import tabulate

    from lamp_fast.ops import dispatch
    from lamp_fast.runs.building import DTYPES
    from lamp_fast.runs.machine import auto_precision

    dtype = DTYPES[auto_precision(device)]
    rows = []
    for op in dispatch.IMPLEMENTATIONS:
        # Only prefix_attention tells rows that see few keys (text) from rows that see all (vision).
        for sparse in (False, True) if op == "prefix_attention" else (False,):
            call = dispatch.CallFacts(device, dtype, sparse=sparse)
            name, why, missing = dispatch.pick(op, call)
            what = op + (" (text)" if sparse else " (vision)" if op == "prefix_attention" else "")
            rows.append([what, name, why, _others(op, call, name, missing)])
    header = [f"op in {auto_precision(device)}", "served by", "why", "others"]
    return tabulate(rows, header, tablefmt="simple")


def _others(op: str, call: "dispatch.CallFacts", chosen: str, missing: str | None) -> str:
    if missing is not None:
        return f"not {missing}"
    from lamp_fast.ops import dispatch

    able = (
        name
        for name in dispatch.IMPLEMENTATIONS[op]
        if name != chosen and dispatch.why_it_cannot_serve(op, name, call) is None
    )
    return ", ".join(able)


@dataclass(frozen=True)
class InfoConfig:
    """Print versions, devices and which implementation each op will use; with --method instead what
    it would train over --clip."""

    method: str | None = None
    """Print how many parameters this method trains, with its published settings."""
    clip: str = "ViT-B-16"
    """For --method: as in training, with no need of weights."""
    new_classes: int = 0
    """For --method: classes tested without being trained on."""
    trained_classes: int = 0
    """For --method: classes trained on."""


def main(config: InfoConfig) -> int:
    """Print everything; nothing is written."""
    if config.method is not None:
        settings = default_config({"method": config.method, "clip": config.clip})
        settings = replace(settings, clip=replace(settings.clip, clip=config.clip))
        from lamp_fast.runs.parameters import parameter_lines

        print("\n".join(parameter_lines(settings, config.new_classes, config.trained_classes)))
        return 0
    print("  ".join(f"{name} {version}" for name, version in versions().items()))
    print(cuda_line())
    for device, description in devices():
        print(f"\n{device}: {description}\n{op_table(device)}")
    import torch

    if not torch.cuda.is_available():
        print("\nno GPU: torch sees none")
    return 0


if __name__ == "__main__":
    cli.run(InfoConfig, main, sys.argv[1:], prog="python -m lamp_fast.info")
