"""Files that grow a batch at a time, and are whole or not there all the same.

What is written lies in ``FILE.partial`` until the last row. Beside it ``FILE.partial.json`` says
which call writes it and up to where it is whole, so that the same call goes on after a crash, and
another one is refused.
"""

import contextlib
import json
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lamp_fast.errors import InputError
from lamp_fast.files import behind_links, read_json, write_json

try:
    import fcntl
except ImportError:  # not on Windows, where a file that is open cannot be replaced anyway
    fcntl = None

# In place of a file: standard output.
STDOUT = Path("-")
# Seconds between two entries of how far the files are; each one waits for the disk.
_BETWEEN = 1.0

# From the lines of a whole partial file, in order, to the pieces of the file that is wanted.
Finish = Callable[[Iterator[bytes]], Iterator[str]]


@dataclass(frozen=True)
class Output:
    """A file to write.

    Attributes:
        flag: what named it.
        file: where; :data:`STDOUT` is standard output.
        header: what comes before the first row.
        finish: makes the file of the lines that were written; None where they are the file.
    """

    flag: str
    file: Path
    header: str = ""
    finish: Finish | None = None


class GrowingFiles:
    """Text that is written to some outputs at once; to be used in a ``with``.

    A call is continued where every output is a regular file, there or to come. Else nothing is
    kept of what did not end.

    Args:
        outputs: what is written.
        call: what must be the same where a call is continued, by the words that tell of it.
        recorded: ``FILE.done`` says which call has written the only output, so that the same one
            need not write it again and another one does not.

    Attributes:
        complete: whether the same call has written everything already.
        done: how many pictures the outputs hold already.
        unreadable: how many of these could not be read.

    Raises:
        InputError: a partial file of another call, or one that is written at this moment.
    """

    def __init__(
        self, outputs: Sequence[Output], call: Mapping[str, Any], *, recorded: bool = False
    ) -> None:
        self._outputs = outputs
        self._recorded, self.complete = recorded, False
        self._call = json.loads(json.dumps(call))
        self._targets = [
            None if each.file == STDOUT else behind_links(each.file) for each in outputs
        ]
        self._partials = [
            None if target is None else target.with_name(f"{target.name}.partial")
            for target in self._targets
        ]
        self.continues = bool(outputs) and None not in self._targets
        self._streams: list[IO[bytes] | None] = []
        self.done = self.unreadable = 0
        self._sizes = [0] * len(outputs)
        self._entered = time.monotonic()
        self._open = contextlib.ExitStack()

    @property
    def _state(self) -> Path:
        first = self._partials[0]
        return first.with_name(f"{first.name}.json")

    @property
    def _record(self) -> Path:
        first = self._targets[0]
        return first.with_name(f"{first.name}.done")

    def __enter__(self) -> "GrowingFiles":
        if self._recorded and self._record.exists() and self._targets[0].exists():
            self.done, self.unreadable, _ = self._read(
                self._record, self._targets[0], "expected a new folder, or the same call"
            )
            self.complete = True
            return self
        with self._open:
            for output, partial in zip(self._outputs, self._partials, strict=True):
                with _naming(output.file):
                    self._streams.append(self._stream(output, partial))
            if self.continues:
                self._go_on()
            for stream, size, partial in zip(
                self._streams, self._sizes, self._partials, strict=True
            ):
                if partial is not None:  # what came after the last whole batch is written again
                    stream.truncate(size)
                    stream.seek(size)
            self._open = self._open.pop_all()
        if not self.done:
            self.write([each.header for each in self._outputs])
        return self

    def _go_on(self) -> None:
        """Take over what an earlier call has left, if it was the same one."""
        held = [os.fstat(each.fileno()).st_size for each in self._streams]
        if not self._state.exists() or 0 in held:
            return
        partial = self._partials[0]
        anew = f"the same call goes on, and without {partial} it starts anew"
        done, unreadable, sizes = self._read(self._state, partial, anew)
        whole = len(sizes) == len(held) and 0 <= unreadable <= done
        if not whole or any(not 0 < size <= most for size, most in zip(sizes, held, strict=True)):
            raise InputError(f"{partial}: is not what {self._state} tells of it; {anew}")
        self.done, self.unreadable, self._sizes = done, unreadable, sizes

    def _read(self, file: Path, about: Path, then: str) -> tuple[int, int, list[int]]:
        """Pictures, unreadable ones and sizes that a file tells of, if it tells of this call."""
        state = read_json(file)
        try:
            call, sizes = dict(state["call"]), [int(each) for each in state["bytes"]]
            done, unreadable = int(state["pictures"]), int(state["unreadable"])
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{file}: damaged; {then}") from None
        for name in {**self._call, **call}:
            one, other = call.get(name), self._call.get(name)
            if one != other:
                raise InputError(f"{about}: was begun with {_difference(name, one, other)}; {then}")
        return done, unreadable, sizes

    def _stream(self, output: Output, partial: Path | None) -> IO[bytes] | None:
        """Where bytes go; None for standard output, which takes text."""
        if partial is not None:
            stream = self._open.enter_context(partial.open("ab"))
            if not _lock(stream) or not os.path.samestat(os.fstat(stream.fileno()), partial.stat()):
                raise InputError(
                    f"{output.flag} {output.file}: another process writes it at this moment"
                )
            return stream
        if output.finish is not None:
            return self._open.enter_context(tempfile.TemporaryFile())
        if output.file == STDOUT:
            return None
        return self._open.enter_context(open(output.file, "ab"))  # what was printed there stays

    def write(self, texts: Sequence[str]) -> None:
        """Append a text to each output."""
        for output, stream, text in zip(self._outputs, self._streams, texts, strict=True):
            with _naming(output.file):
                if stream is None:
                    sys.stdout.write(text)
                    sys.stdout.flush()
                else:
                    stream.write(text.encode())

    def mark(self, pictures: int, unreadable: int) -> None:
        """Say that the outputs hold so many pictures: a batch is whole."""
        self.done, self.unreadable = pictures, unreadable
        self._sizes = [0 if each is None else each.tell() for each in self._streams]
        if self.continues and time.monotonic() - self._entered >= _BETWEEN:
            self._enter()

    def _enter(self) -> None:
        """Write down how far the files are, once they are on the disk."""
        for output, stream in zip(self._outputs, self._streams, strict=True):
            with _naming(output.file):
                stream.flush()
                os.fsync(stream.fileno())
        self._write_state(self._state)
        self._entered = time.monotonic()

    def _write_state(self, file: Path) -> None:
        held = {"pictures": self.done, "unreadable": self.unreadable, "bytes": self._sizes}
        write_json(file, {"call": self._call, **held})

    def finish(self) -> None:
        """Put every output in its place."""
        for output, stream, target, partial in zip(
            self._outputs, self._streams, self._targets, self._partials, strict=True
        ):
            if stream is None:
                continue
            with _naming(output.file):
                stream.flush()
                if output.finish is not None:
                    self._make(output, stream, target, partial)
                elif partial is not None:
                    os.fsync(stream.fileno())
                    os.replace(partial, target)
        if self._recorded:
            self._write_state(self._record)
        self._tidy()

    def _make(
        self, output: Output, lines: IO[bytes], target: Path | None, partial: Path | None
    ) -> None:
        """Write what ``output.finish`` makes of the lines."""
        if partial is not None:
            lines = self._open.enter_context(partial.open("rb"))
        lines.seek(0)
        pieces = output.finish(lines)
        if output.file == STDOUT:
            sys.stdout.writelines(pieces)
            sys.stdout.flush()
            return
        made = output.file if target is None else target.with_name(f".{target.name}.partial")
        try:
            with open(made, "ab" if target is None else "wb") as stream:
                stream.writelines(piece.encode() for piece in pieces)
                stream.flush()
                if target is not None:
                    os.fsync(stream.fileno())
            if target is not None:
                os.replace(made, target)
        finally:
            if target is not None:
                made.unlink(missing_ok=True)

    def _tidy(self) -> None:
        for file in filter(None, self._partials):
            file.unlink(missing_ok=True)
        if self.continues:
            self._state.unlink(missing_ok=True)

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            if kind is not None and self.continues and self.done:
                # The error that stopped the call, a full disk perhaps, is the one to tell.
                with contextlib.suppress(OSError):
                    self._enter()
            elif kind is not None:
                self._tidy()
        finally:
            self._close()

    def _close(self) -> None:
        # Closing flushes what is of no batch, which a full disk refuses once more.
        with contextlib.suppress(OSError):
            self._open.close()


