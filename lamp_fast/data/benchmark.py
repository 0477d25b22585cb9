"""The protocol applied to a data set: what a run trains on, adapts on and is tested on."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from lamp_fast.data import protocol
from lamp_fast.data.decoded import DecodedCache
from lamp_fast.data.hierarchy import Hierarchy
from lamp_fast.data.pictures import Pictures, check_pictures
from lamp_fast.data.shipped_names import shipped_note
from lamp_fast.data.sources import DataSource
from lamp_fast.data.sources.layouts import SPLIT_SEED
from lamp_fast.data.sources.own_parts import VAL_SHARE
from lamp_fast.data.words import Words
from lamp_fast.errors import InputError

# Of every class, few-shot: more to choose on than to train on would not be few.
MAX_VAL_SHOTS = 4
# Validation pictures that are scored after every epoch, for each training picture: scoring one is
# a third of training on it, so this is a sixth of the time.
SCORED_SHARE = 0.5

Validated = Literal["none", "some", "all"]

BENCHMARK_PARTS = ("train", "adapt", "test_base", "test_new")
VALIDATION_PARTS = ("val", "val_new")


@dataclass(frozen=True)
class Origin:
    """What a list of class names is of, for methods that prompt or score some data differently.

    Attributes:
        data: the data set, by its name; None where the template is not its own but the user's.
        target: whether what was trained on other data is only tested on it.
        words: several texts a class, which the template is one of; None where it is the one.
    """

    data: str | None = None
    target: bool = False
    words: Words | None = None


# Of names that somebody just asks for.
NOWHERE = Origin()


def _no_pictures() -> Pictures:
    return Pictures((), np.empty(0), root=Path())


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Everything that one run sees of a data set.

    Attributes:
        name: of the data set.
        base_names, new_names: class names of the halves; ``new_names`` is empty where every class
            is trained.
        template: class prompt with {} for the name.
        own_template: whether that is the data set's own, and not the user's.
        words: several texts a class, which the template is one of; None where it is the one.
        hierarchy: what classes are kinds of, where that is known.
        train: base training pictures, labels 0..C_base-1.
        adapt: training pictures of the new classes for the transductive bias, which must not look
            at their labels (0..C_new-1).
        test_base, test_new: all test pictures of each half, labels from 0 in each.
        imb: the imbalance ratio asked for.
        cap, shots: most pictures a class; None where there was no such draw.
        augment: whether random crops and flips leave the classes what they are.
        trained: False where a run is only tested on the data: ``base_names`` are all its classes,
            and there is no training picture.
        notes: what a reader of a result must know of how the pictures were found, a line each.
        val: base validation pictures, labels as in ``train``, to choose settings on; none where
            nothing is chosen.
        benchmark_counts: training pictures of each base class that a published benchmark makes its
            groups of, where these are not the run's own counts.
        held_out: how many of ``new_names``, the first ones, are of the data set's base half and
            stand in for new ones in choosing an epoch.
        val_new: validation pictures of those, labels 0..held_out-1.
    """

    name: str
    base_names: tuple[str, ...]
    new_names: tuple[str, ...]
    template: str
    train: Pictures
    adapt: Pictures
    test_base: Pictures
    test_new: Pictures
    imb: float
    cap: int | None
    shots: int | None
    augment: bool
    trained: bool = True
    own_template: bool = True
    words: Words | None = None
    hierarchy: Hierarchy | None = None
    notes: tuple[str, ...] = ()
    val: Pictures = field(default_factory=_no_pictures)
    benchmark_counts: tuple[int, ...] | None = None
    held_out: int = 0
    val_new: Pictures = field(default_factory=_no_pictures)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that hold pictures of the run."""
        return (*BENCHMARK_PARTS, *(part for part in VALIDATION_PARTS if len(getattr(self, part))))

    @property
    def stand_ins(self) -> tuple[str, ...]:
        """Names of the base classes that are held out."""
        return self.new_names[: self.held_out]

    @property
    def origin(self) -> Origin:
        """What the class names are of."""
        own = self.name if self.own_template else None
        return Origin(own, target=not self.trained, words=self.words)

    @property
    def prompt(self) -> str:
        """What classes are called, to be read."""
        return f'"{self.template}"' if self.words is None else str(self.words)

    @property
    def counts(self) -> np.ndarray:
        """Training pictures of each base class, int64 [C_base]."""
        return np.bincount(self.train.labels, minlength=len(self.base_names))

    @property
    def head(self) -> np.ndarray | None:
        """bool [C_base], see :func:`lamp_fast.data.protocol.head_classes`."""
        return protocol.head_classes(self.counts)

    @property
    def group_counts(self) -> np.ndarray:
        """Training pictures that decide the size group of each base class, int64 [C_base]."""
        given = self.benchmark_counts
        return self.counts if given is None else np.asarray(given, dtype=np.int64)

    @property
    def size_groups(self) -> np.ndarray | None:
        """str [C_base], see :func:`lamp_fast.data.protocol.size_groups`."""
        return protocol.size_groups(self.group_counts)

    def describe(self) -> list[str]:
        """What a reader of a result must know of the data, a line each."""
        if not self.trained:
            return [
                f"{self.name}: {len(self.base_names)} classes, {self.prompt}, tested only",
                f"{len(self.test_base):,} test pictures",
                *self.notes,
            ]
        base, new, counts = len(self.base_names), len(self.new_names), self.counts
        halves = f" ({base} base, {new} new)" if new else ""
        drawn = f"cap {'none' if self.cap is None else self.cap}"
        if self.shots is not None:
            drawn = f"{self.shots} shots"
        adapt = f"; {len(self.adapt):,} new-class training pictures" if new else ""
        validated = len(self.val) + len(self.val_new)
        adapt += f"; {validated:,} to choose settings on" if validated else ""
        tests = f"{len(self.test_base):,} base, {len(self.test_new):,} new"
        return [
            f"{self.name}: {base + new} classes{halves}, {self.prompt}",
            f"{len(self.train):,} training pictures ({drawn}, imb {self.imb:g}): {counts.max()} to"
            f" {counts.min()} a class, realised imbalance"
            f" {protocol.realised_imbalance(counts):.4g}{adapt}",
            f"{tests if new else f'{len(self.test_base):,}'} test pictures",
            *(() if new else self._describe_groups()),
            *self._describe_validation(),
            *self.notes,
        ]

    def _describe_validation(self) -> list[str]:
        lines = []
        if self.held_out:
            lines.append(
                f"{self.held_out} classes of the base half are held out: not trained, counted as"
                f" new, and chosen on in their place, the first {self.new_names[0]!r}"
            )
        for names, pictures in ((self.base_names, self.val), (self.stand_ins, self.val_new)):
            without = sorted(set(range(len(names))) - set(pictures.labels.tolist()))
            if len(pictures) and without:
                lines.append(
                    f"{len(without)} of {len(names)} classes have no validation picture and no part"
                    f" in what is chosen on them, the first {names[without[0]]!r}"
                )
        return lines

    def _describe_groups(self) -> tuple[str, ...]:
        groups = self.size_groups
        if groups is None:
            return ()
        sizes = ", ".join(
            f"{np.count_nonzero(groups == group)} {title}"
            for group, title in protocol.SIZE_GROUP_TITLES.items()
        )
        whose = "" if self.benchmark_counts is None else ", counted by the benchmark and not here"
        return (f"classes by training pictures{whose}: {sizes}",)


def build_benchmark(
    source: DataSource,
    *,
    split: Literal["base-new", "all"] = "base-new",
    imb: float,
    cap: int | None,
    shots: int | None,
    seed: int,
    validation: Validated = "none",
    holdout: float | None = None,
) -> Benchmark:
    """Apply the protocol: few-shot or cap over all classes, then base/new, then the long tail.

    Args:
        source: the data set.
        split: "base-new" trains the first half of the classes; "all" trains every class, and the
            new half is empty.
        imb: imbalance ratio of the base training set, at least 1; 1 leaves it as it is. Of a data
            set that draws its own long tail, the one that it was drawn with.
        cap: most pictures a class, drawn before the long tail; None takes the classes as they are.
        shots: few-shot, in place of ``cap``.
        seed: of every draw.
        validation: also take the validation pictures of the trained classes: at most four a class
            with ``shots``, as CoOp does, else "all", or "some": at most half as many as are trained
            on, every class as many as the others where it has them, but at least four. Where the
            data set has none that are no test pictures as well, a fifth of every class is taken out
            of its training pictures before anything is drawn from them.
        holdout: this share of the base classes is not trained and counts among the new ones, in
            front of them. The others keep the training pictures that they would have without.

    Raises:
        InputError: ``imb``, ``cap`` or ``shots`` below 1, an unknown ``split``, a half of a single
            class or without test pictures, too few classes to hold some out, a data set that has no
            training pictures, or one with a long tail of its own that is halved or asked for
            another ``imb``.
    """
    if source.test_only:
        raise InputError(
            f"--data {source.name}: has no training pictures; train on another data set, then"
            f" python -m lamp_fast.evaluate RUN --data {source.name}"
        )
    if split not in ("base-new", "all"):
        raise InputError(f"--split {split}: expected base-new or all")
    if source.imb is not None and split == "base-new":
        raise InputError(
            f"--split base-new: the long tail of {source.name} follows the order of its classes, so"
            " that the new half would be the tail; expected all"
        )
    if source.imb is not None and imb != source.imb:
        raise InputError(
            f"--imb {imb:g}: the pictures of {source.name} were drawn with {source.imb:g}, expected"
            " the same"
        )
    if cap is not None and cap < 1:
        raise InputError(f"--cap {cap}: expected at least 1, or none")
    most = cap if shots is None else shots
    train, val, notes = source.train, source.val, _notes(source)
    validated = validation != "none"
    if validated:
        val = _without(val, source.test)
    if validated and not len(val):
        kept, drawn = protocol.stratified_split(train.labels, (VAL_SHARE,), SPLIT_SEED)
        train, val = train.select(kept), train.select(drawn)
        notes = (*notes, _about_drawn(val))
    if shots is not None:
        val = val.select(protocol.few_shot(val.labels, min(shots, MAX_VAL_SHOTS), seed))
    if most is not None:
        train = train.select(protocol.few_shot(train.labels, most, seed))
    base, new = np.arange(len(source.classnames)), np.empty(0, dtype=np.int64)
    if split == "base-new":
        base, new = protocol.base_new(base)
        if len(new) < 2:
            # Among one class every answer is right.
            raise InputError(
                f"--split base-new: {len(base) + len(new)} classes give a new half of {len(new)},"
                " expected at least 4, or --split all"
            )
    base_train = _half(train, base)
    if source.imb is None:
        base_train = base_train.select(protocol.long_tail(base_train.labels, imb, seed))
    stand_ins = np.empty(0, dtype=np.int64)
    if holdout is not None:
        kept, drawn = protocol.hold_out(len(base), holdout, seed)
        base_train = _half(base_train, kept)
        base, stand_ins = base[kept], base[drawn]
        new = np.concatenate([stand_ins, new])
    val_base, val_new = (
        _half(val, classes) if validated else val.select([]) for classes in (base, stand_ins)
    )
    if validation == "some" and shots is None:
        room, held = round(SCORED_SHARE * len(base_train)), len(val_base) + len(val_new)
        val_base, val_new = (_bounded(part, room, seed) for part in (val_base, val_new))
        if (left := len(val_base) + len(val_new)) < held:
            notes = (*notes, f"of {held:,} validation pictures {left:,} are scored")
    benchmark = Benchmark(
        name=source.name,
        base_names=tuple(source.classnames[label] for label in base),
        new_names=tuple(source.classnames[label] for label in new),
        template=source.template,
        train=base_train,
        adapt=_half(train, new),
        test_base=_half(source.test, base),
        test_new=_half(source.test, new),
        imb=imb,
        cap=None if shots is not None else cap,
        shots=shots,
        augment=source.augment,
        own_template=source.own_template,
        words=source.words,
        hierarchy=source.hierarchy,
        notes=notes,
        benchmark_counts=source.group_counts,
        val=val_base,
        held_out=len(stand_ins),
        val_new=val_new,
    )
    _check_complete(benchmark)
    return benchmark


def transfer_benchmark(source: DataSource) -> Benchmark:
    """All test pictures over all classes, to test what was trained on another data set.

    The protocol of cross-dataset evaluation and domain generalisation: nothing is drawn.

    Raises:
        InputError: a data set without test pictures.
    """
    nothing = source.test.select([])
    benchmark = Benchmark(
        name=source.name,
        base_names=source.classnames,
        new_names=(),
        template=source.template,
        train=nothing,
        adapt=nothing,
        test_base=source.test,
        test_new=nothing,
        imb=1.0,
        cap=None,
        shots=None,
        augment=source.augment,
        trained=False,
        own_template=source.own_template,
        words=source.words,
        hierarchy=source.hierarchy,
        notes=_notes(source),
    )
    _check_complete(benchmark)
    return benchmark


def check_benchmark(
    benchmark: Benchmark, *, skip_unreadable: bool = False, progress: bool = True
) -> tuple[Benchmark, tuple[str, ...], str]:
    """Read every picture of a run once, see :func:`lamp_fast.data.pictures.check_pictures`.

    Returns:
        The benchmark over the readable pictures; the names of the unreadable ones; the sha256, in
        hex, over name, label and bytes of every picture.

    Raises:
        InputError: an unreadable picture without ``skip_unreadable``, or too few left with it.
    """
    checked, unreadable, digest = {}, [], hashlib.sha256()
    for part in benchmark.parts:
        checked[part], without, part_hash = check_pictures(
            getattr(benchmark, part), skip_unreadable=skip_unreadable, progress=progress
        )
        unreadable.extend(without)
        digest.update(f"{part} {part_hash} ".encode())
    benchmark = replace(benchmark, **checked)
    _check_complete(benchmark)
    return benchmark, tuple(unreadable), digest.hexdigest()


def decode_through(
    benchmark: Benchmark, cache: DecodedCache | None, downscale: int | None
) -> Benchmark:
    """The same pictures, decoded through a cache and scaled down; see :class:`Pictures`."""
    parts = {
        part: replace(getattr(benchmark, part), cache=cache, downscale=downscale)
        for part in benchmark.parts
    }
    return replace(benchmark, **parts)


def _without(pictures: Pictures, others: Pictures) -> Pictures:
    """Those that are not among the others as well: ImageNet's val pictures are its test set."""
    taken = set(others.names) if pictures.root == others.root else set()
    return pictures.select([at for at, name in enumerate(pictures.names) if name not in taken])


