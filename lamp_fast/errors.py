"""The one exception that a user's input can cause."""


class InputError(ValueError):
    """Something the user gave cannot be served.

    The message is one line that names the argument, its value and what was expected. The entry
    points print it on standard error and exit with code 2; nothing has been written by then.
    """
