"""Files that are whole or not there: every write is atomic, and nothing here unpickles.

Tensors are kept as safetensors, the rest as JSON or CSV. A file is either the old one or the new
one, whenever the process dies.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lamp_fast.errors import InputError


def write_bytes(file: Path, content: bytes) -> None:
    """Replace ``file`` as a whole: written beside it, synced, then renamed over it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except OSError as error:
        # A full disk does not say which file, and the partial one is not what the user asked for.
        error.filename, error.filename2 = str(file), None
        raise
    finally:
        partial.unlink(missing_ok=True)


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
        InputError: naming a file that is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: expected a file of a run ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{file}: damaged ({error})") from None


def save_tensors(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write named tensors with JSON facts in the header of one safetensors file."""
    held = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    write_bytes(file, to_safetensors(held, metadata={"facts": json.dumps(facts)}))


def load_tensors(file: Path) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`save_tensors` wrote.

    Raises:
        InputError: naming a file that is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as archive:
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            facts = json.loads((archive.metadata() or {}).get("facts", "{}"))
    except FileNotFoundError:
        raise InputError(f"{file}: expected a file of a run (No such file)") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file}: damaged ({' '.join(str(error).split())})") from None
    return tensors, facts
