"""Pictures with labels, from files or from memory, decoded to RGB through PIL."""

import contextlib
import functools
import hashlib
import io
import os
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from lamp_fast.data.decoded import DecodedCache
from lamp_fast.errors import InputError

# What PIL may take a file for, whatever its name. Others can start programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF")
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".webp"),
    *(".tif", ".tiff"),
)

# What a picture may hold, by its header alone: where PIL itself refuses, enough for a camera of 108
# or 150 megapixels. Decoding takes at most 8 bytes a pixel, so 1.4 GB, for one picture at a time.
MAX_PIXELS = 2 * (1024**3 // 12)
MAX_BYTES = 1024**3 // 2

# A damaged file makes PIL's decoders raise almost anything.
_UNREADABLE = Exception
# Pictures a thread checks at a time: few enough for a smooth bar, enough to hide the hand-over.
_BLOCK = 32
_THREADS = min(8, os.cpu_count() or 1)
# Larger pictures are decoded by one thread at a time, so that memory does not grow with threads.
_LARGE_PIXELS = 2**24
_ONE_LARGE_PICTURE = threading.Lock()
# Of a larger picture this many pixels are converted to RGB at a time.
_BAND_PIXELS = 2**22
# Chunks of a PNG that are no pixels, and a field of TIFF with its value for signed integers.
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ANNOTATIONS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_SAMPLE_FORMAT, _SIGNED = 339, 2
_BOMB = f"more than {MAX_PIXELS:,} pixels, refused as a decompression bomb"


class Store(Protocol):
    """Where pictures lie that are no files of their own. Goes to worker processes by pickling."""

    def read(self, place: Sequence[int]) -> bytes:
        """The bytes of the picture file at a place, P integers.

        Raises:
            OSError, ValueError: it cannot be read.
        """


@dataclass(frozen=True, eq=False)
class Pictures:
    """Labelled pictures: in files below one folder, within other files, or in memory.

    Attributes:
        names: of each picture; relative to ``root`` where there is one.
        labels: int64 [N].
        root: folder of the files, or what the names in ``store`` start from; None where the
            pictures are in memory.
        arrays: uint8 [N, H, W, 3] RGB; None where the pictures are in files.
        digests: uint8 [N, 32], sha256 of each file, once :func:`check_pictures` has read it.
        cache: where decoded files are looked for and kept, once they have digests.
        downscale: larger pictures are scaled down to this shorter side when they are decoded.
        store: what reads pictures that are no files of their own; None where they are.
        places: int64 [N, P], where each of these lies in the store.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    root: Path | None = None
    arrays: np.ndarray | None = None
    digests: np.ndarray | None = None
    cache: DecodedCache | None = None
    downscale: int | None = None
    store: Store | None = None
    places: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=np.int64))
        if (self.root is None) == (self.arrays is None):
            raise ValueError("expected either root or arrays")
        if (self.store is None) != (self.places is None):
            raise ValueError("expected both of store and places, or none")
        lengths = {len(self.names), len(self.labels)}
        lengths |= {len(each) for each in (self.arrays, self.places) if each is not None}
        if len(lengths) > 1:
            raise ValueError(
                f"names, labels, arrays and places differ in length: {sorted(lengths)}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """What to call a picture in a message: its file, or its name in memory."""
        return self.names[index] if self.root is None else str(self.root / self.names[index])

    def select(self, indices: Sequence[int] | np.ndarray) -> "Pictures":
        """The pictures at ``indices`` (integers), in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            names=tuple(self.names[index] for index in indices.tolist()),
            labels=self.labels[indices],
            arrays=None if self.arrays is None else self.arrays[indices],
            digests=None if self.digests is None else self.digests[indices],
            places=None if self.places is None else self.places[indices],
        )

    def relabel(self, mapping: Mapping[int, int]) -> "Pictures":
        """The same pictures with label l replaced by ``mapping[l]``; every label must be in it."""
        labels = [mapping[label] for label in self.labels.tolist()]
        return replace(self, labels=np.array(labels, dtype=np.int64))

    def load(self, index: int) -> Tensor:
        """Decode one picture, or take it from the cache.

        Returns:
            uint8 [3, H, W] RGB, upright by its EXIF orientation; transparency shows white. The
            channel is innermost in memory, as PIL has it.

        Raises:
            InputError: a file that is missing, truncated, too large or no picture.
        """
        if self.arrays is not None:
            return self._as_tensor(Image.fromarray(self.arrays[index]))
        cache = self.cache if self.digests is not None else None
        if cache is not None:
            kept = cache.read(self.digests[index].tobytes(), self.downscale)
            if kept is not None:
                return kept.permute(2, 0, 1)
        try:
            content = self.content(index)
            picture = self._as_tensor(decode(content))
        except _UNREADABLE as error:
            raise InputError(unreadable_message(self.name(index), error)) from None
        if cache is not None:
            # Of what was decoded just now, should the file have changed since it was checked.
            digest = hashlib.sha256(content).digest()
            cache.write(digest, picture.permute(1, 2, 0), self.downscale)
        return picture

    def _as_tensor(self, image: Image.Image) -> Tensor:
        shorter = min(image.size)
        if self.downscale is not None and shorter > self.downscale:
            size = [max(1, round(side * self.downscale / shorter)) for side in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC)
        return pil_to_tensor(image)

    def content_digests(self) -> np.ndarray:
        """The sha256 of each picture's file, or of its array and the array's shape: uint8 [N, 32].

        Where no check has left them, every picture is read, once for this object.

        Raises:
            InputError: a file that cannot be read.
        """
        return self._computed_digests if self.digests is None else self.digests

    @functools.cached_property
    def _computed_digests(self) -> np.ndarray:
        found = []
        for index in range(len(self)):
            try:
                content = self.content(index)
            except _UNREADABLE as error:
                raise InputError(unreadable_message(self.name(index), error)) from None
            if self.arrays is not None:
                content += str(self.arrays[index].shape).encode()
            found.append(hashlib.sha256(content).digest())
        size = hashlib.sha256().digest_size
        return np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, size)

    def content(self, index: int) -> bytes:
        """The bytes of a picture's file, or of its array.

        Raises:
            OSError, ValueError: as :func:`read_file` or :meth:`Store.read`.
        """
        if self.arrays is not None:
            return self.arrays[index].tobytes()
        if self.store is not None:
            return self.store.read(self.places[index].tolist())
        return read_file(self.root / self.names[index])


