"""Of a user's own pictures: their parts where data have none, and what classes are called."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from lamp_fast.cli import expand_path
from lamp_fast.data.entries import SPLIT_PARTS
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.protocol import stratified_split
from lamp_fast.data.sources.files import CLASS_NAMES_FILE, read_json
from lamp_fast.data.sources.layouts import SPLIT_SEED
from lamp_fast.data.sources.table import number_of
from lamp_fast.errors import InputError

VAL_SHARE, TEST_SHARE = 0.2, 0.3
# In place of a part: pictures that are in none.
WHOLE = "whole"


def settle_parts(
    found: dict[str, Pictures], only_test: bool
) -> tuple[dict[str, Pictures], tuple[str, ...], tuple[str, ...]]:
    """Train, val and test of the parts that there are, under :data:`WHOLE` what is in no part.

    Returns:
        The pictures of each part, the parts that were drawn, and notes.
    """
    whole = found.get(WHOLE, found.get("train"))
    nothing = next(iter(found.values())).select([])
    parts = dict.fromkeys(SPLIT_PARTS, nothing) | {
        part: found[part] for part in SPLIT_PARTS if part in found
    }
    if "test" in found:
        return parts, (), ()
    if "val" in found:
        # Whoever keeps pictures apart means them to be tested on, as in ImageNet.
        parts |= {"val": nothing, "test": found["val"]}
        return parts, (), ("the val pictures are the test set, for there is no test part",)
    if only_test:
        parts |= {"train": nothing, "test": whole}
        return parts, (), ("all pictures are the test set, for there is no test part",)
    shares = {"test": TEST_SHARE, "val": VAL_SHARE}
    train, *others = stratified_split(whole.labels, list(shares.values()), SPLIT_SEED)
    taken = {part: whole.select(indices) for part, indices in zip(shares, others, strict=True)}
    return {"train": whole.select(train), **taken}, ("val", "test"), ()


def numbers_in_order(label: str) -> tuple[bool, int, str]:
    """A sort key that has "10" after "9", and numbers before names."""
    number = number_of(label)
    return (number is None, number or 0, label)


def names_of(
    root: Path, classes: list[str], own: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, ...]:
    """Class names: of classes.json where it names the folder or label, else the data's ``own``.

    Where it has none, the folders or labels themselves.
    """
    file = root / CLASS_NAMES_FILE
    given = read_json(file) if file.exists() else {}
    if not isinstance(given, dict) or not all(
        isinstance(name, str) and name.strip() for name in given.values()
    ):
        raise InputError(f"{file}: expected an object of folder: class name")
    unknown = sorted(given.keys() - set(classes))
    if unknown:
        raise InputError(f"{file}: names {unknown[0]!r}, which is no class of the data")
    return tuple(given.get(name, own.get(name, name.replace("_", " "))) for name in classes)


def checked_root(name: str, root: str | Path | None, holds: str) -> Path:
    if root is None:
        raise InputError(f"--root: missing; --data {name} needs the folder that holds {holds}")
    root = expand_path(root)
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise InputError(f"--root {root}: {found}, expected the folder that holds {holds}")
    try:
        empty = next(root.iterdir(), None) is None
    except OSError as error:
        raise InputError(f"--root {root}: cannot be read ({error.strerror})") from None
    if empty:
        raise InputError(f"--root {root}: is empty, expected the folder that holds {holds}")
    return root
