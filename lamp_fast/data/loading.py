"""Batches of transformed pictures, through torch's DataLoader.

Everything random is a function of (seed, epoch, index) alone, and of how often that picture was
drawn before in the epoch where a sampler draws with replacement: neither the number of worker
processes nor a resumed run changes a picture.
"""

import contextlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lamp_fast.data.pictures import Pictures
from lamp_fast.data.resample import Packed, join, resample
from lamp_fast.data.settings import Sampling
from lamp_fast.errors import InputError

# Images, labels and indices.
Batch = list[Tensor | Packed]
Transform = Callable[[Tensor], Tensor | Packed]
# (epoch, index), and behind them from 1 on how often the epoch drew that index before.
Draw = tuple[int, ...]


def class_shares(counts: np.ndarray, sampler: Sampling) -> np.ndarray:
    """How large a part of an epoch each class is, on average.

    n_c^p / sum_j n_j^p over the classes that have pictures: p = 1 for "shuffle", 0 for "balanced"
    and 1/2 for "sqrt" (Kang et al., "Decoupling Representation and Classifier for Long-Tailed
    Recognition", ICLR 2020).

    Args:
        counts: int64 [C], pictures a class.
        sampler: one of the three.

    Returns:
        float64 [C], 0 where there is no picture.
    """
    # sqrt and no power: IEEE 754 rounds it alike on every machine.
    powers = {"shuffle": np.abs, "balanced": np.sign, "sqrt": np.sqrt}
    weights = powers[sampler](counts).astype(np.float64)
    return weights / np.cumsum(weights)[-1:]


def epoch_order(labels: np.ndarray, sampler: Sampling, seed: int, epoch: int) -> np.ndarray:
    """The pictures of one epoch, in the order in which training sees them.

    "shuffle" is a permutation. The others draw N pictures with replacement, each on its own: a
    class by its :func:`class_shares`, then one of its pictures, all of them alike.

    Args:
        labels: int64 [N], the class of every picture.
        sampler: one of the three.
        seed, epoch: with N and the labels they decide every draw, on every machine.

    Returns:
        int64 [N], indices into ``labels``; see :func:`earlier_draws` for repeated ones.
    """
    count = len(labels)
    # The length keeps this stream apart from those of the pictures, (seed, epoch, index).
    stream = np.random.PCG64(np.random.SeedSequence((seed, epoch, count)))
    if sampler == "shuffle":
        return np.argsort(stream.random_raw(count), kind="stable")
    # Multiples of 2^-53 below 1: their product with a total or a count rounds to less than that.
    bits = stream.random_raw(2 * count) >> np.uint64(11)
    class_draws, picture_draws = bits.reshape(2, count) / 2**53
    counts = np.bincount(labels)
    edges = np.cumsum(class_shares(counts, sampler))
    drawn = np.searchsorted(edges, class_draws * edges[-1:], side="right")
    places = (picture_draws * counts[drawn]).astype(np.int64)
    by_class = np.argsort(labels, kind="stable")
    return by_class[(np.cumsum(counts) - counts)[drawn] + places]


