"""How much of a step fits into the memory of a device: an estimate before the first one."""

import os
from pathlib import Path

import torch

from lamp_fast.clip.prompts import ClassPrompts
from lamp_fast.clip.towers import FrozenClip

# More at once gains nothing; so small runs do not depend on the memory of the machine.
MAX_PAIRS = 1 << 16


def affordable_block(classes: ClassPrompts, clip: FrozenClip, budget: int) -> int:
    """How many (image, class) pairs a step can keep for backward within ``budget`` bytes.

    Backward needs of each text row and layer the inputs of two LayerNorms, q, k, v, the
    attention's output and the MLP's hidden row: ten times the width.

    Args:
        classes: the class texts, prepared for ``clip``.
        clip: the frozen CLIP whose text tower they go through.
        budget: bytes.

    Returns:
        Within 1..:data:`MAX_PAIRS`.
    """
    rows = sum(len(forest) for forest in classes.forests)
    layers = len(clip.text.blocks) - classes.first_layer + 1
    itemsize = torch.finfo(clip.dtype).bits // 8
    bytes_per_row = 10 * clip.text.width * itemsize * layers
    pairs = budget * len(classes) // (bytes_per_row * rows)
    return max(1, min(pairs, MAX_PAIRS))


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
