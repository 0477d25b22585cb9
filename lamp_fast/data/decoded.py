"""Decoded pictures on disk, so that a file is decoded once and not once an epoch.

A picture lies in a safetensors file of its own, uint8 [H, W, 3] at its original size, and is mapped
into memory when read. The name is a hash over the source file's content and over what decodes it,
so a changed picture or another PIL never meets an old entry. Files are written beside their place
and renamed, hence whole or absent whoever else reads and writes; a checksum over name and pixels
finds what the disk damaged or another entry replaced, and such an entry is made again.

The folder carries a mark, and no other is written to; only files that the cache writes are removed.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import PIL
import torch
from filelock import FileLock
from PIL import features
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.utils.data import get_worker_info

FOLDER_VARIABLE = "LAMP_FAST_CACHE"
SUBFOLDER = "decoded"

# Raised whenever ``lamp_fast.data.pictures.decode`` makes other pixels of the same bytes.
_REVISION = 1
_LIBRARIES = ("jpg", "libjpeg_turbo", "zlib", "webp", "libtiff")
_DECODER = " ".join(
    [f"{_REVISION} pillow {PIL.__version__}", *(str(features.version(each)) for each in _LIBRARIES)]
).encode()

_PICTURE, _CHECKSUM = "picture", "crc32"
_LOCK, _TOTAL, _PARTIAL = ".lock", ".total", ".partial"
# Programs that make backups leave a folder alone that holds this file (bford.info/cachedir).
_MARK = "CACHEDIR.TAG"
_MARK_CONTENT = b"Signature: 8a477f597d28d172789f06886806bc55\n# Decoded pictures of lamp_fast.\n"
_PARTS = "[0-9a-f][0-9a-f]"
_WRITTEN = re.compile(rf"[0-9a-f]{{64}}|tmp\w{{8}}\{_PARTIAL}")
# What a file takes of most disks is a multiple of this.
_DISK_BLOCK = 4096
# Room is made for more than one picture, since making it means looking at every entry.
_LEFT_BY_EVICTION = 0.9
# A partial file older than this belongs to a process that is gone.
_SECONDS_TO_WRITE = 3600.0


def default_folder() -> Path:
    """``$LAMP_FAST_CACHE``, or ``lamp_fast`` in the user's cache folder."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lamp_fast"


def is_ours(folder: Path) -> bool:
    """Whether a folder carries the cache's mark, or holds nothing that the cache did not write."""
    if (folder / _MARK).is_file():
        return (folder / _MARK).read_bytes() == _MARK_CONTENT
    names = {each.name for each in folder.iterdir()} if folder.is_dir() else set()
    # Version 0.1.0 left no mark, but two files of its own beside the folders of entries.
    own = f"{_WRITTEN.pattern}|{_PARTS}" if {_LOCK, _TOTAL} <= names else _WRITTEN.pattern
    return all(re.fullmatch(own, each) for each in names - {_LOCK, _TOTAL})


def written_files(folder: Path) -> Iterator[os.DirEntry]:
    """Entries of a cache, partly written ones too; nothing of a folder that is none."""
    for part in folder.glob(_PARTS) if is_ours(folder) else ():
        with contextlib.suppress(OSError), os.scandir(part) as files:
            for each in files:
                if _WRITTEN.fullmatch(each.name) and each.is_file(follow_symlinks=False):
                    yield each


def clear(folder: Path) -> None:
    """Remove what the cache has written to its folder, and the folder if nothing else is in it."""
    for each in written_files(folder):
        os.unlink(each)
    if is_ours(folder):
        for name in (_LOCK, _TOTAL, _MARK):
            (folder / name).unlink(missing_ok=True)
        for each in (*folder.glob(_PARTS), folder):
            with contextlib.suppress(OSError):
                each.rmdir()


