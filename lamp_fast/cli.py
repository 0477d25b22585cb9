"""How every command reads its arguments and reports what it cannot serve.

Flags come from frozen dataclasses through tyro. A user's mistake costs one line on standard error
and exit code 2, never a traceback; anything else is a bug of ours and keeps its traceback.
"""

import contextlib
import functools
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TextIO, TypeVar

import tyro

from lamp_fast.errors import InputError, printable

Config = TypeVar("Config")

INTERRUPTED = 130

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
    try:
        sys.exit(main(read(argv)) or 0)
    except InputError as error:
        say(f"error: {' '.join(str(error).split())}", stream=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # A full disk, a folder that is read-only, a pipe that closed: the machine's, not a bug.
        where = "" if error.filename is None else f"{error.filename}: "
        reason = " ".join(str(error.strerror or error).split())
        say(f"error: {where}{reason}", stream=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        print(file=sys.stderr)
        say(str(interrupt) or "interrupted", stream=sys.stderr)
        sys.exit(INTERRUPTED)


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
