"""Settings become objects: device, CLIP, pictures and method of one run.

Training, evaluation and prediction assemble the same way, so a saved config is all they need.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lamp_fast
from lamp_fast import ops
from lamp_fast.answers.asked import COVERAGE
from lamp_fast.clip.features import FeatureReader
from lamp_fast.clip.prompts import check_distinct, tokenise
from lamp_fast.clip.settings import caution
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data import catalog
from lamp_fast.data.benchmark import (
    Benchmark,
    Validated,
    build_benchmark,
    check_benchmark,
    decode_through,
    transfer_benchmark,
)
from lamp_fast.data.decoded import DecodedCache
from lamp_fast.data.disk_cache import default_folder
from lamp_fast.data.loading import Batch, Transform, move_batches
from lamp_fast.data.settings import DataConfig, ViewConfig
from lamp_fast.data.sources import DataSource, load_source
from lamp_fast.data.sources.excluded import leave_out, without_excluded
from lamp_fast.data.sources.hierarchy import read_levels
from lamp_fast.data.sources.lists import PictureLists
from lamp_fast.data.sources.table import PictureTable
from lamp_fast.data.sources.words import with_words
from lamp_fast.data.transforms import CentreCrop, Views
from lamp_fast.data.views import centre_view, testing_views, training_views
from lamp_fast.data.words import Words
from lamp_fast.errors import InputError
from lamp_fast.fields import to_json, validate
from lamp_fast.methods import METHODS
from lamp_fast.methods.base import Method
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.methods.training_set import TrainingSet
from lamp_fast.runs.building import (
    build_clip,
    build_method,
    build_reader,
    build_transform,
    refuse_ensemble,
    warn_of,
)
from lamp_fast.runs.config import TrainConfig, to_saved, uses_validation
from lamp_fast.runs.fitted import Fitted
from lamp_fast.runs.machine import resolve_machine
from lamp_fast.runs.prior import Prior
from lamp_fast.runs.ranks import ALONE, Ranks, place
from lamp_fast.runs.record import Record, current_commit
from lamp_fast.runs.saved import SavedRun, load
from lamp_fast.runs.selection import SelectionConfig
from lamp_fast.runs.settings import OptimConfig

# The readable pictures of a run, the names of the others, the sha256 of all that is read.
Checked = tuple[Benchmark, tuple[str, ...], str]


@dataclass(frozen=True)
class Experiment:
    """Everything that a run is made of, ready to use.

    Attributes:
        config: the settings with every "auto" resolved.
        unreadable: names of the pictures that were skipped.
        data_hash: sha256 over names, labels and bytes of every picture of the run.
        reader: of what the frozen tower makes of pictures.
        block: how many (image, class) pairs the method encodes at once; None where it does not ask.
        prior: what scores are corrected to; None leaves them as the method gives them.
        fitted: on validation pictures, over the trained classes; None where there were none, or
            others are tested.
        coverage: of the sets of names that tests judge.
    """

    config: TrainConfig
    device: torch.device
    clip: FrozenClip
    benchmark: Benchmark
    method: Method
    data_hash: str
    unreadable: tuple[str, ...]
    reader: FeatureReader
    block: int | None = None
    prior: Prior | None = None
    fitted: Fitted | None = None
    coverage: float = COVERAGE

    def training_set(self, batch: int) -> TrainingSet:
        """What the method may look at before the first step.

        Args:
            batch: rows of a training batch.
        """
        drawn = self.train_transform
        return TrainingSet(
            self.benchmark,
            self.reader,
            centre=self.centre_transform,
            random=None if isinstance(drawn.views, CentreCrop) else drawn,
            batch=batch,
            seed=self.config.seed,
            sampler=self.config.optim.sampler,
        )

    @property
    def test_transform(self) -> Transform:
        """The views that pictures are scored on: one, or five."""
        return self._transform(testing_views(self.config.views, self._size))

    @property
    def centre_transform(self) -> Transform:
        """The one deterministic view, also where scores are of five."""
        return self._transform(centre_view(self.config.views, self._size))

    @property
    def train_transform(self) -> Transform:
        """The random views of training, or the centre."""
        views, epochs = self.config.views, self.config.optim.epochs
        return self._transform(
            training_views(views, self._size, epochs, croppable=self.benchmark.augment)
        )

    def with_tte(self, tte: bool | None) -> "Experiment":
        """The same, scored on five views or on one; None leaves it as the run has it."""
        if tte is None:
            return self
        views = replace(self.config.views, tte=tte)
        return replace(self, config=replace(self.config, views=views))

    def move_batches(self, batches: Iterable[Batch]) -> Iterator[list[torch.Tensor]]:
        """:func:`lamp_fast.data.loading.move_batches` to what this run's device and CLIP want."""
        return move_batches(batches, self.device, self.clip.dtype)

    @property
    def _size(self) -> int:
        return self.clip.preprocessing.size

    def _transform(self, views: Views) -> Transform:
        return build_transform(self.clip, self.config.views, self.config.machine, views)

    @property
    def caution(self) -> str | None:
        """Why scores mean nothing, see :func:`lamp_fast.clip.settings.caution`."""
        identity = self.clip.identity
        return caution(identity.name, identity.random, self.benchmark.name)

    def describe(self) -> list[str]:
        """The first lines of a run: what CLIP, what data, what method."""
        identity, config = self.clip.identity, self.config
        lines = [
            f"clip    {identity.name}, weights {identity.weights}, {identity.activation},"
            f" {len(self.clip.vision.blocks)}+{len(self.clip.text.blocks)} layers,"
            f" {self.device.type} {config.machine.precision}",
            *(f"data    {line}" for line in self.benchmark.describe()),
        ]
        if self.unreadable:
            lines.append(
                f"data    skipped {len(self.unreadable)} unreadable, first {self.unreadable[0]}"
            )
        if config.views != ViewConfig():
            lines.append(f"views   {config.views.describe()}")
        method = f"method  {config.method}, {self.method.trainable_parameters():,} parameters"
        if config.preset is not None:
            optim = {name: getattr(config.optim, name) for name in ("optimiser", "lr", "batch")}
            method += f", preset {config.preset}: {self.method.describe(config.own, optim)}"
        about = config.optim.describe()
        return [*lines, method, *([] if about is None else [f"train   {about}"])]

    def record(self) -> dict[str, Any]:
        """What ``config.json`` holds: settings and the identity of everything they led to."""
        benchmark = self.benchmark
        held_out = {"held_out": list(benchmark.stand_ins)} if benchmark.held_out else {}
        excluded = {part: list(names) for part, names in benchmark.excluded.items()}
        described = {"words": benchmark.words, "hierarchy": benchmark.hierarchy}
        return {
            "settings": to_saved(replace(self.config, resume=False, overwrite=False)),
            "block": self.block,
            "version": lamp_fast.__version__,
            "commit": current_commit(),
            "torch": torch.__version__,
            "clip": to_json(self.clip.identity),
            "data": {
                "sha256": self.data_hash,
                "base_names": list(benchmark.base_names),
                "new_names": list(benchmark.new_names),
                **held_out,
                "template": benchmark.template,
                "counts": [int(count) for count in benchmark.counts],
                "unreadable": list(self.unreadable),
                **({"excluded": excluded} if excluded else {}),
                **{name: to_json(each) for name, each in described.items() if each is not None},
            },
        }