class DecodedCache:
    """The decoded pictures of one machine, at most ``limit`` bytes of them.

    When it is full, the pictures that no run has used for longest go. Those that this run has used
    stay: an epoch needs all its pictures alike, so that dropping one for another gains nothing.
    What then finds no room is decoded again each time. The cache never makes a run fail: without
    room on the disk or the right to write there, it says so in one line and keeps nothing more.

    Args:
        folder: holds the cache; made when first needed. Runs may share it at the same time.
        limit: bytes on disk; never more than half of what the disk has free beside the cache.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder / SUBFOLDER
        self.opened = time.time()
        self.limit = limit
        self._writes = True
        try:
            with self._lock():
                total = self._total()
                free = shutil.disk_usage(self.folder).free
                self.limit = min(limit, (total + free) // 2)
                if total > self.limit:
                    self._evict(self.limit)
        except OSError as error:
            self._stop_writing(error)

    def read(self, digest: bytes, downscale: int | None = None) -> Tensor | None:
        """A kept picture, uint8 [H, W, 3], mapped and writable without changing the file.

        Args:
            digest: sha256 of the source file.
            downscale: as in :meth:`write`.

        Returns:
            None where it is not kept, or damaged; a damaged entry is removed.
        """
        file = self._file(digest, downscale)
        try:
            with safe_open(file, "pt") as archive:
                picture = archive.get_tensor(_PICTURE)
                expected = archive.metadata()[_CHECKSUM]
            if picture.dtype == torch.uint8 and _checksum(file, picture) == expected:
                if file.stat().st_mtime < self.opened:
                    # Once a run: the least recently used run is what eviction looks at.
                    with contextlib.suppress(OSError):
                        os.utime(file)
                return picture
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, TypeError):
            pass
        with contextlib.suppress(OSError):
            file.unlink()
        return None

    def write(self, digest: bytes, picture: Tensor, downscale: int | None = None) -> None:
        """Keep a picture where there is room.

        Args:
            digest: sha256 of the source file.
            picture: uint8 [H, W, 3].
            downscale: the shorter side that it was scaled down to, None at its original size.
        """
        if not self._writes:
            return
        picture, file = picture.contiguous(), self._file(digest, downscale)
        metadata = {_CHECKSUM: _checksum(file, picture)}
        content = to_safetensors({_PICTURE: picture}, metadata=metadata)
        try:
            if self._reserve(_on_disk(len(content))):
                self._replace(file, content)
        except OSError as error:
            self._stop_writing(error)

    def size(self) -> int:
        """Bytes on disk."""
        return sum(size for _, _, size in self._entries())

    def _file(self, digest: bytes, downscale: int | None) -> Path:
        name = hashlib.sha256(b"%s %s %s" % (digest, _DECODER, str(downscale).encode())).hexdigest()
        return self.folder / name[:2] / name

    def _replace(self, file: Path, content: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Not mkstemp, which keeps out whoever shares the cache.
        partial = file.with_name(f"tmp{secrets.token_hex(4)}{_PARTIAL}")
        try:
            with open(partial, "xb") as stream:
                stream.write(content)
            os.replace(partial, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise

    def _lock(self) -> FileLock:
        if not is_ours(self.folder):
            raise OSError(f"it holds other files, and no {_MARK} of this cache")
        # The folder may have been cleared meanwhile.
        if not (self.folder / _MARK).is_file():
            self._replace(self.folder / _MARK, _MARK_CONTENT)
        return FileLock(self.folder / _LOCK)

    def _reserve(self, size: int) -> bool:
        """Enter ``size`` bytes into the total; False where they find no room.

        A process that dies before it writes leaves the total too large, never too small; eviction
        counts anew.
        """
        with self._lock():
            total = self._total()
            if total + size > self.limit:
                total = self._evict(min(self.limit - size, int(_LEFT_BY_EVICTION * self.limit)))
            self._writes = total + size <= self.limit
            if self._writes:
                (self.folder / _TOTAL).write_text(str(total + size), encoding="ascii")
        return self._writes

    def _total(self) -> int:
        try:
            return int((self.folder / _TOTAL).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return self.size()

    def _evict(self, most: int) -> int:
        """Remove what was used before this run, oldest first, down to ``most`` bytes."""
        entries = sorted(self._entries(), key=lambda entry: entry[1])
        total = sum(size for _, _, size in entries)
        for path, used, size in entries:
            if total <= most or used >= self.opened:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                total -= size
        (self.folder / _TOTAL).write_text(str(total), encoding="ascii")
        return total

    def _entries(self) -> list[tuple[str, float, int]]:
        """Path, time of last use and bytes of every entry; what dead processes left is removed."""
        entries = []
        for each in written_files(self.folder):
            # An entry that another process has just removed.
            with contextlib.suppress(OSError):
                status = each.stat()
                stale = status.st_mtime < time.time() - _SECONDS_TO_WRITE
                if stale and each.name.endswith(_PARTIAL):
                    os.unlink(each)
                    continue
                entries.append((each.path, status.st_mtime, _on_disk(status.st_size)))
        return entries

    def _stop_writing(self, error: OSError) -> None:
        self._writes = False
        # Worker processes meet a full disk together; one line says it all.
        if (worker := get_worker_info()) is None or worker.id == 0:
            reason = error.strerror or error
            print(
                f"warning: {self.folder}: no more decoded pictures are kept ({reason})",
                file=sys.stderr,
            )


def _checksum(file: Path, picture: Tensor) -> str:
    """Over pixels, their shape and the name, which stands for what they were decoded from."""
    described = zlib.crc32(f"{file.name} {list(picture.shape)}".encode())
    return f"{zlib.crc32(picture.numpy(), described):08x}"


def _on_disk(size: int) -> int:
    return -(-size // _DISK_BLOCK) * _DISK_BLOCK