def _about_drawn(val: Pictures) -> str:
    if not len(val):
        return "no class has three training pictures, of which one could be a validation picture"
    return "val drawn here from train, alike in every run: settings are chosen on it"


def _bounded(pictures: Pictures, most: int, seed: int) -> Pictures:
    """As many pictures of every class as there is room for, see :func:`protocol.bounded_shots`."""
    shots = protocol.bounded_shots(pictures.labels, most, MAX_VAL_SHOTS)
    if shots is None:
        return pictures
    return pictures.select(protocol.few_shot(pictures.labels, shots, seed))


def _notes(source: DataSource) -> tuple[str, ...]:
    drawn = ()
    if source.drawn:
        drawn = (f"{' and '.join(source.drawn)} drawn here from train, alike in every run",)
    return (*drawn, *source.notes, *shipped_note(source.classnames))


def _half(pictures: Pictures, classes: np.ndarray) -> Pictures:
    """The pictures of some classes, relabelled from 0 in the order of ``classes``."""
    chosen = pictures.select(np.flatnonzero(np.isin(pictures.labels, classes)))
    return chosen.relabel({label: position for position, label in enumerate(classes.tolist())})


def _check_complete(benchmark: Benchmark) -> None:
    """Something to train on in every class, something to test on in every half."""
    where = f"--data {benchmark.name}"
    counts = benchmark.counts
    if benchmark.trained and (counts == 0).any():
        name = benchmark.base_names[int(np.argmin(counts))]
        raise InputError(f"{where}: class {name!r} has no readable training picture")
    for half, names in (("base", benchmark.base_names), ("new", benchmark.new_names)):
        if names and not len(getattr(benchmark, f"test_{half}")):
            which = f" of the {half} classes" if benchmark.new_names else ""
            raise InputError(f"{where}: no test picture{which}, expected at least 1")