def assemble(
    config: TrainConfig,
    checked: Checked | None = None,
    begun: Record | None = None,
    saved: SavedRun | None = None,
    clip: FrozenClip | None = None,
) -> Experiment:
    """Build every part of a run; nothing is written.

    Args:
        config: the settings.
        checked: what :func:`check_data` gave for them, where another process has called it.
        begun: of a run that goes on, its record.
        saved: the finished run whose method it is, in place of a fresh one.
        clip: of the settings, where it is built already.

    Raises:
        InputError: the first setting that cannot be served.
    """
    validate(config)
    machine, device = resolve_machine(config.machine)
    data = config.data.resolved()
    config = replace(config, machine=machine, data=data, clip=config.clip.resolved(data.data))
    if config.machine.threads is not None:
        torch.set_num_threads(config.machine.threads)
    ops.prefer(None if config.machine.ops == "auto" else config.machine.ops)
    record = begun if saved is None else saved.record
    # Listing is quick; weights may have to be fetched first.
    listed = checked[0] if checked else load_benchmark(config, record)
    if listed.words is not None:
        refuse_ensemble(METHODS[config.method], listed.words)
    if clip is None:
        clip = build_clip(config, None if record is None else record.values["clip"])
    if saved is None:
        config = replace(config, selection=_selection(config, listed))
        config = replace(config, optim=_optimisation(config, listed))
    torch.manual_seed(config.seed)
    if saved is None:
        counts = tuple(listed.counts.tolist())
        method = build_method(clip, config, RunClasses(listed.base_names, listed.new_names, counts))
    else:
        method = saved.method(clip, config)
    # Names that a run was begun with are its own; those of another data set are tested anew.
    own = begun is not None or (saved is not None and checked is None)
    check_class_prompts(method, listed, distinct=not own)
    benchmark, unreadable, data_hash = checked or _check_pictures(listed, config)
    cache = None
    if config.machine.cache_size and benchmark.train.arrays is None:
        cache = DecodedCache(default_folder(), round(config.machine.cache_size * 1e9))
    benchmark = decode_through(benchmark, cache, config.data.downscale)
    reader = build_reader(clip, config.machine)
    names = max(benchmark.base_names, benchmark.new_names, key=len)
    block = config.trim.block or (None if record is None else record.block)
    if block is None:
        block = method.choose_block(names, benchmark.template)
    method.block = block
    config = replace(config, own=method.resolved(config.own))
    warn_of(clip, benchmark.name)  # when nothing is left to be refused
    return Experiment(
        config, device, clip, benchmark, method, data_hash, tuple(unreadable), reader, block
    )


