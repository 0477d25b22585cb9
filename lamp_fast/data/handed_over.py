"""Pictures as a caller hands them over: paths, files' bytes, PIL images, arrays."""

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from lamp_fast.data.pictures import Pictures, decode, unreadable_message
from lamp_fast.errors import InputError


@dataclass(frozen=True)
class NamedFile:
    """The bytes of a file, and what to call it in messages."""

    name: str
    content: bytes


Picture = str | os.PathLike | bytes | NamedFile | Image.Image | np.ndarray
# What is held of a picture until a thread reads it; an error where there is nothing to read.
Taken = Path | bytes | NamedFile | Image.Image | InputError

# Decoding leaves the interpreter's lock; beyond this the disk or the CLIP is what one waits for.
_THREADS = min(8, os.cpu_count() or 1)


def take(number: int, picture: Picture) -> Taken:
    """What a picture shows now, whatever becomes of its buffer: a camera's is filled again."""
    if isinstance(picture, (str, os.PathLike)):
        return Path(picture)
    # An error stands for a picture that is not there.
    if isinstance(picture, (bytes, NamedFile, InputError)):
        return picture
    where = f"pictures[{number}]"
    if isinstance(picture, np.ndarray):
        plain = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))
        if picture.dtype != np.uint8 or not plain or not picture.size:
            return InputError(
                f"{where}: {picture.dtype} array {list(picture.shape)}, expected uint8 [H, W],"
                " [H, W, 3] or [H, W, 4]"
            )
        return Image.fromarray(picture.copy())
    if not isinstance(picture, Image.Image):
        kind = type(picture).__name__
        return InputError(
            f"{where}: {kind}, expected a path, a file's bytes, a PIL image or a uint8 array"
        )
    try:
        # A copy, decoded here: images that share a file cannot be loaded by several threads.
        copy = ImageOps.exif_transpose(picture)
        # PIL opens greyscale of 16 bits as 32-bit integers, from which a TIFF could not tell it.
        grey16 = picture.mode == "I" and picture.format in ("PNG", "PPM")
        return copy.convert("I;16") if grey16 else copy
    except Exception as error:
        return _unreadable(number, error)


def read_taken(number: int, taken: Path | bytes | NamedFile | Image.Image) -> Tensor:
    """A picture as uint8 [3, H, W] RGB, by the same rules as a file's."""
    if isinstance(taken, Path):
        return Pictures(names=(taken.name,), labels=np.zeros(1), root=taken.parent).load(0)
    if isinstance(taken, NamedFile):
        try:
            return pil_to_tensor(decode(taken.content))
        except Exception as error:
            raise InputError(unreadable_message(taken.name, error)) from None
    try:
        return pil_to_tensor(decode(taken if isinstance(taken, bytes) else _as_file(taken)))
    except Exception as error:  # as with files, PIL raises almost anything
        raise _unreadable(number, error) from None


def _unreadable(number: int, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"pictures[{number}]: cannot be read as a picture ({reason})")


def _as_file(image: Image.Image) -> bytes:
    """The bytes of a lossless file, so that an image in memory is read by a file's rules."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
    content = io.BytesIO()
    image.save(content, format="TIFF")
    return content.getvalue()


def load_ahead(
    pictures: Iterable[Picture], load: Callable[[int, Taken], Any], size: int
) -> Iterator[list[Any]]:
    """Batches of loaded pictures; threads load the next batch while this one is computed on.

    What a picture shows is taken before the next one is asked for, which may be in its place.
    """
    numbered = ((number, take(number, picture)) for number, picture in enumerate(pictures))
    executor = ThreadPoolExecutor(_THREADS)
    waiting: deque[list[Future]] = deque()
    try:
        while batch := [executor.submit(load, *each) for each in islice(numbered, size)]:
            waiting.append(batch)
            if len(waiting) > 1:
                yield [each.result() for each in waiting.popleft()]
        while waiting:
            yield [each.result() for each in waiting.popleft()]
    finally:
        executor.shutdown(cancel_futures=True)
