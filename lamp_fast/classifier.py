"""The Python object of a trained method: train it, save it, load it, classify pictures.

A run folder, or what :meth:`Classifier.save_pretrained` wrote, is enough to load one: the CLIP and
the few learned tensors. The pictures it was trained on need not exist any more.
"""

import io
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from lamp_fast import train
from lamp_fast.data.pictures import Pictures, decode
from lamp_fast.data.transforms import evaluation_transform
from lamp_fast.errors import InputError
from lamp_fast.fields import from_json, parse_layers, to_json
from lamp_fast.files import load_tensors, read_json
from lamp_fast.methods import Method, RunClasses, build_method
from lamp_fast.runs import checkpoint, hub
from lamp_fast.runs import config as settings
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.experiment import build_clip, resolve_machine
from lamp_fast.runs.folder import (
    CONFIG,
    LEARNED,
    RESULT,
    prepare_folder,
    read_learned,
    resumed_defaults,
)
from lamp_fast.runs.trainer import NonFiniteLossError

Picture = str | os.PathLike | Image.Image | np.ndarray
Bias = Literal["trained", "adapted", "none"]

# Decoding leaves the interpreter's lock; beyond this the disk or the CLIP is what one waits for.
_THREADS = min(8, os.cpu_count() or 1)
_MAX_LISTS = 16


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one picture, best first.

    Attributes:
        names: class names; of equal probability the one given first comes first.
        probabilities: of each, softmax over all classes that were asked for.
        trained: whether each was among the trained classes.
        bias: what prompts were retrieved with, see :meth:`Classifier.bias_for`.
    """

    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    trained: tuple[bool, ...]
    bias: Bias


class Classifier:
    """A trained method with its CLIP, ready to classify; made by :meth:`train` or :meth:`load`.

    Attributes:
        method: the trained method; ``method.clip`` is the frozen CLIP.
        config: the settings of the run, with the machine that this object computes on.
        record: what the run's ``config.json`` holds.
        facts: training seconds, epochs, and how the bias was adapted to new classes (or None).
        results: rows of the closing table, values in 0..1; None where there is none.
    """

    def __init__(
        self,
        method: Method,
        config: TrainConfig,
        record: Mapping[str, Any],
        facts: Mapping[str, Any],
        results: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.method = method.eval()
        self.config = config
        self.record = record
        self.facts = facts
        self.results = results
        self._transform = evaluation_transform(method.clip.preprocessing)
        # A server's few lists stay prepared; threads may ask for different ones at once.
        self._classes = lru_cache(_MAX_LISTS)(partial(method.prepare, template=self.template))

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
        config = replace(config, out=prepare_folder(config))
        if train.main(config):
            raise NonFiniteLossError(f"{config.out}: training diverged, nothing to load")
        return cls.load(config.out, device=config.machine.device)

    @classmethod
    def load(
        cls,
        run: str | os.PathLike,
        *,
        device: str = "auto",
        pretrained: str | os.PathLike | None = None,
    ) -> "Classifier":
        """Load a finished run, or what :meth:`save_pretrained` wrote; no network, no training data.

        Args:
            run: the folder.
            device: auto, cpu, cuda or cuda:N. The run's precision is kept where the device is of
                the kind that it ran on; float32 and float64 are kept everywhere.
            pretrained: where the CLIP's weights are, if not where the run found them.

        Raises:
            InputError: files missing or damaged, a CLIP that is not the run's, or a device that is
                not there.
        """
        folder = Path(run)
        file = folder / CONFIG
        record = read_json(file)
        try:
            saved = settings.saved_settings(record["settings"], str(file))
            fingerprint = record["clip"]["fingerprint"]
            missing = {"base_names", "new_names", "template"} - record["data"].keys()
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{file}: not the {CONFIG} of a run") from None
        if missing:
            raise InputError(f"{file}: data.{min(missing)} is missing")
        settings.validate(saved)
        weights = folder / hub.WEIGHTS
        if weights.is_file():
            tensors, facts = load_tensors(weights)
        else:
            weights, (tensors, facts) = folder / LEARNED, read_learned(folder)
        config = _on_device(saved, device)
        if pretrained is not None:
            config = replace(config, clip=replace(config.clip, pretrained=os.fspath(pretrained)))
        clip = build_clip(config)
        if clip.identity.fingerprint != fingerprint:
            raise InputError(
                f"{folder}: the CLIP weights are not those of the run"
                f" (sha256 {clip.identity.fingerprint[:12]}, then {fingerprint[:12]})"
            )
        classes = RunClasses(
            tuple(record["data"]["base_names"]), tuple(record["data"]["new_names"])
        )
        with torch.random.fork_rng(devices=[]):  # a fresh method draws what is then overwritten
            method = build_method(clip, config, classes)
        checkpoint.load_into(method, tensors, weights)
        results = folder / RESULT
        rows = read_json(results) if results.is_file() else None
        return cls(method, config, record, facts, rows)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | os.PathLike,
        *,
        device: str = "auto",
        pretrained: str | os.PathLike | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> "Classifier":
        """Load from a local folder (no network is asked) or from the Hugging Face hub.

        Args:
            folder_or_hub_id: a folder, or ``owner/name`` on the hub; an existing folder wins.
            device, pretrained: as in :meth:`load`.
            revision: branch, tag or commit on the hub.
            token: for a private repository; by default the one that the hub's login keeps.

        Raises:
            InputError: neither a folder nor a repository that can be had, or as :meth:`load`.
        """
        folder = hub.fetch(folder_or_hub_id, revision=revision, token=token)
        return cls.load(folder, device=device, pretrained=pretrained)

    def save_pretrained(self, folder: str | os.PathLike, *, license: str | None = None) -> None:
        """Write the Hugging Face layout, see :func:`lamp_fast.runs.hub.save`."""
        hub.save(self, Path(folder), license=license)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the same to the hub and return its address (:func:`lamp_fast.runs.hub.push`)."""
        return hub.push(self, repo_id, **options)

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

    def bias_for(self, classes: Sequence[str]) -> Bias:
        """Which load-balancing bias retrieves prompts for these classes.

        "adapted" where they are exactly the new classes that the run adapted to; "trained" (b_base)
        for everything else, a mix of both kinds included; "none" without a prompt pool.
        """
        if not self.method.has_bias:
            return "none"
        adapted = self.facts.get("adaptation") is not None
        return "adapted" if adapted and set(classes) == set(self.new_names) else "trained"

    def classify(
        self,
        pictures: Iterable[Picture],
        classes: Sequence[str] | None = None,
        *,
        top: int = 5,
        batch: int | None = None,
    ) -> list[Prediction]:
        """Classify pictures among ``classes``, in batches.

        Args:
            pictures: files, PIL images, or uint8 arrays [H, W], [H, W, 3] or [H, W, 4]; an array
                [N, H, W, 3] is N pictures.
            classes: at least two distinct names, trained or not; by default the trained ones.
            top: how many names a picture, at least 1; at most all classes are given.
            batch: pictures at once, by default the run's ``--test-batch``.

        Returns:
            One prediction a picture, in order.

        Raises:
            InputError: what cannot be served; the first picture that cannot be read, by name.
        """
        predictions = []
        for outcome in self.classify_each(pictures, classes, top=top, batch=batch):
            if isinstance(outcome, InputError):
                raise outcome
            predictions.append(outcome)
        return predictions

    def classify_each(
        self,
        pictures: Iterable[Picture],
        classes: Sequence[str] | None = None,
        *,
        top: int = 5,
        batch: int | None = None,
    ) -> Iterator[Prediction | InputError]:
        """As :meth:`classify`, one by one; an unreadable picture gives its error and no stop."""
        names = self.trained_names if classes is None else _checked_names(classes)
        batch = self.config.machine.test_batch if batch is None else batch
        for argument, value in (("top", top), ("batch", batch)):
            if value < 1:
                raise InputError(f"{argument} {value}: expected at least 1")
        if isinstance(pictures, (str, os.PathLike, Image.Image)):
            raise InputError(f"pictures {pictures!r}: expected a list of pictures, got one")
        if (
            isinstance(pictures, np.ndarray) and pictures.ndim != 4
        ):  # its rows would pass for pictures
            raise InputError(
                f"pictures: array {list(pictures.shape)}, expected [N, H, W, 3], or a list"
            )
        return self._predictions(pictures, names, self._classes(names), top, batch)

    def _predictions(
        self, pictures: Iterable[Picture], names: Sequence[str], classes: Any, top: int, batch: int
    ) -> Iterator[Prediction | InputError]:
        bias, trained = self.bias_for(names), set(self.trained_names)
        for outcomes in _load_ahead(pictures, self._load, batch):
            images = [each for each in outcomes if isinstance(each, Tensor)]
            rows = iter(self._likeliest(torch.stack(images), classes, bias, top) if images else ())
            for outcome in outcomes:
                if isinstance(outcome, InputError):
                    yield outcome
                    continue
                probabilities, indices = next(rows)
                chosen = tuple(names[index] for index in indices)
                yield Prediction(
                    names=chosen,
                    probabilities=tuple(probabilities),
                    trained=tuple(name in trained for name in chosen),
                    bias=bias,
                )

    def _likeliest(
        self, images: Tensor, classes: Any, bias: Bias, top: int
    ) -> Iterator[tuple[list[float], list[int]]]:
        """Per image, the ``top`` probabilities and where their classes stand."""
        clip, method = self.method.clip, self.method
        images = images.to(self.config.machine.device, clip.dtype)
        logits = method.logits(images, classes, bias == "adapted")
        values, order = logits.softmax(1).sort(dim=1, descending=True, stable=True)
        return zip(values[:, :top].tolist(), order[:, :top].tolist(), strict=True)

    def _load(self, number: int, picture: Picture) -> Tensor | InputError:
        """The transformed picture, float32 [3, S, S], or why there is none."""
        try:
            return self._transform(_read(number, picture))
        except InputError as error:
            return error


