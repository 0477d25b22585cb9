"""A folder of files that can be made again: bounded, shared by runs, whole under concurrency.

Files are written beside their place and renamed, hence whole or absent whoever else reads and
writes. The folder carries a mark, and no other is written to; only files that the cache writes are
removed.
"""

import contextlib
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from lamp_fast.cli import expand_path

FOLDER_VARIABLE = "LAMP_FAST_CACHE"
CONTENTS = {
    "decoded": "decoded pictures",
    "features": "features",
    "shards": "indices of shards",
}
"""The folders of the caches below it, and what each keeps, in the plural."""

_LOCK, _TOTAL, _PARTIAL = ".lock", ".total", ".partial"
# Programs that make backups leave a folder alone that holds this file (bford.info/cachedir).
_MARK = "CACHEDIR.TAG"
_SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55\n"
_OUR_MARK = re.escape(_SIGNATURE) + rb"# [A-Z][a-z ]+ of lamp_fast\.\n"
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
        return expand_path(given)
    return expand_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lamp_fast"


def is_ours(folder: Path) -> bool:
    """Whether a folder carries the cache's mark, or holds nothing that the cache did not write."""
    if (folder / _MARK).is_file():
        return re.fullmatch(_OUR_MARK, (folder / _MARK).read_bytes()) is not None
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


class DiskCache:
    """Files of one kind on one machine, at most ``limit`` bytes of them.

    When it is full, the files that no run has used for longest go. Those that this run has used
    stay: an epoch needs all its pictures alike, so that dropping one for another gains nothing.
    What then finds no room is made again each time. The cache never makes a run fail: without
    room on the disk or the right to write there, it says so in one line and keeps nothing more.

    Args:
        folder: holds the cache; made when first needed. Runs may share it at the same time.
        limit: bytes on disk; never more than half of what the disk has free beside the cache.
    """

    subfolder: str
    """Its own folder in ``folder``; of :data:`CONTENTS`."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder / self.subfolder
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

    def size(self) -> int:
        """Bytes on disk."""
        return sum(size for _, _, size in self._entries())

    def _write(self, file: Path, content: bytes) -> None:
        """Keep a file where there is room."""
        try:
            if self._writes and self._reserve(_on_disk(len(content))):
                self._replace(file, content)
        except OSError as error:
            self._stop_writing(error)

    def _used(self, file: Path) -> None:
        """Once a run: the least recently used run is what eviction looks at."""
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < self.opened:
                os.utime(file)

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

    @property
    def _mark(self) -> bytes:
        return _SIGNATURE + f"# {CONTENTS[self.subfolder].capitalize()} of lamp_fast.\n".encode()

    def _lock(self) -> FileLock:
        if not is_ours(self.folder):
            raise OSError(f"it holds other files, and no {_MARK} of this cache")
        # The folder may have been cleared meanwhile.
        if not (self.folder / _MARK).is_file():
            self._replace(self.folder / _MARK, self._mark)
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
        from torch.utils.data import get_worker_info

        if (worker := get_worker_info()) is None or worker.id == 0:
            reason = error.strerror or error
            print(
                f"warning: {self.folder}: no more {CONTENTS[self.subfolder]} are kept ({reason})",
                file=sys.stderr,
            )


def _on_disk(size: int) -> int:
    return -(-size // _DISK_BLOCK) * _DISK_BLOCK