def read_file(file: Path) -> bytes:
    """The bytes of a picture file.

    Raises:
        OSError: it cannot be read.
        ValueError: a device or a pipe, which could block for ever, or a file beyond
            :data:`MAX_BYTES`.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError("not a regular file")
    check_size(status.st_size)
    return file.read_bytes()


def check_size(size: int) -> None:
    """Refuse to read a picture file of more than :data:`MAX_BYTES` bytes, with ValueError."""
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes, expected at most {MAX_BYTES:,}")


def decode(content: bytes, *, only_check: bool = False) -> Image.Image:
    """Decode the bytes of a picture file to RGB.

    Greyscale of 16 bits is scaled to 8, not clipped. Transparent pixels show white, as in the
    pictures that open_clip's models were trained on (img2dataset). What a PNG carries beside its
    pixels is no reason to refuse them, however long it is.

    Args:
        content: a file in one of :data:`FORMATS`; of several frames the first counts.
        only_check: read every byte, but give a single pixel, for less work; what cannot be decoded
            raises all the same.

    Raises:
        ValueError: more than :data:`MAX_PIXELS` by the header, before memory is taken for them;
            values that have no agreed range, as floating-point or signed ones.
        Exception: whatever PIL makes of a damaged file.
    """
    try:
        return _decode(content, only_check)
    except ValueError:
        # PIL refuses more than 1 MB of a text or a colour profile, packed as it may be. Short ones
        # stay, because a text can say which way up the picture is.
        pixels = _without_annotations(content)
        if len(pixels) == len(content):
            raise
    return _decode(pixels, only_check)


def _decode(content: bytes, only_check: bool) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(_BOMB) from None
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ValueError(_BOMB)
    _check_values(image)
    with _ONE_LARGE_PICTURE if pixels > _LARGE_PIXELS else contextlib.nullcontext():
        if only_check:
            image.draft("L", (1, 1))
            image.load()
            return _to_rgb(image.crop((0, 0, 1, 1)))
        image.load()
        # Damaged metadata is no reason to refuse the pixels.
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def _without_annotations(content: bytes) -> bytes:
    """A PNG without its texts and its colour profile; anything else as it is."""
    if not content.startswith(_PNG_SIGNATURE):
        return content
    kept, position = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while position < len(content):
        # Length, kind, data and a checksum of four bytes.
        length = int.from_bytes(content[position : position + 4])
        kind = content[position + 4 : position + 8]
        end = position + 12 + length
        if kind not in _ANNOTATIONS:
            kept.append(content[position:end])
        position = end
    return b"".join(kept)


def _check_values(image: Image.Image) -> None:
    """Refuse numbers of which nobody can say which is black and which is white."""
    kinds = image.tag_v2.get(_SAMPLE_FORMAT, ()) if image.format == "TIFF" else ()
    if _SIGNED in (kinds if isinstance(kinds, tuple) else (kinds,)):
        raise ValueError("signed integers have no agreed range")
    if image.format == "TIFF" and image.mode == "I":
        raise ValueError("32-bit integers have no agreed range")
    if image.mode == "F":
        raise ValueError("floating-point values have no agreed range")


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB; a large one in bands, so that the copies on the way there stay small."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rows = max(1, _BAND_PIXELS // image.width)
    if image.height <= rows:
        return _band_to_rgb(image)
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(_band_to_rgb(band), (0, top))
    return result


def _band_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_pictures(
    pictures: Pictures, *, skip_unreadable: bool = False, progress: bool = True
) -> tuple[Pictures, tuple[str, ...], str]:
    """Read every picture once, before any work is based on it.

    Args:
        pictures: what to check; files are read and decoded far enough to find truncation.
        skip_unreadable: leave unreadable pictures out instead of raising.
        progress: show a bar on a terminal.

    Returns:
        The readable pictures with their digests; the names of the unreadable ones; the sha256, in
        hex, over name, label and bytes of every readable picture in order.

    Raises:
        InputError: an unreadable picture, the first in order, without ``skip_unreadable``.
    """
    readable, digests, unreadable, digest = [], [], [], hashlib.sha256()
    with contextlib.closing(inspect_pictures(pictures, progress=progress)) as outcomes:
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, bytes):
                readable.append(index)
                digests.append(outcome)
                name = os.fsencode(pictures.names[index])
                digest.update(b"%d %d " % (pictures.labels[index], len(name)) + name + outcome)
            elif skip_unreadable:
                unreadable.append(pictures.name(index))
            else:
                raise InputError(
                    f"{unreadable_message(pictures.name(index), outcome)};"
                    " --skip-unreadable goes on without such pictures"
                )
    kept = pictures.select(readable) if unreadable else pictures
    if pictures.arrays is None:
        found = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(
            -1, hashlib.sha256().digest_size
        )
        kept = replace(kept, digests=found)
    return kept, tuple(unreadable), digest.hexdigest()


def inspect_pictures(pictures: Pictures, *, progress: bool = True) -> Iterator[bytes | Exception]:
    """Read and decode every picture in threads, in order.

    Yields:
        The sha256 of a readable picture's bytes, or what stood in the way of reading it.
    """
    blocks = [
        range(start, min(start + _BLOCK, len(pictures)))
        for start in range(0, len(pictures), _BLOCK)
    ]
    executor = ThreadPoolExecutor(_THREADS)
    bar = tqdm(
        total=len(pictures),
        desc="checking pictures",
        leave=False,
        disable=None if progress else True,
    )
    try:
        results = executor.map(lambda block: [_check(pictures, each) for each in block], blocks)
        for outcomes in results:
            yield from outcomes
            bar.update(len(outcomes))
    finally:
        bar.close()
        executor.shutdown(cancel_futures=True)


def _check(pictures: Pictures, index: int) -> bytes | Exception:
    try:
        content = pictures.content(index)
        if pictures.arrays is None:
            decode(content, only_check=True)
    except _UNREADABLE as error:
        return error
    return hashlib.sha256(content).digest()


def unreadable_message(name: str, error: Exception) -> str:
    """Which picture cannot be read, and why, on one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        reason = f"not a {', '.join(FORMATS)} file"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return f"{name!r}: cannot be read as a picture ({reason})"
