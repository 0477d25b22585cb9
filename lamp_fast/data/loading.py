"""Batches of transformed pictures, through torch's DataLoader.

Everything random is a function of (seed, epoch, index) alone: neither the number of worker
processes nor a resumed run changes a picture.
"""

import contextlib
import functools
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
from lamp_fast.errors import InputError

# Images, labels and indices.
Batch = list[Tensor | Packed]
Transform = Callable[[Tensor], Tensor | Packed]


class PictureDataset(Dataset):
    """Transformed pictures by (epoch, index).

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

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> tuple[Tensor | Packed, int, int]:
        """The picture, its label and its index."""
        epoch, index = epoch_and_index
        picture, transform = self.pictures.load(index), self.transform
        if hasattr(transform, "for_epoch"):
            transform = transform.for_epoch(epoch)
        state = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also reseed the GPU's generator, which is not restored.
            torch.default_generator.manual_seed(int(state[0]))
            picture = transform(picture)
        return picture, int(self.pictures.labels[index]), index


class CropFeatureDataset(Dataset):
    """Precomputed features by (epoch, index): of each epoch one crop, the same of every picture.

    Args:
        features: [N, crops, Ds].
        labels: int64 [N].
        seed: the run's seed.
    """

    def __init__(self, features: Tensor, labels: Tensor, seed: int) -> None:
        self.features, self.labels, self.seed = features, labels.tolist(), seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> tuple[Tensor, int, int]:
        """A feature [Ds], its label and its index."""
        epoch, index = epoch_and_index
        return self.features[index, self._crop(epoch)], self.labels[index], index

    @functools.lru_cache(maxsize=1)  # noqa: B019 - lives as long as the run
    def _crop(self, epoch: int) -> int:
        draw = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
        return int(draw[0] % self.features.shape[1])


class _EpochSampler(Sampler):
    """Batches of (epoch, index) pairs, so that worker processes need not be told of the epoch."""

    def __init__(self, length: int, batch_size: int, *, shuffle_seed: int | None) -> None:
        self.length, self.batch_size, self.shuffle_seed = length, batch_size, shuffle_seed
        self.current_epoch = 0

    @property
    def _drop_last(self) -> bool:
        return self.shuffle_seed is not None and self.length >= self.batch_size

    def __len__(self) -> int:
        whole, rest = divmod(self.length, self.batch_size)
        return whole + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.current_epoch
        order = np.arange(self.length)
        if self.shuffle_seed is not None:
            # The length keeps this stream apart from those of the pictures, (seed, epoch, index).
            key = np.random.SeedSequence((self.shuffle_seed, epoch, self.length))
            order = np.argsort(np.random.PCG64(key).random_raw(self.length), kind="stable")
        for batch in range(len(self)):
            start = batch * self.batch_size
            indices = order[start : start + self.batch_size].tolist()
            yield [(epoch, index) for index in indices]


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
) -> Batches:
    """Shuffled batches for training; ``.epoch(e)`` gives those of epoch e.

    As the peers do, a last batch that is not full is dropped, unless it is the only one.

    Args:
        pictures: the training set.
        transform: see :class:`PictureDataset`.
        batch_size: pictures a batch.
        seed: of order and transforms.
        workers: processes that load; 0 loads in this one.
    """
    sampler = _EpochSampler(len(pictures), batch_size, shuffle_seed=seed)
    return Batches(PictureDataset(pictures, transform, seed), sampler, workers)


def crop_feature_batches(
    features: Tensor, labels: Tensor, batch_size: int, *, seed: int
) -> Batches:
    """Shuffled batches of features [b, Ds], labels and index; see :class:`CropFeatureDataset`.

    As in :func:`training_batches`, a last batch that is not full is dropped, unless it is the only
    one.
    """
    sampler = _EpochSampler(len(labels), batch_size, shuffle_seed=seed)
    return Batches(CropFeatureDataset(features.cpu(), labels, seed), sampler, workers=0)


def evaluation_batches(
    pictures: Pictures,
    transform: Transform,
    batch_size: int,
    *,
    workers: int = 0,
) -> Batches:
    """Every picture once, in order; arguments as in :func:`training_batches`."""
    sampler = _EpochSampler(len(pictures), batch_size, shuffle_seed=None)
    return Batches(PictureDataset(pictures, transform, seed=0), sampler, workers)


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