def as_document(about: Mapping[str, Any]) -> Finish:
    """One JSON object of JSON lines: ``about`` first, then those with and without an answer.

    Lines with a ``reason`` go to ``"unreadable"``, the others to ``"pictures"``. No more than a
    line is held.
    """

    def finish(lines: Any) -> Iterator[str]:
        yield json.dumps(about, indent=2).removesuffix("\n}")
        for key, failed in (("pictures", False), ("unreadable", True)):
            lines.seek(0)
            yield f',\n  "{key}": ['
            before = "\n"
            for line in lines:
                value = json.loads(line)
                if ("reason" in value) is failed:
                    yield before + textwrap.indent(json.dumps(value, indent=2), " " * 4)
                    before = ",\n"
            yield "]" if before == "\n" else "\n  ]"
        yield "\n}\n"

    return finish


def _lock(stream: IO[bytes]) -> bool:
    """Keep other processes off an open file until it is closed, however this one ends."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _difference(name: str, one: Any, other: Any) -> str:
    """What differs, in a few words; what is long, or a digest, by its name alone."""
    shown = [str(each) for each in (one, other)]
    if isinstance(one, list) or isinstance(other, list) or any(len(each) > 40 for each in shown):
        return f"other {name}"
    return f"{name} {shown[0]}, not {shown[1]}"


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """A full disk does not say which file, and a partial one is not what the user asked for."""
    try:
        yield
    except OSError as error:
        if file != STDOUT:
            error.filename, error.filename2 = str(file), None
        raise
