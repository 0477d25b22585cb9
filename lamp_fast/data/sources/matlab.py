"""Variables of MATLAB's .mat files, as lists, dicts, strings and numbers.

Nothing is unpickled. scipy's reader is compiled, and a damaged file can end the process that it
runs in (segmentation faults, in 1.17), so it runs in a process of its own and answers in JSON.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamp_fast.errors import InputError

# Far beyond the seconds that the largest file of the catalog takes.
LONGEST_SECONDS = 300

# Arguments: file, variable, file, variable, ... It prints a list with a value each. Not a module of
# ours, because importing the package would take longer than all the rest.
READER = """
import json, sys
from scipy.io import loadmat
values = [
    loadmat(file, appendmat=False, variable_names=[name], simplify_cells=True).get(name)
    for file, name in zip(sys.argv[1::2], sys.argv[2::2])
]
print(json.dumps(values, default=lambda each: each.tolist()))
"""


def read_variables(variables: Mapping[Path, str]) -> list[list[Any]]:
    """Read a variable of each file; of a single entry, of which MATLAB makes no list, a list of it.

    Args:
        variables: name of the variable by file.

    Returns:
        Of each, in order: cells and struct arrays as lists, structs as dicts.

    Raises:
        InputError: the first file that cannot be read or has no such variable.
    """
    outcome = _run([part for file, name in variables.items() for part in (str(file), name)])
    if isinstance(outcome, str):
        if len(variables) > 1:
            # Which one it was is not known; alone, each speaks for itself.
            return [read_variables({file: name})[0] for file, name in variables.items()]
        raise InputError(f"{next(iter(variables))}: cannot be read as a .mat file ({outcome})")
    for (file, name), value in zip(variables.items(), outcome, strict=True):
        if value is None:
            raise InputError(f"{file}: has no variable {name!r}")
    return [value if isinstance(value, list) else [value] for value in outcome]


def _run(arguments: list[str]) -> list[Any] | str:
    """What the reader answers, or why it does not."""
    command = [sys.executable, "-c", READER, *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        return f"takes more than {LONGEST_SECONDS} seconds"
    if answer.returncode < 0:
        return f"its reader was ended by signal {-answer.returncode}"
    if answer.returncode > 0:
        *_, last = ["", *answer.stderr.strip().splitlines()]
        # The last line of a traceback, without the exception's name.
        return re.sub(r"^[\w.]+: ", "", last) or f"its reader ended with {answer.returncode}"
    return json.loads(answer.stdout)
