"""How much memory a device has to give."""

import os
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on ``device``.

    On a GPU that is what the driver has free and what torch holds unused; on a CPU, what the
    kernel calls available (it knows of caches that it can drop).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line[:13] == "MemAvailable:")
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