def earlier_draws(order: np.ndarray) -> np.ndarray:
    """How often each entry of an epoch's order stands before in it, int64 [N]."""
    by_index = np.argsort(order, kind="stable")
    ordered = order[by_index]
    new = np.ones(len(order), dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    starts = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    earlier = np.empty(len(order), dtype=np.int64)
    earlier[by_index] = np.arange(len(order)) - starts
    return earlier


class PictureDataset(Dataset):
    """Transformed pictures by :data:`Draw`, each draw with its own augmentation.

    Args:
        pictures: N labelled pictures.
        transform: uint8 [3, H, W] -> float32 [3, S, S] or [5, 3, S, S], or :class:`Packed` for a
            device to go on with; may draw from torch's global generator, which is seeded for every
            picture and restored after it. One that changes from epoch to epoch has ``for_epoch``.
        seed: the run's seed.
    """

    def __init__(self, pictures: Pictures, transform: Transform, seed: int) -> None:
        self.pictures, self.transform, self.seed = pictures, transform, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def entropy(self, draw: Draw) -> tuple[int, ...]:
        """What decides the random part of a draw's transform."""
        return (self.seed, *draw)

    def __getitem__(self, draw: Draw) -> tuple[Tensor | Packed, int, int]:
        """The picture, its label and its index."""
        epoch, index = draw[:2]
        picture, transform = self.pictures.load(index), self.transform
        if hasattr(transform, "for_epoch"):
            transform = transform.for_epoch(epoch)
        state = np.random.SeedSequence(self.entropy(draw)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also reseed the GPU's generator, which is not restored.
            torch.default_generator.manual_seed(int(state[0]))
            picture = transform(picture)
        return picture, int(self.pictures.labels[index]), index


class ViewDataset(PictureDataset):
    """Randomly transformed pictures whose draws depend on a key and their content alone.

    Args:
        pictures, transform: as in :class:`PictureDataset`.
        digests: uint8 [N, 32], of the pictures' content.
        key: such as the run's seed and the number of the view.
    """

    def __init__(
        self, pictures: Pictures, transform: Transform, digests: np.ndarray, key: tuple[int, ...]
    ) -> None:
        super().__init__(pictures, transform, seed=0)
        self.digests, self.key = np.ascontiguousarray(digests).view(np.uint32), key

    def entropy(self, draw: Draw) -> tuple[int, ...]:
        return (*self.key, *self.digests[draw[1]].tolist())


class _EpochSampler(Sampler):
    """Batches of :data:`Draw`, so that worker processes need not be told of the epoch.

    Args:
        labels: int64 [N].
        batch_size: draws a batch.
        sampler: of :func:`epoch_order`; None takes every picture once and in order.
        seed: of the order.
    """

    def __init__(
        self, labels: np.ndarray, batch_size: int, sampler: Sampling | None = None, seed: int = 0
    ) -> None:
        self.labels, self.batch_size, self.sampler, self.seed = labels, batch_size, sampler, seed
        self.current_epoch = 0

    @property
    def _drop_last(self) -> bool:
        return self.sampler is not None and len(self.labels) >= self.batch_size

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.current_epoch
        order = np.arange(len(self.labels))
        if self.sampler is not None:
            order = epoch_order(self.labels, self.sampler, self.seed, epoch)
        earlier = earlier_draws(order).tolist()
        draws = [
            (epoch, index, again) if again else (epoch, index)
            for index, again in zip(order.tolist(), earlier, strict=True)
        ]
        for batch in range(len(self)):
            start = batch * self.batch_size
            yield draws[start : start + self.batch_size]


class _PartSampler(Sampler):
    """Some rows of every batch of another sampler."""

    def __init__(self, sampler: _EpochSampler, rows: Callable[[int], slice]) -> None:
        self.sampler, self.rows = sampler, rows

    @property
    def current_epoch(self) -> int:
        return self.sampler.current_epoch

    @current_epoch.setter
    def current_epoch(self, epoch: int) -> None:
        self.sampler.current_epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in self.sampler:
            if rows := batch[self.rows(len(batch))]:
                yield rows


class Batches:
    """Batches of one picture set, as often as they are asked for.

    Each is [images float32 [b, 3, S, S] or :class:`Packed`, labels int64 [b], index int64 [b]]:
    ``index`` says where in the picture set an image is. Iterating gives epoch 0.
    """

    def __init__(self, dataset: Dataset, sampler: _EpochSampler, workers: int) -> None:
        workers = min(workers, len(sampler))
        self._sampler = sampler
        self._loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=_collate,
            num_workers=workers,
            multiprocessing_context=_worker_context() if workers else None,
            persistent_workers=workers > 0,
            # Only where this process uses a GPU: pinning alone would start CUDA in a CPU run.
            pin_memory=torch.cuda.is_initialized(),
            # The loader draws a seed for its workers; not from the run's own generator.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def part(self, rows: Callable[[int], slice]) -> "Batches":
        """The same batches, of each the rows that ``rows`` says of its size; empty ones left out.

        Order and random crops are functions of seed, epoch and picture, so they stay what they are.
        """
        loader = self._loader
        return Batches(loader.dataset, _PartSampler(self._sampler, rows), loader.num_workers)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, from 0.

        Raises:
            InputError: a picture that can no longer be read.
        """
        self._sampler.current_epoch = epoch
        try:
            with report_dead_workers():
                yield from self._loader
        except InputError as error:
            # A worker's error arrives with the worker's traceback before its one line.
            message = str(error).rstrip().rpartition(f"{InputError.__name__}: ")[2]
            raise InputError(message) from None


def training_batches(
    pictures: Pictures,
    transform: Transform,
    batch_size: int,
    *,
    seed: int,
    workers: int = 0,
    sampler: Sampling = "shuffle",
) -> Batches:
    """Batches for training, in the order of :func:`epoch_order`; ``.epoch(e)`` gives those of e.

    As the peers do, a last batch that is not full is dropped, unless it is the only one.

    Args:
        pictures: the training set.
        transform: see :class:`PictureDataset`.
        batch_size: pictures a batch.
        seed: of order and transforms.
        workers: processes that load; 0 loads in this one.
        sampler: which pictures an epoch holds.
    """
    draws = _EpochSampler(pictures.labels, batch_size, sampler, seed)
    return Batches(PictureDataset(pictures, transform, seed), draws, workers)


def view_batches(
    pictures: Pictures,
    transform: Transform,
    batch_size: int,
    digests: np.ndarray,
    key: tuple[int, ...],
    workers: int = 0,
) -> Batches:
    """Every picture once, in order, with the draws of :class:`ViewDataset`."""
    draws = _EpochSampler(pictures.labels, batch_size)
    return Batches(ViewDataset(pictures, transform, digests, key), draws, workers)


def evaluation_batches(
    pictures: Pictures,
    transform: Transform,
    batch_size: int,
    *,
    workers: int = 0,
) -> Batches:
    """Every picture once, in order; arguments as in :func:`training_batches`."""
    draws = _EpochSampler(pictures.labels, batch_size)
    return Batches(PictureDataset(pictures, transform, seed=0), draws, workers)


def move_batches(
    batches: Iterable[Batch], device: torch.device, dtype: torch.dtype
) -> Iterator[list[Tensor]]:
    """Batches as :class:`Batches` gives them, on a device: images [b, 3, S, S], or
    [b, 5, 3, S, S], in ``dtype``.

    Features [b, Ds] that a method trains on keep their own.

    On a GPU one batch is ahead: its copy, and its transforms where they are the device's, run on a
    stream of their own beside the computation that the previous batch was given out for.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _move(batch, device, dtype)
        return
    side = torch.cuda.Stream(device)
    ahead = None
    for batch in batches:
        with torch.cuda.stream(side):
            moved = _move(batch, device, dtype), side.record_event()
        if ahead is not None:
            yield _hand_over(*ahead)
        ahead = moved
    if ahead is not None:
        yield _hand_over(*ahead)


def _move(batch: Batch, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    images, *others = batch
    if isinstance(images, Packed):
        images = resample(images, device, dtype)
    else:
        kept = dtype if images.ndim >= 4 else images.dtype
        images = images.to(device, kept, non_blocking=True)
    return [images, *(each.to(device, non_blocking=True) for each in others)]


def _hand_over(batch: list[Tensor], ready: torch.cuda.Event) -> list[Tensor]:
    """Make the current stream wait for a batch, and its memory for the current stream."""
    stream = torch.cuda.current_stream(batch[0].device)
    stream.wait_event(ready)
    for each in batch:
        each.record_stream(stream)
    return batch


def _collate(samples: list[tuple[Tensor | Packed, int, int]]) -> Batch:
    if not isinstance(samples[0][0], Packed):
        return default_collate(samples)
    pictures, labels, indices = zip(*samples, strict=True)
    return [join(pictures), torch.tensor(labels), torch.tensor(indices)]


class _LoaderProcess(ForkServerProcess):
    """A worker that never runs the main module, which nothing that is loaded comes from.

    Without ``if __name__ == "__main__"`` in it, running it would begin the run once more; one from
    standard input could not be run at all.
    """

    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _LoaderContext(ForkServerContext):
    Process = _LoaderProcess


def _worker_context() -> ForkServerContext:
    """Workers start from a clean process: a fork of this one could inherit locked threads or CUDA.

    That process imports once what this one has of the package, so that each worker starts at once.
    """
    context = _LoaderContext()
    package = __name__.partition(".")[0]
    context.set_forkserver_preload(
        [name for name in sys.modules if name.partition(".")[0] == package]
    )
    return context


@contextlib.contextmanager
def report_dead_workers() -> Iterator[None]:
    """Name a loading process that dies in one line; torch's signal handler may raise anywhere.

    Raises:
        InputError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--workers: a loading process died ({reason}); it may have lacked memory or space in"
            " /dev/shm, so expected fewer; --workers 0 loads in the main process"
        ) from None
