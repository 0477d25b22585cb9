"""The one exception that a user's input can cause, and how a terminal shows what users gave."""


class InputError(ValueError):
    """Something the user gave cannot be served.

    The message is one line that names the argument, its value and what was expected. The entry
    points print it on standard error and exit with code 2; nothing has been written by then.
    """


def printable(text: str) -> str:
    """Text as one line of a terminal.

    Names of files and classes may hold anything: what could steer a terminal, end the line or
    reverse it is escaped, as Python writes it.
    """
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
