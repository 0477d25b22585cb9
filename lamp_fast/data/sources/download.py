"""Fetch data sets of the catalog through torchvision, into the layout that they are read from."""

import json
import os
import tempfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from lamp_fast.data import catalog
from lamp_fast.data.catalog import CATALOG
from lamp_fast.errors import InputError


def check_downloads(names: Sequence[str], root: Path) -> list[str]:
    """The catalog's names of data sets that can be fetched into ``root``.

    Raises:
        InputError: an unknown data set, one that torchvision cannot fetch, or pieces of one that
            are there already.
    """
    found = []
    for name in names:
        known = catalog.find(name)
        if known is None:
            raise InputError(f"--download {name}: expected one of {', '.join(_fetchable())}")
        entry = CATALOG[known]
        if entry.download is None:
            raise InputError(
                f"--download {known}: torchvision cannot fetch it; get it from {entry.home} into"
                f" {root / entry.folder}/ (--check {root} says which files)"
            )
        for piece in entry.download.pieces.values():
            if os.path.lexists(root / entry.folder / piece):
                raise InputError(f"--download {known}: {root / entry.folder / piece} is there")
        found.append(known)
    return found


def download(name: str, root: Path) -> list[str]:
    """Fetch one data set; its pieces appear in place complete, or not at all.

    Args:
        name: of the catalog, one that :func:`check_downloads` let pass.
        root: the folder for the data sets' folders; made where it does not exist.

    Returns:
        What is to be known of it, a line each: files that torchvision does not bring.

    Raises:
        InputError: the network, the server or the archive fails.
    """
    # Here, because it takes long to import and worker processes import this package too.
    from torchvision import datasets

    entry = CATALOG[name]
    recipe = entry.download
    root.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that moving takes no second copy.
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch:
        kind = getattr(datasets, recipe.dataset)
        try:
            kind(scratch, download=True)
        except (URLError, HTTPException, ConnectionError, TimeoutError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"--download {name}: could not be fetched ({reason}); with a network try again, or"
                f" get it from {entry.home} into {root / entry.folder}/"
            ) from None
        folder = root / entry.folder
        for piece in recipe.pieces:
            if not Path(scratch, piece).exists():
                raise InputError(f"--download {name}: torchvision brought no {piece}")
        folder.mkdir(exist_ok=True)
        for piece, place in recipe.pieces.items():
            os.rename(Path(scratch, piece), folder / place)
        # Older versions of torchvision know no names; --check then says what is missing.
        if recipe.names and hasattr(kind, "classes") and not (folder / entry.class_list).exists():
            names = {str(number): each for number, each in enumerate(kind.classes, 1)}
            (folder / entry.class_list).write_text(json.dumps(names, indent=4), encoding="utf-8")
    split = entry.split_file and f"{entry.split_file}, the published split"
    return [f"without {each}" for each in (recipe.without, split) if each]


def _fetchable() -> list[str]:
    return [name for name, entry in CATALOG.items() if entry.download is not None]
