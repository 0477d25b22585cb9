"""Where and how fast a run computes."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch

from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds, IntOrNone

CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16")
"""Instructions that make products of bfloat16 faster than those of float32, as torch names them."""


@dataclass(frozen=True)
class MachineConfig:
    """Where and how fast; nothing here changes a result beyond rounding."""

    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Compute type of the frozen CLIP: bf16 on a GPU, fp32 on a CPU; parameters, cosines and logits
    stay at least fp32."""
    threads: Annotated[IntOrNone, Bounds(1, 4096)] = None
    """CPU threads; none leaves it to torch."""
    ops: Literal["auto", "reference"] = "auto"
    """reference runs every op in plain torch (python -m lamp_fast.info shows what auto takes)."""
    workers: Annotated[int, Bounds(0, 4096)] = 0
    """Processes that load pictures; 0 loads in the main one."""
    cache_size: Annotated[float, Bounds(0, 1_000_000)] = 10.0
    """Gigabytes of decoded pictures to keep between epochs and runs, and as many of features, in
    $LAMP_FAST_CACHE or ~/.cache/lamp_fast; 0 keeps none. python -m lamp_fast.cache shows and clears
    them."""
    transforms: Literal["auto", "host", "device"] = "auto"
    """Where pictures are cropped, scaled and normalised: by torchvision where they are loaded, or a
    batch at a time on the device, with the same crops and within a step of 255 of the same pixels;
    auto takes a GPU where there is one."""
    test_batch: Annotated[int, Bounds(1, 1_000_000)] = 100
    """Pictures an evaluation batch."""
    graph: bool = True
    """On a GPU, replay the training step as one CUDA graph where that is exact; the run says
    whether it does, and else why not."""
    path: Literal["exact", "literal"] = "exact"
    """literal: prompts as tokens, 77 tokens, one text pass per (image, class); slow, obvious."""


def resolve_machine(machine: MachineConfig) -> tuple[MachineConfig, torch.device]:
    """Decide every "auto" of the machine; the device is there.

    Raises:
        InputError: a device that is not, or a precision that it cannot compute in.
    """
    name = machine.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    precision = machine.precision
    if precision == "auto":
        precision = auto_precision(device)
    if precision == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16: expected fp32, bf16 or fp64 on a CPU")
    transforms = machine.transforms
    if transforms == "auto":
        transforms = "device" if device.type == "cuda" else "host"
    machine = replace(machine, device=str(device), precision=precision, transforms=transforms)
    return machine, device


def auto_precision(device: torch.device) -> str:
    """What --precision auto computes in."""
    return "bf16" if device.type == "cuda" else "fp32"