def _selection(config: TrainConfig, benchmark: Benchmark) -> SelectionConfig:
    """What is chosen on validation pictures, with the defaults of data and method filled in.

    Raises:
        InputError: validation pictures are asked for, and there are none.
    """
    selection = config.resolved_selection()
    if not selection.uses_validation or len(benchmark.val):
        return selection
    asked = config.selection
    if asked.select == "best" or asked.uses_validation:
        flag = "--select best" if asked.select == "best" else f"--validation {asked.validation}"
        raise InputError(
            f"{flag}: --data {benchmark.name} gives no validation picture, expected at least three"
            " training pictures of a class"
        )
    # That there is none stands in what the data say of themselves.
    return replace(selection, select="last", validation="off")


def _optimisation(config: TrainConfig, benchmark: Benchmark) -> OptimConfig:
    """The optimisation with what depends on the data filled in, as it is saved."""
    optim = config.optim.resolved(benchmark.base_names)
    if optim.epochs is not None:
        return optim
    pictures, classes = len(benchmark.train), len(benchmark.base_names)
    return replace(optim, epochs=config.own.epochs(pictures, classes, optim.batch))


def check_class_prompts(method: Method, benchmark: Benchmark, *, distinct: bool) -> None:
    """Refuse, before any work, class names that the method or zero-shot CLIP could not take.

    Args:
        method: of the run.
        benchmark: what is trained or tested.
        distinct: names must also differ in their tokens, but for a data set that is published with
            others.

    Raises:
        InputError: a prompt that is too long, a name that is no text, names with the same tokens,
            or a name that was not trained where the method refuses those.
    """
    names, words = (*benchmark.base_names, *benchmark.new_names), benchmark.words
    if words is not None:
        every = [text for name in names for text in words.texts(name)]
        tokenise(method.clip, every, "{}", quiet=True)
    for template in method.templates(benchmark.template, benchmark.origin):
        tokenise(method.clip, names, template, quiet=True)
    tokens = tokenise(method.clip, names, benchmark.template, quiet=True)
    entry = catalog.CATALOG.get(benchmark.name)
    if method.entry.no_new_names is not None and not benchmark.trained:
        method.prepare(names, benchmark.template, benchmark.origin)
    if distinct and (entry is None or entry.distinct_names):
        check_distinct(tokens, f"--data {benchmark.name}: class names")


def check_data(config: TrainConfig, listed: Benchmark | None = None) -> Checked:
    """Read every picture of a run once; see :func:`check_benchmark`.

    Args:
        config: of the run.
        listed: what :func:`load_benchmark` gave for it, where that was called already.

    Raises:
        InputError: see :func:`load_data` and :func:`check_benchmark`.
    """
    validate(config)
    if listed is None:
        listed = load_benchmark(config)
    return _check_pictures(listed, config)


def load_benchmark(config: TrainConfig, begun: Record | None = None) -> Benchmark:
    """What a run sees of its data set: :func:`load_data`, with validation pictures where something
    asks for them: all of them where the method chooses on them or --validation says so, else as
    many as can be scored after every epoch. ``begun`` is the run's record where it has one."""
    every = config.own.uses_validation or config.selection.validation == "all"
    validation = "all" if every else "some" if uses_validation(config) else "none"
    return load_data(
        config.data,
        config.seed,
        validation=validation,
        holdout=config.resolved_selection().held_out,
        begun=begun,
    )[1]


def _check_pictures(benchmark: Benchmark, config: TrainConfig) -> Checked:
    return check_benchmark(benchmark, skip_unreadable=config.data.skip_unreadable)


