"""Several processes train one run: ``torchrun --nproc-per-node N -m lamp_fast.train ...``.

Every rank holds the whole method and takes a part of each batch, so the batch that a setting names
is the one of all ranks together. What they add up is little: the gradients of the few trainable
numbers, and counts. That is one all-reduce a step. DistributedDataParallel would add nothing but
demands: it averages where ranks with unequal rows need a weighted sum, it hangs where a rank has no
row, and it wants one backward a step, which gradient accumulation has not.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lamp_fast.data.feature_batches import FeatureBatches
from lamp_fast.data.loading import Batch, Batches
from lamp_fast.errors import InputError
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.launch import launched

Result = TypeVar("Result")

# Rank 0 may read a large data set while the others wait; a rank that dies is torchrun's to notice.
TIMEOUT = timedelta(hours=6)


class PeerStopped(Exception):
    """Another rank has met an error and reports it; this one has nothing to add."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; by default one alone, for which every method is trivial.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        device: where tensors must lie to be added up.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This rank's part of ``count`` rows: contiguous, even to one row, possibly empty."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def sum(self, tensor: Tensor) -> Tensor:
        """Add ``tensor`` up over ranks, in place; all ranks get the same bits."""
        if self.device is not None:
            dist.all_reduce(tensor)
        return tensor

    @property
    def summing(self) -> Callable[[Tensor], Tensor] | None:
        """:meth:`sum` where there is more than this process to ask; else None."""
        return None if self.device is None else self.sum

    def sum_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Add up every ``.grad``, absent ones as 0, and the scalar loss; returns the loss.

        One all-reduce: sending a few hundred thousand numbers costs less than starting twice.
        """
        if self.device is None:
            return loss
        gradients = [
            torch.zeros_like(each) if each.grad is None else each.grad for each in parameters
        ]
        flat = torch.cat([*(each.flatten() for each in gradients), loss.to(gradients[0])[None]])
        *sums, total = self.sum(flat).split([*(each.numel() for each in gradients), 1])
        for parameter, value in zip(parameters, sums, strict=True):
            parameter.grad = value.view_as(parameter)
        return total[0]

    def gather(self, value: Result) -> list[Result]:
        """The ``value`` of every rank, in their order, on every rank."""
        if self.device is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call on every rank; where any fails, all stop and the first that failed says why."""
        result, error = _attempt(function, arguments, self.device is not None)
        failed = [rank for rank, each in enumerate(self.gather(error is not None)) if each]
        return self._agreed(result, error, failed)

    def once(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call on rank 0 alone; every rank gets the result, which must pickle."""
        if self.device is None:
            return function(*arguments)
        result, error = _attempt(function, arguments if self.first else None, True)
        held = [(result, error is not None)]
        dist.broadcast_object_list(held, src=0)
        result, failed = held[0]
        return self._agreed(result, error, [0] if failed else [])

    def parts(
        self, batches: Batches | FeatureBatches, sizes: Sequence[int], epoch: int = 0
    ) -> Iterator[tuple[Batch, int]]:
        """This rank's rows of each batch, and how many rows the whole batch has.

        Args:
            batches: as :meth:`share` made them.
            sizes: rows of every whole batch.
            epoch: from 0.
        """
        loaded = batches.epoch(epoch)
        for size in sizes:
            rows = self.rows(size)
            if rows.start == rows.stop:
                yield [torch.empty(0), torch.empty(0).long(), torch.empty(0).long()], size
            else:
                yield next(loaded), size
        # Exhausted, so that the loader's workers are asked for nothing more.
        for _ in loaded:
            raise AssertionError("more batches than sizes")

    def share(self, batches: Batches | FeatureBatches) -> Batches | FeatureBatches:
        """The same batches, of which this rank loads its own rows alone; empty parts are left out.

        Order and random crops are functions of seed, epoch and picture, so they stay what they are
        in a run of one process.
        """
        return batches if self.size == 1 else batches.part(self.rows)

    def _agreed(self, result: Any, error: Exception | None, failed: Sequence[int]) -> Any:
        if not failed:
            return result
        if self.rank == failed[0] and error is not None:
            raise error
        raise PeerStopped


ALONE = Ranks()


@contextlib.contextmanager
def join(device: str) -> Iterator[Ranks]:
    """Meet the other processes that torchrun started, if it did; they part when this ends.

    Ranks other than 0 print nothing meanwhile. An error that all know of leaves them with exit
    code 1 and rank 0, or the one that met it, with the error.

    Args:
        device: as given to ``--device``; see :func:`place`.
    """
    if not launched():
        yield ALONE
        return
    chosen = own_device(device)
    target = torch.device(chosen if chosen.startswith("cuda") else "cpu")
    if target.type == "cuda":
        torch.cuda.set_device(target)
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun's store outlives a restart, and with it the addresses of processes that are gone.
    attempt = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if target.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=TIMEOUT)
    ranks = Ranks(rank, size, target)
    try:
        with contextlib.ExitStack() as stack:
            if not ranks.first:
                silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(silence))
                stack.enter_context(contextlib.redirect_stderr(silence))
            yield ranks
    except PeerStopped:
        _leave_quietly(1)
    except KeyboardInterrupt:
        if not ranks.first:
            _leave_quietly(130)
        raise
    finally:
        dist.destroy_process_group()


def own_device(device: str) -> str:
    """What ``--device`` means to this process of several: where GPUs are used, one of its own.

    Raises:
        InputError: more processes than GPUs.
    """
    if not launched() or not (
        device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    ):
        return device
    index = int(os.environ["LOCAL_RANK"])
    if index >= torch.cuda.device_count():
        raise InputError(
            f"--nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}: expected at most one process"
            f" a GPU, this machine has {torch.cuda.device_count()}"
        )
    return f"cuda:{index}"


def place(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The settings with this rank's own GPU, where GPUs are used."""
    if ranks.device is None or ranks.device.type == "cpu":
        return config
    return replace(config, machine=replace(config.machine, device=str(ranks.device)))


def batch_sizes(count: int, batch: int) -> list[int]:
    """Rows of each batch of ``count`` pictures in turn."""
    return [min(batch, count - first) for first in range(0, count, batch)]


def _attempt(
    function: Callable[..., Any], arguments: Sequence[Any] | None, hold: bool
) -> tuple[Any, Exception | None]:
    """Result or error; None for both where there is nothing to call."""
    if arguments is None:
        return None, None
    try:
        return function(*arguments), None
    except Exception as error:
        if not hold:
            raise
        return None, error


def _leave_quietly(code: int) -> NoReturn:
    raise SystemExit(code)
