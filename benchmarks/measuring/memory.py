"""How much memory a step takes: counted, kept for backward, or seen by the system.

Under torch's fake tensors every op gives shapes and no values; :class:`PeakMemory` adds up the
storages that live. So the real step of a real size is measured on any machine, with the kernels
that torch chooses on a CPU; temporary memory inside a kernel and an allocator's rounding are not
seen. ``python -m benchmarks.measuring.memory CLASSES BLOCK`` takes a step of the small CLIP in a
process of its own, whose peak the system knows.
"""

import json
import re
import resource
import subprocess
import sys
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measuring.steps import SMALL, Cell, random_clip
from benchmarks.measuring.timing import CPU, Run
from lamp_fast.clip.settings import Trimming

BATCH = 32


class PeakMemory(TorchDispatchMode):
    """Adds up the bytes of storages made while it is active.

    Attributes:
        live: bytes now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self._enter(each.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.live -= self._known.pop(key)


def counted_peak(run: Run) -> int:
    """Bytes at the peak of what a run makes, whose values nobody computes."""
    with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory:
        run()
    return memory.peak


def gpu_peak(run: Run) -> int | None:
    """The same as a GPU's allocator saw it; None without one."""
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def kept_for_backward(cell: Cell) -> int:
    """Bytes that a step keeps for backward, weights of the CLIP and parameters apart."""
    clip = cell.clip
    held = {each.untyped_storage().data_ptr() for each in clip.model.parameters()}
    held |= {each.untyped_storage().data_ptr() for each in cell.method.parameters()}
    blocks = (*clip.vision.blocks, *clip.text.blocks)
    folded = [linear for block in blocks for linear in (block.widen, block.narrow)]
    held |= {each.untyped_storage().data_ptr() for one in folded for each in (one.weight, one.bias)}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step = cell.forward()
    total = sum(saved.values())
    del step
    return total


def system_peak(classes: int, block: int) -> tuple[float, int]:
    """MiB that a step of the small CLIP adds at its peak, and the text rows of an image."""
    command = [sys.executable, "-m", __spec__.name, str(classes), str(block)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(json.loads(answer.stdout))


def _resident_peak() -> int:
    """KiB of this process at its peak.

    What getrusage says of it begins, on Linux, with the memory of the process that started it.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])


def _main(classes: int, block: int) -> None:
    trim = Trimming(block=block, share_routes=False)
    names = [f"thing number {number}" for number in range(classes)]
    cell = Cell(random_clip(CPU, sizes=SMALL), BATCH, classes, trim=trim, names=names)
    before = _resident_peak()
    cell.forward().loss.backward()
    after = _resident_peak()
    print(json.dumps([(after - before) / 1024, sum(map(len, cell.classes.forests))]))


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