def check_target(data: DataConfig) -> Checked:
    """Read every test picture of a data set once, to test on it what was trained on another.

    Raises:
        InputError: see :func:`load_source` and :func:`check_benchmark`.
    """
    validate(data)
    benchmark = transfer_benchmark(find_source(data, only_test=True))
    return check_benchmark(benchmark, skip_unreadable=data.skip_unreadable)


def find_source(
    data: DataConfig, *, only_test: bool = False, begun: Record | None = None
) -> DataSource:
    """List the pictures of a data set; see :func:`load_source`.

    Args:
        data: which, and what its classes are called and are kinds of.
        only_test: nothing will be trained on it.
        begun: of a run, which kept the latter; no file of them is read then.
    """
    data = data.resolved()
    table = None
    if data.table is not None:
        table = PictureTable(data.table, data.path_column, data.label_column, data.split_column)
    files = {"train": data.train, "val": data.val, "test": data.test}
    given = {part: file for part, file in files.items() if file is not None}
    source = load_source(
        data.data,
        data.root,
        None,
        table,
        lists=PictureLists(given, data.names),
        path_column=data.path_column,
        label_column=data.label_column,
        level=data.level,
        imb=data.imb,
        only_test=only_test,
    )
    if begun is not None:
        source = leave_out(source, begun.excluded)
        words = begun.words or Words((begun.data.template,))
        return replace(with_words(source, data.template, None, words), hierarchy=begun.hierarchy)
    if data.exclude is not None:
        source = without_excluded(source, data.exclude)
    source = with_words(source, data.template, data.descriptions)
    levels = read_levels(data.hierarchy, data.levels, table, source.classnames)
    return replace(source, hierarchy=levels)


def load_data(
    data: DataConfig,
    seed: int,
    *,
    validation: Validated = "none",
    holdout: float | None = None,
    begun: Record | None = None,
) -> tuple[DataSource, Benchmark]:
    """List the pictures of a data set and apply the protocol; no picture is read yet.

    Args:
        data: which, and how it is drawn from.
        seed: of the draws.
        validation, holdout: as in :func:`build_benchmark`.
        begun: see :func:`find_source`.

    Raises:
        InputError: see :func:`load_source` and :func:`build_benchmark`.
    """
    data = data.resolved()
    source = find_source(data, begun=begun)
    benchmark = build_benchmark(
        source,
        split=data.split,
        imb=data.imb,
        cap=data.cap,
        shots=data.shots,
        seed=seed,
        validation=validation,
        holdout=holdout,
    )
    return source, benchmark


def load_run(
    folder: Path, ranks: Ranks = ALONE, **places: Path | None
) -> tuple[Experiment, dict[str, Any]]:
    """Rebuild a finished run from its folder, on this rank's device.

    Args:
        folder: of the run.
        ranks: the processes that will share the pictures.
        places: where its pictures lie now, if not where the run found them: of
            :data:`lamp_fast.data.settings.PLACES`.

    Returns:
        The experiment with its learned state, and the facts stored with that state.

    Raises:
        InputError: files missing or damaged, or data or CLIP that are no longer the run's.
    """
    saved = load(folder)
    config = saved.record.settings
    moved = {name: place for name, place in places.items() if place is not None}
    data = replace(config.data, **moved)
    experiment = assemble(place(replace(config, data=data), ranks), saved=saved)
    now, then = experiment.data_hash, saved.record.data.sha256
    if now != then:
        raise InputError(
            f"{folder}: the data are not those of the run (sha256 {now[:12]}, then {then[:12]})"
        )
    return replace(experiment, fitted=saved.fitted), saved.facts


def load_run_on(
    folder: Path, target: DataConfig, ranks: Ranks = ALONE
) -> tuple[Experiment, dict[str, Any]]:
    """Rebuild a finished run to test it on another data set; its own pictures are not needed.

    The target's names and template take the place of the run's classes, and the load-balancing bias
    is b_base. :func:`transfer_rows` scores the result.

    Args:
        folder: of the run.
        target: the data set to test on; how it would be drawn from for training does not matter.
        ranks: the processes that will share the pictures.

    Raises:
        InputError: as :func:`load_run`, or a target that is missing, incomplete or malformed.
    """
    saved = ranks.together(load, folder)  # refused before a large data set is read
    checked = ranks.once(check_target, target)
    config = place(saved.record.settings, ranks)
    experiment = ranks.together(assemble, config, checked, None, saved)
    benchmark, unreadable, _ = checked
    same = benchmark.base_names == saved.record.data.base_names
    tested = {"benchmark": benchmark, "unreadable": unreadable}
    return replace(experiment, **tested, fitted=saved.fitted if same else None), saved.facts