def training_settings(flags: Mapping[str, Any]) -> TrainConfig:
    """The command line's flags as keywords: presets and saved configs set defaults, as there.

    Args:
        flags: by the flag's name with underscores; layers as "3..12" or as numbers.

    Raises:
        InputError: an unknown name, or a value of another kind.
    """
    given = {
        name: os.fspath(each) if isinstance(each, Path) else each for name, each in flags.items()
    }
    argv = [
        part
        for name in (*settings.CHOOSE_DEFAULTS, "out")
        if given.get(name) is not None
        for part in (f"--{name}", str(given[name]))
    ]
    argv += ["--resume"] if given.get("resume") else []
    values = to_json(resumed_defaults(argv))
    for name in ("layers", "adapter_layers"):
        if isinstance(given.get(name), str):
            try:
                given[name] = parse_layers(given[name])
            except ValueError as error:
                raise InputError(str(error)) from None
        if isinstance(given.get(name), Iterable):
            given[name] = list(given[name])
    for each in fields(TrainConfig):
        grouped = is_dataclass(each.type)
        target = values[each.name] if grouped else values
        for flag in fields(each.type) if grouped else [each]:
            if flag.name in given:
                target[flag.name] = given.pop(flag.name)
    if given:
        raise InputError(f"{next(iter(given))}: not a setting of training")
    return from_json(TrainConfig, values, "train")


