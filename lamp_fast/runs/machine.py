"""Where and how fast a run computes."""

from dataclasses import replace

import torch

from lamp_fast.errors import InputError
from lamp_fast.ops import dispatch
from lamp_fast.runs.settings import MachineConfig


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
    """What --precision auto computes in: bfloat16 where the device multiplies it."""
    multiplies = device.type == "cuda" or dispatch.cpu_bfloat16()
    return "bf16" if multiplies else "fp32"
