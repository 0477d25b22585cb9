"""Files that are whole or not there: every write is atomic, and nothing here unpickles.

JSON and CSV here; :mod:`lamp_fast.tensors` keeps tensors in the same way. A file is either the old
one or the new one, whenever the process dies. Links are followed; devices and pipes are written to
as they are.
"""

import csv
import io
import json
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lamp_fast.errors import InputError

# What is JSON of ours nests no deeper, and no integer of it needs more bits than a tensor's.
MAX_DEPTH = 32
INT64 = range(-(2**63), 2**63)

# Names below these stand for what a process has open; renaming over one would cut the others off.
_SYSTEM = (Path("/dev"), Path("/proc"))


def write_bytes(file: Path, content: bytes) -> None:
    """Replace ``file`` as a whole: written beside it, synced, then renamed over it.

    A link stays, and what it leads to is replaced. What is there and is no regular file (a device,
    a pipe), or is an open file's name (``/dev/stdout``), is written to directly.
    """
    target = behind_links(file)
    if target is None:
        with open(file, "ab") as stream:  # what was printed to the same file before stays
            stream.write(content)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    except OSError as error:
        # A full disk does not say which file, and the partial one is not what the user asked for.
        error.filename, error.filename2 = str(file), None
        raise
    finally:
        partial.unlink(missing_ok=True)


def behind_links(file: Path) -> Path | None:
    """The regular file, there or to come, that a name leads to; None where it is none."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            return None
    except FileNotFoundError:
        pass
    file = file.absolute()
    while file.is_symlink():
        if any(file.is_relative_to(folder) for folder in _SYSTEM):
            return None
        file = file.parent / file.readlink()
    return file


def refuse_output(flag: str, file: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse before any work a file that cannot be written after it, or that is read.

    Args:
        flag: what named the file.
        file: the output.
        inputs: files that are read; those that are not there cannot be hit.

    Raises:
        InputError: a folder, or one of the inputs, also where a link or another name leads there.
    """
    try:
        output = os.stat(file)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {file}: cannot be written ({reason_of(error)})") from None
    if stat.S_ISDIR(output.st_mode):
        raise InputError(f"{flag} {file}: is a folder, expected a file to write")
    if not stat.S_ISREG(output.st_mode):
        return
    for each in inputs:
        try:
            same = os.path.samestat(os.stat(each), output)
        except (OSError, ValueError):
            continue
        if same:
            raise InputError(f"{flag} {file}: is read as {each}, expected another file to write")


def path_text(path: str | os.PathLike[str]) -> str:
    """A path as text, also where its bytes are no UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def reason_of(error: Exception) -> str:
    """What an error says, on one line and without the file's name."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def write_json(file: Path, value: Any) -> None:
    """Write plain JSON values, indented."""
    write_bytes(file, (json.dumps(value, indent=2) + "\n").encode())


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table with a header line.

    Cells hold names exactly as they are, for programs. A spreadsheet may take one that begins with
    ``=``, ``+``, ``-`` or ``@`` for a formula: a quote before it would be safe there, and another
    name for everybody else.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_bytes(file, text.getvalue().encode())


def read_json(file: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        InputError: naming a file that is missing or damaged, or holds what no run writes: values
            deeper than ``MAX_DEPTH``, integers beyond 64 bits, text that is no Unicode.
    """
    content = read_regular(file)
    try:
        return parse_json(content.decode())
    except ValueError as error:
        raise InputError(f"{file}: damaged ({reason_of(error)})") from None


def parse_json(text: str) -> Any:
    """Plain values of a JSON text that was not written here.

    Raises:
        ValueError: see :func:`read_json`.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_plain(value, 0)
    return value


def _check_plain(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_plain(name, depth)
            _check_plain(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, depth + 1)
    elif isinstance(value, str):
        value.encode()  # half a surrogate pair is refused here, and not where it is printed
    elif isinstance(value, int) and value not in INT64:
        raise ValueError("an integer of more than 64 bits")


def read_regular(file: Path) -> bytes:
    """The content of a file of a run; a pipe is not waited for.

    Raises:
        InputError: it is missing, or no file.
    """
    try:
        if file.exists() and not file.is_file():
            raise OSError("no regular file")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: expected a file of a run ({reason_of(error)})") from None


def same_file(file: Path, other: Path) -> bool:
    """Whether two names lead to one regular file, there or to come."""
    if not (file.exists() and other.exists()):
        return file.resolve() == other.resolve()
    return file.is_file() and file.samefile(other)
