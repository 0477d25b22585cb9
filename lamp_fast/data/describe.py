"""What training would see of a data set, gathered for people and for machines."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tabulate import tabulate

from lamp_fast.data.benchmark import Benchmark
from lamp_fast.data.entries import SPLIT_PARTS
from lamp_fast.data.names import OddName, odd_names
from lamp_fast.data.pictures import inspect_pictures, unreadable_message
from lamp_fast.data.protocol import head_classes, realised_imbalance
from lamp_fast.data.sources import DataSource
from lamp_fast.errors import printable

BAR_WIDTH = 30
# In a text: this many classes, the largest and the smallest, and this many lines of each problem.
MAX_CLASSES_SHOWN = 40
MAX_LINES = 5


@dataclass(frozen=True)
class ClassSummary:
    """One class: readable pictures of each part, and how many of train the protocol draws.

    ``group`` is "head", "tail", "new" (not trained), or None where all classes are equally large.
    """

    name: str
    training: int
    train: int
    val: int
    test: int
    group: str | None


@dataclass(frozen=True)
class Copies:
    """Files of the same bytes, each as (part, class name, file)."""

    files: tuple[tuple[str, str, str], ...]

    @property
    def leak(self) -> bool:
        """Whether a picture is both learned from and tested on."""
        return {"train", "test"} <= {part for part, _, _ in self.files}

    @property
    def conflict(self) -> bool:
        """Whether one picture is given two classes."""
        return len({name for _, name, _ in self.files}) > 1


@dataclass(frozen=True)
class Description:
    """What training would see.

    Attributes:
        data: name of the data set.
        template: class prompt.
        split: "all" or "base-new".
        imb, cap, shots: of the protocol; see :class:`lamp_fast.data.benchmark.Benchmark`.
        drawn: parts that were drawn from train, because the data set has none.
        notes: how the pictures were found, and what was left out on the way, a line each.
        classes: in label order, base before new.
        imbalance: the largest trained class over the smallest; None where one has no picture.
        unreadable: a line for each picture that cannot be read.
        copies: files of the same bytes, leaks first, then conflicts.
        odd_names: see :func:`lamp_fast.data.names.odd_names`.
    """

    data: str
    template: str
    split: str
    imb: float
    cap: int | None
    shots: int | None
    drawn: tuple[str, ...]
    notes: tuple[str, ...]
    classes: tuple[ClassSummary, ...]
    imbalance: float | None
    unreadable: tuple[str, ...]
    copies: tuple[Copies, ...]
    odd_names: tuple[OddName, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, everything included."""
        values = asdict(self)
        for copies, value in zip(self.copies, values["copies"], strict=True):
            value |= {"leak": copies.leak, "conflict": copies.conflict}
        return values

    @property
    def trained(self) -> list[ClassSummary]:
        """The classes that are trained."""
        return [each for each in self.classes if each.group != "new"]


def describe(source: DataSource, benchmark: Benchmark, *, progress: bool = True) -> Description:
    """Read every picture of a data set once and gather what there is to know.

    Args:
        source: the data set.
        benchmark: the protocol applied to it.
        progress: show bars on a terminal.
    """
    names = source.classnames
    unreadable: list[str] = []
    bad: set[str] = set()
    seen: dict[bytes, list[tuple[str, str, str]]] = {}
    for part in SPLIT_PARTS:
        pictures = getattr(source, part)
        outcomes = inspect_pictures(pictures, progress=progress)
        for index, outcome in enumerate(outcomes):
            file = pictures.names[index]
            if isinstance(outcome, bytes):
                seen.setdefault(outcome, []).append((part, names[pictures.labels[index]], file))
            else:
                bad.add(file)
                unreadable.append(unreadable_message(pictures.name(index), outcome))
    copies = [Copies(tuple(files)) for files in seen.values() if len(files) > 1]

    def counts(pictures: Any) -> np.ndarray:
        """Readable pictures of each class, int64 [C]."""
        labels = [
            label
            for name, label in zip(pictures.names, pictures.labels.tolist(), strict=True)
            if name not in bad
        ]
        return np.bincount(np.array(labels, dtype=np.int64), minlength=len(names))

    base = len(benchmark.base_names)
    training = counts(benchmark.train)  # base labels are those of the source
    parts = {part: counts(getattr(source, part)) for part in SPLIT_PARTS}
    head = head_classes(training[:base])
    groups = [None if head is None else "head" if head[label] else "tail" for label in range(base)]
    classes = tuple(
        ClassSummary(
            name=name,
            training=int(training[label]),
            **{part: int(parts[part][label]) for part in SPLIT_PARTS},
            group=groups[label] if label < base else "new",
        )
        for label, name in enumerate(names)
    )
    return Description(
        data=source.name,
        template=source.template,
        split="base-new" if benchmark.new_names else "all",
        imb=benchmark.imb,
        cap=benchmark.cap,
        shots=benchmark.shots,
        drawn=source.drawn,
        notes=source.notes,
        classes=classes,
        imbalance=realised_imbalance(training[:base]) if training[:base].all() else None,
        unreadable=tuple(unreadable),
        copies=tuple(sorted(copies, key=lambda each: (not each.leak, not each.conflict))),
        odd_names=tuple(odd_names(names, source.template)),
    )


def to_text(description: Description) -> str:
    """A summary to read in a terminal: facts, a bar a class, and what looks wrong."""
    blocks = [_facts(description), _chart(description), _problems(description)]
    return "\n\n".join("\n".join(block) for block in blocks)


