"""How benchmarks take time: GPU graphs over rotating inputs, or the clock on a CPU.

A GPU time is that of one call inside a CUDA graph of many, each with inputs of its own whose total
is larger than the L2, so that launches cost nothing and every call finds its data in memory. It is
GPU time between events, the median over replays.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

ROTATION_BYTES = 256 << 20
"""Inputs of one rotation; several times the L2 of any GPU so far."""

Inputs = tuple[Tensor, ...]
Call = Callable[..., object]


@dataclass(frozen=True)
class Time:
    """Seconds of one call.

    Attributes:
        median, least, most: over replays.
    """

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best, measured: the two rates of every floor.

    Attributes:
        flops: of a large matrix product in ``dtype``, per second.
        bytes: read plus written by a large copy, per second.
        dtype: of the product.
    """

    flops: float
    bytes: float
    dtype: str

    def floor(self, flops: float, moved: float) -> float:
        """Seconds that no program goes below: arithmetic or traffic, whichever takes longer."""
        return max(flops / self.flops, moved / self.bytes)

    def record(self) -> dict:
        """For the report."""
        return asdict(self)


def this_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """What a plot calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def write_record(file: Path, device: torch.device, numbers: dict) -> None:
    """Numbers as JSON, with the day, the device and its threads, in a folder that it makes."""
    where = {"device": device_name(device), "threads": torch.get_num_threads()}
    record = {"when": time.strftime("%Y-%m-%d"), **where, **numbers}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measure_ceilings(device: torch.device, *, size: int = 8192, copied: int = 1 << 30) -> Ceilings:
    """Measure both rates: bfloat16 on a GPU, float32 on a CPU.

    Args:
        device: where.
        size: side of the square matrices.
        copied: bytes of the tensor that is copied.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    product = time_call(lambda x: x @ x, [(a,)], device)
    copy = time_call(target.copy_, [(source,)], device)
    return Ceilings(
        flops=2 * size**3 / product.least,
        bytes=2 * source.numel() * 4 / copy.least,
        dtype=str(dtype)[6:],
    )


def rotations(draw: Callable[[int], Inputs], device: torch.device) -> list[Inputs]:
    """Input sets that together outgrow the L2; one set on a CPU."""
    first = draw(0)
    if device.type != "cuda":
        return [first]
    one = sum(each.untyped_storage().nbytes() for each in first)
    return [first, *(draw(seed) for seed in range(1, max(2, -(-ROTATION_BYTES // one))))]


def time_call(
    call: Call, inputs: Sequence[Inputs], device: torch.device, *, replays: int = 20
) -> Time:
    """Time ``call(*each)`` for each of ``inputs``; see the module for what that means on a GPU.

    Raises:
        Exception: whatever the call raises; nothing is timed then.
    """
    if device.type == "cuda":
        return _time_graph(call, inputs, replays)
    call(*inputs[0])
    taken = []
    for number in range(min(replays, 5)):
        started = time.perf_counter()
        call(*inputs[number % len(inputs)])
        taken.append(time.perf_counter() - started)
    return Time(statistics.median(taken), min(taken), max(taken))


def time_once(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of GPU and of wall time of one run, whose inputs are its own.

    On a GPU as it is launched, so waits for the host count; on a CPU both are the clock's.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started,) * 2
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started = time.perf_counter()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, time.perf_counter() - started


def time_steps(
    run: Callable[[], object], device: torch.device, *, replays: int = 20
) -> tuple[float, float]:
    """Medians of :func:`time_once` over replays, a tenth of them on a CPU, after one run."""
    run()
    replays = replays if device.type == "cuda" else max(1, replays // 10)
    on_gpu, on_wall = zip(*(time_once(run, device) for _ in range(replays)), strict=True)
    return statistics.median(on_gpu), statistics.median(on_wall)


def against(
    unit: Callable[[], object], run: Callable[[], object], device: torch.device, rounds: int
) -> tuple[float, float]:
    """How long a run takes in units, which run before and after each; and in seconds; medians."""
    run()
    unit()
    ratios, taken, before = [], [], time_once(unit, device)[0]
    for _ in range(rounds):
        each, after = time_once(run, device)[0], time_once(unit, device)[0]
        ratios.append(2 * each / (before + after))
        taken.append(each)
        before = after
    return statistics.median(ratios), statistics.median(taken)


def _time_graph(call: Call, inputs: Sequence[Inputs], replays: int) -> Time:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for each in (*inputs[:2], *inputs[:2]):
            call(*each)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in inputs:
            call(*each)
    graph.replay()
    taken = []
    for _ in range(replays):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        taken.append(started.elapsed_time(ended) / 1e3 / len(inputs))
    return Time(statistics.median(taken), min(taken), max(taken))