def _on_device(config: TrainConfig, device: str) -> TrainConfig:
    """The settings for the machine of now."""
    then = config.machine
    resolved, place = resolve_machine(replace(then, device=device, precision="auto"))
    if then.precision in ("fp32", "fp64") or torch.device(then.device).type == place.type:
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
    name, often = Counter(names).most_common(1)[0]
    if often > 1:
        raise InputError(f"classes: {name!r} is named {often} times, expected distinct names")
    return names


def _read(number: int, picture: Picture) -> Tensor:
    """A picture as uint8 [3, H, W] RGB, by the same rules as a file's."""
    if isinstance(picture, (str, os.PathLike)):
        file = Path(picture)
        return Pictures(names=(file.name,), labels=np.zeros(1), root=file.parent).load(0)
    where = f"pictures[{number}]"
    if isinstance(picture, np.ndarray):
        plain = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))
        if picture.dtype != np.uint8 or not plain or not picture.size:
            raise InputError(
                f"{where}: {picture.dtype} array {list(picture.shape)}, expected uint8 [H, W],"
                " [H, W, 3] or [H, W, 4]"
            )
        picture = Image.fromarray(np.ascontiguousarray(picture))
    if not isinstance(picture, Image.Image):
        kind = type(picture).__name__
        raise InputError(f"{where}: {kind}, expected a path, a PIL image or a uint8 array")
    try:
        return pil_to_tensor(decode(_as_file(picture)))
    except Exception as error:  # as with files, PIL raises almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: cannot be read as a picture ({reason})") from None


def _as_file(image: Image.Image) -> bytes:
    """The bytes of a lossless file, so that an image in memory is read by a file's rules."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    content = io.BytesIO()
    image.save(content, format="TIFF")
    return content.getvalue()


def _load_ahead(pictures: Iterable[Picture], load: Any, size: int) -> Iterator[list[Any]]:
    """Batches of loaded pictures; threads load the next batch while this one is computed on."""
    numbered = enumerate(pictures)
    executor = ThreadPoolExecutor(_THREADS)
    waiting: deque[list[Future]] = deque()
    try:
        while batch := [executor.submit(load, *each) for each in islice(numbered, size)]:
            waiting.append(batch)
            if len(waiting) > 1:
                yield [each.result() for each in waiting.popleft()]
        while waiting:
            yield [each.result() for each in waiting.popleft()]
    finally:
        executor.shutdown(cancel_futures=True)
