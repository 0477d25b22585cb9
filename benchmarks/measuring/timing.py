"""How benchmarks take time: pieces of work in turn, or GPU graphs over rotating inputs.

The GPU time of a kernel is that of one call inside a CUDA graph of many, each with inputs of its
own whose total is larger than the L2, so that launches cost nothing and every call finds its data
in memory; it lies between events, the median over replays.
"""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

CPU = torch.device("cpu")
ROTATION_BYTES = 256 << 20
"""Inputs of one rotation; several times the L2 of any GPU so far."""

Inputs = tuple[Tensor, ...]
Run = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Time:
    """Seconds of one call.

    Attributes:
        median, least, most: over replays or rounds.
        ratio: the median ratio to the unit that ran before and after it, where there was one.
    """

    median: float
    least: float
    most: float
    ratio: float | None = None


def this_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """What a plot calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def machine_facts() -> dict[str, object]:
    """What a time depends on beside the code: processor, cores, bfloat16 units, GPU, torch."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the torch we ask for
    return {
        "cpu": known.get("cpu_name", platform.machine()),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "avx512_bf16": known.get("avx512_bf16"),
        "amx_bf16": known.get("amx_bf16"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def measured_with(device: torch.device, dtype: torch.dtype) -> str:
    """Where a figure comes from, beside the machine; on a CPU with the threads of this moment."""
    threads = torch.get_num_threads()
    where = "GPU" if device.type == "cuda" else f"CPU, {threads} thread{'s' * (threads != 1)}"
    return f"{where}, {str(dtype).removeprefix('torch.')}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on so many threads for a while, then on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_record(file: Path, device: torch.device, numbers: dict) -> None:
    """Numbers as JSON, with the day, the device, its threads and the machine, in a folder that it
    makes."""
    where = {"device": device_name(device), "threads": torch.get_num_threads()}
    where |= {"when": time.strftime("%Y-%m-%d"), "machine": machine_facts()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(where | numbers, indent=2) + "\n", encoding="utf-8")


def wall_seconds(run: Run) -> float:
    """By the clock on the wall."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def process_seconds(run: Run) -> float:
    """CPU time of this process's threads, which other programs disturb least."""
    started = time.process_time()
    run()
    return time.process_time() - started


def device_seconds(device: torch.device) -> Callable[[Run], float]:
    """The device's own clock."""
    return lambda run: time_once(run, device)[0]


def time_once(run: Run, device: torch.device) -> tuple[float, float]:
    """Seconds of GPU and of wall time of one run, whose inputs are its own.

    On a GPU as it is launched, so waits for the host count; on a CPU both are the clock's.
    """
    if device.type != "cuda":
        return (wall_seconds(run),) * 2
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started = time.perf_counter()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, time.perf_counter() - started


def time_steps(run: Run, device: torch.device, *, replays: int = 20) -> tuple[float, float]:
    """Medians of :func:`time_once` over replays, a tenth of them on a CPU, after one run."""
    run()
    replays = replays if device.type == "cuda" else max(1, replays // 10)
    on_gpu, on_wall = zip(*(time_once(run, device) for _ in range(replays)), strict=True)
    return statistics.median(on_gpu), statistics.median(on_wall)


def interleave(
    pieces: Mapping[Name, Run],
    rounds: int,
    *,
    clock: Callable[[Run], float] = wall_seconds,
    unit: Run | None = None,
) -> dict[Name, Time]:
    """Time pieces of work in turn, so that a busy machine slows all of them alike.

    Args:
        pieces: by name; each runs once untimed, then once a round.
        rounds: how many.
        clock: seconds of one run.
        unit: work that runs before and after each piece, for their ratio.
    """
    for run in pieces.values():
        run()
    taken: dict[Name, list[float]] = {name: [] for name in pieces}
    ratios: dict[Name, list[float]] = {name: [] for name in pieces}
    before = math.nan
    if unit is not None:
        unit()
        before = clock(unit)
    for _ in range(rounds):
        for name, run in pieces.items():
            taken[name].append(clock(run))
            if unit is not None:
                after = clock(unit)
                ratios[name].append(2 * taken[name][-1] / (before + after))
                before = after
    return {
        name: Time(
            statistics.median(each),
            min(each),
            max(each),
            statistics.median(ratios[name]) if ratios[name] else None,
        )
        for name, each in taken.items()
    }


def rotations(draw: Callable[[int], Inputs], device: torch.device) -> list[Inputs]:
    """Input sets that together outgrow the L2; one set on a CPU."""
    first = draw(0)
    if device.type != "cuda":
        return [first]
    one = sum(each.untyped_storage().nbytes() for each in first)
    return [first, *(draw(seed) for seed in range(1, max(2, -(-ROTATION_BYTES // one))))]


def time_call(
    call: Callable[..., object],
    inputs: Sequence[Inputs],
    device: torch.device,
    *,
    replays: int = 20,
) -> Time:
    """Time ``call(*each)`` for each of ``inputs``; see the module for what that means on a GPU.

    On a CPU it is that of the first ones alone, over a quarter of the replays.

    Raises:
        Exception: whatever the call raises; nothing is timed then.
    """
    if device.type == "cuda":
        return _time_graph(call, inputs, replays)
    return interleave({call: lambda: call(*inputs[0])}, max(1, replays // 4))[call]


def _time_graph(call: Callable[..., object], inputs: Sequence[Inputs], replays: int) -> Time:
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
