"""The Python object of a trained method: train it, save it, load it, classify pictures.

A run folder, or what :meth:`Classifier.save_pretrained` wrote, is enough to load one: the CLIP and
the few learned tensors. The pictures it was trained on need not exist any more.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lamp_fast.answers.asked import Asked, Score
from lamp_fast.answers.prediction import Bias, Prediction, predictions
from lamp_fast.cli import expand_path
from lamp_fast.clip.prompts import check_distinct, tokenise
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import Origin
from lamp_fast.data.handed_over import Picture, Taken, load_ahead, read_taken
from lamp_fast.data.hierarchy import CLASS, Level, saved_hierarchy
from lamp_fast.data.sources.hierarchy import read_hierarchy
from lamp_fast.data.transforms import HostTransform
from lamp_fast.data.views import testing_views, used_preprocessing
from lamp_fast.data.words import saved_words
from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds
from lamp_fast.methods.base import Method
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs import hub
from lamp_fast.runs.answering import Answering, Situation, decide, moved_names
from lamp_fast.runs.building import DTYPES, build_clip, warn_of
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.fitted import Fitted
from lamp_fast.runs.folder import choose_folder
from lamp_fast.runs.levels import roll_up
from lamp_fast.runs.machine import resolve_machine
from lamp_fast.runs.prior import Prior, Wanted
from lamp_fast.runs.saved import load
from lamp_fast.runs.scorer import class_scores
from lamp_fast.runs.trainer import NonFiniteLossError
from lamp_fast.runs.training import train, training_settings

_AT_ONCE = Bounds(1, 1_000_000)
_MAX_LISTS = 16


class Classifier:
    """A trained method with its CLIP, ready to classify; made by :meth:`train` or :meth:`load`.

    Attributes:
        method: the trained method; ``method.clip`` is the frozen CLIP.
        config: the settings of the run, with the machine that this object computes on.
        record: what the run's ``config.json`` holds.
        facts: training seconds, epochs, and how the bias was adapted to new classes (or None).
        results: rows of the closing table, values in 0..1; None where there is none.
        fitted: what the run fitted on validation pictures; None where it had none.
        hierarchy: what classes are kinds of; None where nobody said.
    """

    def __init__(
        self,
        method: Method,
        config: TrainConfig,
        record: Mapping[str, Any],
        facts: Mapping[str, Any],
        results: Sequence[Mapping[str, Any]] | None = None,
        fitted: Fitted | None = None,
    ) -> None:
        self.method = method.eval()
        self.config = config
        self.record = record
        self.facts = facts
        self.results = results
        self.fitted = fitted
        self.hierarchy = saved_hierarchy(record["data"].get("hierarchy"), "hierarchy")
        views, own = config.views, method.clip.preprocessing
        self._transform = HostTransform(
            used_preprocessing(views, own), testing_views(views, own.size)
        )
        # A server's few lists stay prepared; threads may ask for different ones at once.
        prepare = partial(method.prepare, template=self.template, origin=self.origin)
        self._classes = lru_cache(_MAX_LISTS)(prepare)
        own = (*self.trained_names, *self.new_names)
        self._check_tokens = lru_cache(_MAX_LISTS)(
            partial(_check_tokens, method.clip, self.template, own)
        )
        texts = self.template, self.origin.words
        moved = partial(moved_names, method, self._classes, self.trained_names, *texts)
        self._distance_scale = lru_cache(_MAX_LISTS)(moved)

    @classmethod
    def train(cls, **flags: Any) -> "Classifier":
        """Train as ``python -m lamp_fast.train`` does, and load the run.

        Args:
            flags: the command's flags as keywords (``data="folder", root="pictures", epochs=30``);
                a preset sets the defaults, as there. ``out`` is the run folder, by default a new
                one under ``runs/``.

        Raises:
            InputError: a setting that cannot be served; nothing has been written.
            NonFiniteLossError: training diverged; the last good checkpoint is in the folder.
        """
        config = training_settings(flags)
        with contextlib.ExitStack() as made:
            config = replace(config, out=choose_folder(config, made))
            if train(config):
                raise NonFiniteLossError(f"{config.out}: training diverged, nothing to load")
        return cls.load(config.out, device=config.machine.device)

    @classmethod
    def load(
        cls,
        run: str | os.PathLike,
        *,
        device: str = "auto",
        pretrained: str | os.PathLike | None = None,
        tte: bool | None = None,
        precision: str | None = None,
        hierarchy: str | os.PathLike | None = None,
    ) -> "Classifier":
        """Load a finished run, or what :meth:`save_pretrained` wrote; no network, no training data.

        Args:
            run: the folder.
            device: auto, cpu, cuda or cuda:N. The run's precision is kept where the device is of
                the kind that it ran on; float32 and float64 are kept everywhere.
            pretrained: where the CLIP's weights are, if not where the run found them; they are used
                as the run used them.
            tte: whether five views of each picture answer together; by default as the run tests.
            precision: what the frozen CLIP computes in, as of --precision, in place of all that.
            hierarchy: a file of levels above the classes, as --hierarchy, in place of the run's.

        Raises:
            InputError: files missing or damaged, a CLIP that is not the run's, or a device that is
                not there or does not compute in the precision.
        """
        saved = load(expand_path(run))
        levels = None if hierarchy is None else read_hierarchy(expand_path(hierarchy))
        config = _on_device(saved.record.settings, device, precision)
        if pretrained is not None:
            config = replace(config, clip=replace(config.clip, pretrained=os.fspath(pretrained)))
        if tte is not None:
            config = replace(config, views=replace(config.views, tte=tte))
        record = saved.record.values
        clip = build_clip(config, record["clip"])
        warn_of(clip, config.data.data)
        method = saved.method(clip, config)
        loaded = cls(method, config, record, saved.facts, saved.results, saved.fitted)
        loaded.hierarchy = levels or loaded.hierarchy
        return loaded

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | os.PathLike,
        *,
        device: str = "auto",
        pretrained: str | os.PathLike | None = None,
        revision: str | None = None,
        token: str | None = None,
        tte: bool | None = None,
    ) -> "Classifier":
        """Load from a local folder (no network is asked) or from the Hugging Face hub.

        Args:
            folder_or_hub_id: a folder, or ``owner/name`` on the hub; an existing folder wins.
            device, pretrained, tte: as in :meth:`load`.
            revision: branch, tag or commit on the hub.
            token: for a private repository; by default the one that the hub's login keeps.

        Raises:
            InputError: neither a folder nor a repository that can be had, or as :meth:`load`.
        """
        folder = hub.fetch(folder_or_hub_id, revision=revision, token=token)
        return cls.load(folder, device=device, pretrained=pretrained, tte=tte)

    def save_pretrained(self, folder: str | os.PathLike, *, license: str | None = None) -> None:
        """Write the Hugging Face layout, see :func:`lamp_fast.runs.hub.save`."""
        state = self.method.state_dict()
        told = self.facts, self.results, self.fitted
        hub.save(expand_path(folder), self.record, state, *told, license=license)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the same to the hub and return its address (:func:`lamp_fast.runs.hub.push`)."""
        return hub.push(self.save_pretrained, repo_id, **options)

    @property
    def trained_names(self) -> tuple[str, ...]:
        """The classes that it was trained on."""
        return tuple(self.record["data"]["base_names"])

    @property
    def new_names(self) -> tuple[str, ...]:
        """The classes that the run tested without training on them; often none."""
        return tuple(self.record["data"]["new_names"])

    @property
    def template(self) -> str:
        """The class prompt, with {} for the name."""
        return self.record["data"]["template"]

    @property
    def origin(self) -> Origin:
        """The data set of the run, whose prompts are its own unless the run was given others."""
        data, words = self.config.data, saved_words(self.record["data"].get("words"), "words")
        return Origin(None if data.template else data.data, words=words)

    def bias_for(self, classes: Sequence[str]) -> Bias:
        """Which load-balancing bias retrieves prompts for these classes.

        "adapted" where they are exactly the new classes that the run adapted to; "trained" (b_base)
        for everything else, a mix of both kinds included; "none" without a prompt pool.
        """
        if not self.method.has_bias:
            return "none"
        adapted = self.facts.get("adaptation") is not None
        exactly = sorted(classes) == sorted(self.new_names)
        return "adapted" if adapted and exactly else "trained"

    def are_trained(self, classes: Sequence[str]) -> tuple[bool, ...]:
        """Whether each of some names is a trained class.

        Classes may share a name (ImageNet has two "missile"): as many of them as were trained are.
        """
        columns = RunClasses(self.trained_names).columns(classes)
        return tuple(column is not None for column in columns)

    def check_names(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Class names that can be asked for together.

        Raises:
            InputError: fewer than two, what is no name, or names that give the same tokens, unless
                those are the run's own classes.
        """
        names = _checked_names(classes)
        self._check_tokens(names)
        return names

    def classify(
        self,
        pictures: Iterable[Picture],
        classes: Sequence[str] | None = None,
        *,
        top: int = 5,
        batch: int | None = None,
        prior: Wanted | None = None,
        level: str | None = None,
        reject: str | float | None = None,
        reject_by: Score | None = None,
        coverage: float | None = None,
    ) -> list[Prediction]:
        """Classify pictures among ``classes``, in batches.

        Args:
            pictures: files, the bytes of files, PIL images, or uint8 arrays [H, W], [H, W, 3] or
                [H, W, 4]; an array [N, H, W, 3] is N pictures.
            classes: at least two distinct names, trained or not; by default the trained ones.
            top: how many names a picture, at least 1; at most all classes are given.
            batch: pictures at once, by default the run's ``--test-batch``.
            prior: correct the scores to these shares of classes among the pictures, whatever
                training's were: "uniform", "train" (of the training pictures), or a positive share
                of each class by name; None leaves them as they are.
            level: answer at this level of the run's hierarchy (genus, family, ...), whose
                probabilities are the sums over classes; None answers with classes.
            reject: answer "none of these" (:attr:`Prediction.rejected`) where the score is below
                this number; or "5%", that of the validation pictures which so many are below.
            reject_by: which score: "probability" (by default), "cosine" or "energy", see
                :func:`lamp_fast.answers.rejection.answer_scores`.
            coverage: also give the set of names that holds the right one as often as this, in 0..1
                (:attr:`Prediction.prediction_set`).

        Returns:
            One prediction a picture, in order.

        Raises:
            InputError: what cannot be served; the first picture that cannot be read, by name.
        """
        asked = {"reject": reject, "reject_by": reject_by, "coverage": coverage}
        asked |= {"top": top, "batch": batch, "prior": prior, "level": level}
        answers = []
        for outcome in self.classify_each(pictures, classes, **asked):
            if isinstance(outcome, InputError):
                raise outcome
            answers.append(outcome)
        return answers

    def classify_each(
        self,
        pictures: Iterable[Picture],
        classes: Sequence[str] | None = None,
        *,
        top: int = 5,
        batch: int | None = None,
        prior: Wanted | None = None,
        level: str | None = None,
        reject: str | float | None = None,
        reject_by: Score | None = None,
        coverage: float | None = None,
    ) -> Iterator[Prediction | InputError]:
        """As :meth:`classify`, one by one; an unreadable picture gives its error and no stop."""
        names = self.trained_names if classes is None else self.check_names(classes)
        batch = self.config.machine.test_batch if batch is None else batch
        for argument, value in (("top", top), ("batch", batch)):
            if (expected := _AT_ONCE.expected(value)) is not None:
                raise InputError(f"{argument} {value}: expected {expected}")
        if isinstance(pictures, (str, os.PathLike, bytes, Image.Image)):
            raise InputError(f"pictures {pictures!r}: expected a list of pictures, got one")
        if (
            isinstance(pictures, np.ndarray) and pictures.ndim != 4
        ):  # its rows would pass for pictures
            raise InputError(
                f"pictures: array {list(pictures.shape)}, expected [N, H, W, 3], or a list"
            )
        asked = Asked(reject, reject_by, coverage)
        prepared = self._classes(names)
        above = None if level is None else self.at_level(level, names)
        answering = self.answering(names, asked, prior, level)
        return self._predictions(pictures, names, prepared, top, batch, answering, above)

    def answering(
        self,
        classes: Sequence[str],
        asked: Asked,
        prior: Wanted | None = None,
        level: str | None = None,
    ) -> Answering:
        """How pictures would be answered over some names, and what a reader must know of it.

        Raises:
            InputError: see :func:`lamp_fast.runs.answering.decide`, or a prior that cannot be
                served.
        """
        names, trained = tuple(classes), self.are_trained(classes)
        above = None if level is None else self.at_level(level, names)
        situation = Situation(
            trained=trained,
            trained_alone=all(trained) and len(names) == len(self.trained_names),
            shift=None if prior is None else self._shift(prior, names),
            tte=self.config.views.tte,
            cosine_scale=self.method.cosine_scale,
            roll_up=None if above is None else partial(roll_up, level=above),
            distance_scale=partial(self._distance_scale, names, self.bias_for(names) == "adapted"),
        )
        return decide(asked, self.fitted, situation)

    def at_level(self, level: str, names: Sequence[str]) -> Level:
        """Some classes at a level of the hierarchy.

        Raises:
            InputError: no hierarchy, another level, or a class that is not in it.
        """
        if self.hierarchy is None:
            raise InputError(
                f"--level {level}: the run knows no level above its classes, expected --hierarchy"
            )
        return self.hierarchy.level(level, names)

    def _shift(self, wanted: Wanted, names: Sequence[str]) -> Tensor:
        """What a prior adds to the logits of ``names``, float64 [C]."""
        data = self.record["data"]
        prior = Prior(wanted, self.config.optim, self.trained_names, tuple(data["counts"]))
        prior.check(names)
        return prior.shift(self.method, names)

    def _predictions(
        self,
        pictures: Iterable[Picture],
        names: Sequence[str],
        classes: Any,
        top: int,
        batch: int,
        answering: Answering,
        level: Level | None,
    ) -> Iterator[Prediction | InputError]:
        bias, trained = self.bias_for(names), self.are_trained(names)
        title = CLASS
        if level is not None:
            title, names = level.title, level.names
            known = set(level.parent[list(trained)].tolist())
            trained = tuple(index in known for index in range(len(names)))
        for outcomes in load_ahead(pictures, self._load, batch):
            images = [each for each in outcomes if isinstance(each, Tensor)]
            answers = iter(())
            if images:
                given = torch.stack(images).to(self.config.machine.device, self.method.clip.dtype)
                logits = class_scores(self.method, given, classes, bias == "adapted")
                answered = answering.rules.answer(logits)
                answers = predictions(answered, names, trained, bias, top, title)
            for outcome in outcomes:
                yield outcome if isinstance(outcome, InputError) else next(answers)

    def _load(self, number: int, taken: Taken) -> Tensor | InputError:
        """The views of a picture, float32 [3, S, S] or [5, 3, S, S], or why there are none."""
        if isinstance(taken, InputError):
            return taken
        try:
            return self._transform(read_taken(number, taken))
        except InputError as error:
            return error


def _check_tokens(
    clip: FrozenClip, template: str, own: Sequence[str], names: tuple[str, ...]
) -> None:
    """Refuse names that a prompt does not tell apart, unless they are the run's own."""
    check_distinct(tokenise(clip, names, template, quiet=True), "classes", own)


def _on_device(config: TrainConfig, device: str, precision: str | None) -> TrainConfig:
    """The settings for the machine of now."""
    then = config.machine
    if precision not in (None, "auto", *DTYPES):
        raise InputError(f"precision={precision!r}: expected auto or one of {', '.join(DTYPES)}")
    resolved, place = resolve_machine(replace(then, device=device, precision=precision or "auto"))
    if precision is not None:
        return replace(config, machine=resolved)
    same_kind = then.device.partition(":")[0] == place.type
    if then.precision in ("fp32", "fp64") or (same_kind and then.precision != "auto"):
        resolved = replace(resolved, precision=then.precision)
    return replace(config, machine=resolved)


def _checked_names(classes: Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, str):
        raise InputError(f"classes {classes!r}: expected a list of class names")
    names = tuple(classes)
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"classes: {name!r} is not a class name")
    if len(names) < 2:
        raise InputError(f"classes {list(names)}: expected at least 2 class names")
    return names
