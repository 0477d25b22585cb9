"""How every command reads its arguments and reports what it cannot serve.

Flags come from frozen dataclasses through tyro. A user's mistake costs one line on standard error
and exit code 2, never a traceback; anything else is a bug of ours and keeps its traceback.
"""

import codecs
import contextlib
import functools
import io
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

import tyro

from lamp_fast.errors import InputError, printable

Config = TypeVar("Config")

INTERRUPTED = 130
# A Ctrl-C that follows another one within so many seconds is part of it.
_ONE_INTERRUPT = 1.0

_PATHS = tyro.constructors.ConstructorRegistry()


def expand_path(path: str | os.PathLike) -> Path:
    """A path with ``~`` or ``~name`` at its beginning as that home folder.

    Shells do this for ``--out ~/x``, not for ``--out=~/x``, and nobody does it for keywords.

    Raises:
        InputError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: there is no such home folder, expected a full path") from None


@_PATHS.primitive_rule
def _path_flag(
    kind: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Every flag that is a path is read by :func:`expand_path`."""
    if kind.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda arguments: expand_path(arguments[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


_UNKNOWN = re.compile(r"Unrecognized options: (--[^\s,=]+)")


class UnknownFlagError(InputError):
    """A flag that the command does not have.

    Attributes:
        flag: the first one.
    """

    def __init__(self, message: str, flag: str) -> None:
        super().__init__(message)
        self.flag = flag


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    prog: str | None = None,
    default: Config | None = None,
    description: str | None = None,
) -> Config:
    """Read flat flags into ``config_class``; ``default`` supplies what the flags leave out.

    Raises:
        InputError: a flag or value that does not fit, with the library's message on one line.
        SystemExit: ``--help`` (code 0).
    """
    stderr = io.StringIO()
    helping = any(each in ("-h", "--help") for each in argv)
    try:
        with contextlib.redirect_stderr(stderr), _columns(None if helping else 10_000):
            return tyro.cli(
                config_class,
                args=list(argv),
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=_PATHS,
                **({} if default is None else {"default": default}),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _message_in_box(stderr.getvalue())
        if unknown := _UNKNOWN.match(message):
            raise UnknownFlagError(message, unknown[1]) from None
        raise InputError(message) from None


def say(*lines: str, stream: TextIO | None = None) -> None:
    """Print lines that may hold names of files and classes; see :func:`printable`.

    What the stream's encoding lacks is escaped too.

    Args:
        lines: each stays one line.
        stream: by default standard output.
    """
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "ascii"
    for line in lines:
        shown = printable(line).encode(encoding, "backslashreplace").decode(encoding)
        print(shown, file=stream, flush=True)


def run(
    config_class: type[Config],
    main: Callable[[Config], int | None],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> NoReturn:
    """Parse the command line, call ``main`` with the result and exit with its code."""
    read = functools.partial(parse, config_class, prog=prog, description=description)
    run_read(read, main, argv)


def run_read(
    read: Callable[[Sequence[str]], Config],
    main: Callable[[Config], int | None],
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """As :func:`run`, where ``read`` turns the raw arguments into what ``main`` takes."""
    argv = sys.argv[1:] if argv is None else argv
    _quieten()
    _print_whatever_comes()
    with _one_interrupt():
        try:
            sys.exit(main(read(argv)) or 0)
        except InputError as error:
            say(f"error: {' '.join(str(error).split())}", stream=sys.stderr)
            sys.exit(2)
        except OSError as error:
            # A full disk, a read-only folder, a pipe that closed: the machine's, not a bug.
            where = "" if error.filename is None else f"{error.filename}: "
            reason = " ".join(str(error.strerror or error).split())
            say(f"error: {where}{reason}", stream=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt as interrupt:
            print(file=sys.stderr)
            say(str(interrupt) or "interrupted", stream=sys.stderr)
            sys.exit(INTERRUPTED)


def _print_whatever_comes() -> None:
    """Escape what an output cannot show: names come from files, and many a log is ASCII."""
    codecs.register_error("lamp_fast", _plainer)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="lamp_fast")


def _plainer(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].replace("\N{PLUS-MINUS SIGN}", "+-")
    return text.encode("ascii", "backslashreplace").decode(), error.end


@contextlib.contextmanager
def _one_interrupt() -> Iterator[None]:
    """Let a second Ctrl-C right after the first not break off what that one tidies up and says."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    last = float("-inf")

    def interrupt(*_: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > _ONE_INTERRUPT:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        # After an interrupt the process ends, and the second may come as late as that: Python gives
        # the default, which kills, back to signals with a handler before it is gone.
        interrupted = last != float("-inf")
        signal.signal(signal.SIGINT, signal.SIG_IGN if interrupted else signal.default_int_handler)


def _quieten() -> None:
    """Our own warnings are one line; libraries' chatter on the root logger stays out of the way."""
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"PIL\..*")
    warnings.showwarning = lambda message, category, *_, **__: say(
        f"warning: {' '.join(str(message).split())}", stream=sys.stderr
    )


@contextlib.contextmanager
def _columns(count: int | None) -> Iterator[None]:
    """Let the CLI library think the terminal is this wide, so that its messages do not wrap."""
    before = os.environ.get("COLUMNS")
    if count is not None:
        os.environ["COLUMNS"] = str(count)
    try:
        yield
    finally:
        if before is not None:
            os.environ["COLUMNS"] = before
        elif count is not None:
            del os.environ["COLUMNS"]


def _message_in_box(text: str) -> str:
    """The first paragraph of tyro's box, on one line.

    The title is in the box's upper edge, or above a rule of hyphens where the locale is ASCII.
    """
    lines = [line.strip().strip("│|").strip() for line in text.splitlines()]
    top = next((at for at, line in enumerate(lines) if line.startswith(("╭", "---"))), -1)
    words = []
    for line in lines[top + 1 :]:
        if line.startswith(("─", "---", "╰")):
            break
        words.append(line)
    return " ".join(filter(None, words)) or "the arguments could not be read; see --help"
