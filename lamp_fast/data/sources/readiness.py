"""Which data sets of the catalog lie ready below a root, and what the others lack."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lamp_fast.data.catalog import CATALOG
from lamp_fast.data.sources import layouts, load_source
from lamp_fast.errors import InputError


@dataclass(frozen=True)
class Readiness:
    """The state of one data set.

    Attributes:
        name: as for ``--data``.
        ready: whether training, or for a test-only data set evaluation, can read it.
        missing: what it lacks, each a path below the root; of a file that is there but wrong, the
            error in one line.
        classes: how many, 0 where it is not ready.
        counts: pictures of train, val and test.
        notes: what keeps its results, or will keep them, from being comparable with published ones.
        home: its official page.
        licence: what is known of its terms.
    """

    name: str
    ready: bool
    missing: tuple[str, ...]
    classes: int
    counts: tuple[int, int, int]
    notes: tuple[str, ...]
    home: str
    licence: str


def check_root(root: Path, names: Iterable[str] = tuple(CATALOG)) -> list[Readiness]:
    """List the files of every data set as training would; no picture is read.

    Args:
        root: the folder that holds the data sets' folders.
        names: of the catalog.

    Raises:
        InputError: a root that is no folder.
    """
    if not root.is_dir():
        raise InputError(f"--check {root}: expected the folder of the data sets")
    return [_state(name, root) for name in names]


def to_text(states: Sequence[Readiness]) -> str:
    """A block a data set: its state, what is missing, its official address."""
    width = max(len(each.name) for each in states)
    lines = []
    for each in states:
        facts = [f"lacks {path}" for path in each.missing]
        if each.ready:
            train, val, test = each.counts
            parts = f"{test:,} test" if train == 0 else f"{train:,} + {val:,} + {test:,}"
            facts = [f"{each.classes:,} classes, {parts} pictures"]
        facts += [*each.notes, f"{each.home} (licence: {each.licence})"]
        for number, fact in enumerate(facts):
            state = "ready" if each.ready else "missing"
            head = (each.name, state) if number == 0 else ("", "")
            lines.append(f"{head[0]:{width}}  {head[1]:7}  {fact}")
    ready = sum(each.ready for each in states)
    return "\n".join([*lines, "", f"{ready} of {len(states)} data sets are ready"])


def _state(name: str, root: Path) -> Readiness:
    entry = CATALOG[name]
    missing, notes = layouts.missing(entry, root), []
    classes, counts = 0, (0, 0, 0)
    if missing:
        split = entry.split_file
        if split and not (root / entry.folder / split).is_file() and split not in str(missing):
            notes = [f"{split} is missing too, without which val and test are drawn here"]
    else:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                source = load_source(name, root)
        except InputError as error:
            missing = [str(error)]
        else:
            notes = [str(each.message).removeprefix(f"--data {name}: ") for each in caught]
            classes = len(source.classnames)
            counts = (len(source.train), len(source.val), len(source.test))
    return Readiness(
        name=name,
        ready=not missing,
        missing=tuple(missing),
        classes=classes,
        counts=counts,
        notes=tuple(notes),
        home=entry.home,
        licence=entry.licence,
    )
