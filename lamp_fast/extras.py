"""Libraries that only some work needs; an extra of the package installs each."""

import importlib
from types import ModuleType

from lamp_fast.errors import InputError


def need(where: str, module: str, extra: str, *, otherwise: str = "") -> ModuleType:
    """Import a library, or say how to install it.

    Args:
        where: what asks for it: a flag or a file, with which the message begins.
        module: the library, or a part of it.
        extra: of lamp_fast, which installs it.
        otherwise: what does without, with which the message ends.

    Raises:
        InputError: it is missing, or cannot be imported.
    """
    library = module.partition(".")[0]
    try:
        importlib.import_module(library)
        return importlib.import_module(module)
    except ImportError as error:
        if error.name == library:
            install = f"pip install 'lamp_fast[{extra}]'"
            raise InputError(f"{where}: needs {library} ({install}){otherwise}") from None
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: {library} cannot be imported ({reason})") from None