def _facts(description: Description) -> list[str]:
    classes, trained = description.classes, description.trained
    new = len(classes) - len(trained)
    halves = f" ({len(trained)} base, {new} new)" if new else ""
    totals = ", ".join(
        f"{sum(getattr(each, part) for each in classes):,} {part}" for part in SPLIT_PARTS
    )
    drawn = ""
    if description.drawn:
        drawn = f" ({' and '.join(description.drawn)} drawn here, alike in every run)"
    most = f"cap {'none' if description.cap is None else description.cap}"
    if description.shots is not None:
        most = f"{description.shots} shots"
    counts = [each.training for each in trained]
    imbalance = "none" if description.imbalance is None else f"{description.imbalance:.4g}"
    lines = [
        f"data       {description.data}: {len(classes)} classes{halves},"
        f' "{printable(description.template)}"',
        f"pictures   {totals}{drawn}",
        f"training   {sum(counts):,} pictures (split {description.split}, {most},"
        f" imb {description.imb:g}): {max(counts)} to {min(counts)} a class,"
        f" imbalance ratio {imbalance}",
    ]
    groups = {
        group: [each.training for each in trained if each.group == group]
        for group in ("head", "tail")
    }
    if groups["head"]:
        sizes = (
            f"{len(sizes)} {group} class{'es' if len(sizes) > 1 else ''}"
            f" of {max(sizes)}{f' to {min(sizes)}' if min(sizes) < max(sizes) else ''}"
            for group, sizes in groups.items()
        )
        lines.append(f"head/tail  {', '.join(sizes)} pictures")
    else:
        lines.append("head/tail  n/a: every class is as large")
    return [*lines, *(f"note       {printable(each)}" for each in description.notes)]


def _chart(description: Description) -> list[str]:
    """A row a class, the largest first; of many classes the two ends."""
    ranked = sorted(description.trained, key=lambda each: -each.training)
    ranked += [each for each in description.classes if each.group == "new"]
    most = max(each.training for each in ranked)
    drawn = any(each.training != each.train for each in description.trained)
    header = ["class", "training", *(["of"] if drawn else []), "val", "test", "", ""]
    rows = []
    for each in ranked:
        new = each.group == "new"
        available = [each.train] if drawn else []
        rows.append(
            [
                printable(each.name),
                "-" if new else each.training,
                *available,
                each.val,
                each.test,
                each.group or "",
                "" if new else _bar(each.training / max(most, 1)),
            ]
        )
    alignment = ["left", *["right"] * (len(header) - 3), "left", "left"]
    lines = tabulate(
        rows, header, tablefmt="plain", colalign=alignment, disable_numparse=True
    ).splitlines()
    if len(rows) > MAX_CLASSES_SHOWN:
        half = MAX_CLASSES_SHOWN // 2
        left_out = f"... {len(rows) - 2 * half} more, --json has them all"
        lines = [*lines[: 1 + half], left_out, *lines[-half:]]
    return [line.rstrip() for line in lines]


def _bar(share: float) -> str:
    """A bar of a share in 0..1, to an eighth of a character; nothing but 0 is invisible."""
    eighths = max(round(share * BAR_WIDTH * 8), share > 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _problems(description: Description) -> list[str]:
    lines = []
    if description.unreadable:
        lines += _listed(
            f"{_number(description.unreadable, 'picture')} cannot be read: training stops at the"
            " first, --skip-unreadable goes on without them",
            description.unreadable,
        )
    empty = [each.name for each in description.trained if not each.training]
    if empty:
        lines += _listed(
            f"{_number(empty, 'class', 'classes')} left without a readable training picture:"
            " training refuses that",
            empty,
        )
    kinds = (
        ("in train and test, a leak", lambda each: each.leak),
        ("under two class names", lambda each: each.conflict and not each.leak),
        ("more than once", lambda each: not (each.conflict or each.leak)),
    )
    for where, belongs in kinds:
        chosen = [each for each in description.copies if belongs(each)]
        if chosen:
            lines += _listed(
                f"{_number(chosen, 'picture')} {where} (same bytes)", map(_copies, chosen)
            )
    if description.odd_names:
        names = {each.name for each in description.odd_names}
        lines += _listed(
            f"{_number(names, 'class name')} that CLIP's tokenizer splits oddly",
            (f"{each.name!r}: {each.reason}" for each in description.odd_names),
        )
    return lines or ["no unreadable picture, no duplicate, no class name that is split oddly"]


def _copies(copies: Copies) -> str:
    files = [
        f"{part} {file!r}" + (f" ({name})" if copies.conflict else "")
        for part, name, file in copies.files
    ]
    more = [f"{len(files) - MAX_LINES} more"] if len(files) > MAX_LINES else []
    return " = ".join([*files[:MAX_LINES], *more])


def _number(things: Sequence[Any] | set[Any], one: str, many: str | None = None) -> str:
    return f"{len(things):,} {one if len(things) == 1 else many or f'{one}s'}"


def _listed(title: str, entries: Any) -> list[str]:
    """A title and the first entries below it."""
    entries = [f"  {printable(each)}" for each in entries]
    left_out = len(entries) - MAX_LINES
    more = [f"  ... {left_out:,} more, --json has them all"] if left_out > 0 else []
    return [title, *entries[:MAX_LINES], *more]
