"""The training step as one CUDA graph: recorded once, then replayed without a launch of its own.

A replay does on the device what the recorded call did, with the same tensors. So the step reads its
batch from buffers that stay where they are, every number that changes between steps lies in a
tensor on the device, and nothing may wait for the device or have a shape that depends on values.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lamp_fast.methods.base import Method
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.ranks import Ranks

StepTensors = Mapping[str, Tensor]

# Libraries set themselves up, and autograd its streams, when they are first used.
WARM_UPS = 3

# An estimate until benchmarks/bench_gpu_step.py has run on a GPU: from this batch on the text that
# images share is expected to save more than launches cost.
SHARE_FROM_BATCH = 64


def why_not_captured(
    config: TrainConfig, method: Method, device: torch.device, ranks: Ranks
) -> str | None:
    """Why a run does not capture its steps, for its first lines; None where it does.

    Images that share the text of routes they have in common make shapes depend on values, so a run
    either captures or shares: see :data:`SHARE_FROM_BATCH`. ``--no-share-routes`` captures at any
    batch, ``--no-graph`` shares at any.
    """
    if not config.machine.graph:
        return "--no-graph"
    if device.type != "cuda":
        return f"on a {device.type.upper()}"
    if not method.capturable:
        return "the method reads values on the host"
    if ranks.device is not None:
        return "several ranks"
    if config.machine.precision == "fp16":
        return "fp16's loss scaler decides on the host"
    if method.shares_routes and config.optim.batch >= SHARE_FROM_BATCH:
        return f"images share routes from a batch of {SHARE_FROM_BATCH} on (--no-share-routes)"
    return None


class Recorder(Protocol):
    """What records a function of no arguments and does again what it did."""

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Call the function as often as it takes until it can be recorded."""

    def record(self, function: Callable[[], StepTensors]) -> StepTensors:
        """Record a call; the tensors that it returns are those that a replay fills."""

    def replay(self) -> None:
        """Do it again."""


class CudaRecorder:
    """Records a CUDA graph.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph = torch.cuda.CUDAGraph()
        # Autograd remembers on which stream a parameter was first used: one for both.
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], Any]) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                function()
        current.wait_stream(self.stream)

    def record(self, function: Callable[[], StepTensors]) -> StepTensors:
        # Other threads, such as the one that pins batches, may use CUDA as they like meanwhile.
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            return function()

    def replay(self) -> None:
        self.graph.replay()


class CapturedStep:
    """A step function that is recorded at its first batch and replayed from then on.

    Warming up and recording change nothing: what they did to the state is undone.

    Args:
        step: takes a batch's tensors, changes the state in place, returns scalars by name.
        state: gives every tensor that a step changes. Tensors that appear when it is first taken
            began as zeros (an optimiser's moments and step counts do).
        recorder: see :class:`Recorder`.
    """

    def __init__(
        self,
        step: Callable[..., StepTensors],
        state: Callable[[], Sequence[Tensor]],
        recorder: Recorder,
    ) -> None:
        self.step, self.state, self.recorder = step, state, recorder
        self._inputs: tuple[Tensor, ...] = ()
        self._changed: tuple[Tensor, ...] = ()
        self._outcome: StepTensors | None = None

    def fits(self, *inputs: Tensor) -> bool:
        """Whether a batch is of the recorded shapes and dtypes; before recording every batch is."""
        return self._outcome is None or all(
            (one.shape, one.dtype) == (other.shape, other.dtype)
            for one, other in zip(inputs, self._inputs, strict=True)
        )

    def __call__(self, *inputs: Tensor) -> StepTensors:
        """Take one step.

        Returns:
            Scalars that the next call overwrites.
        """
        if self._outcome is None:
            self._record(inputs)
        else:
            for held, each in zip(self._inputs, inputs, strict=True):
                held.copy_(each)
        self.recorder.replay()
        # A replay is behind autograd's back; what was derived from the state has to notice.
        torch.autograd.graph.increment_version(self._changed)
        return self._outcome

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = tuple(each.clone() for each in inputs)
        before = {id(each): each.detach().clone() for each in self.state()}

        def step() -> StepTensors:
            return self.step(*self._inputs)

        self.recorder.warm_up(step)
        self._outcome = self.recorder.record(step)
        self._changed = tuple(self.state())
        with torch.no_grad():
            for each in self._changed:
                if id(each) in before:
                    each.copy_(before[id(each)])
                else:
                    each.zero_()
