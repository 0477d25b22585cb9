"""The page about a run: everything that its folder says, and its test pictures where they are."""

import base64
import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import to_pil_image

from lamp_fast.clip.settings import caution
from lamp_fast.data.loading import evaluation_batches
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.protocol import SIZE_GROUPS
from lamp_fast.errors import InputError
from lamp_fast.methods import METHODS
from lamp_fast.methods.base import Method
from lamp_fast.methods.lamp.model import Lamp
from lamp_fast.methods.zeroshot import ZeroShot
from lamp_fast.pages import page_environment
from lamp_fast.report.drawing import STYLE, to_svg
from lamp_fast.report.tables import by_class_table, reliability_table, result_table
from lamp_fast.runs import figures
from lamp_fast.runs.experiment import Experiment, load_run
from lamp_fast.runs.folder import HOLDOUT, METRICS, RELIABILITY, RESULT, finished_file
from lamp_fast.runs.metrics import LEAST_ACCURACY
from lamp_fast.runs.record import read_history
from lamp_fast.runs.reliability import Reliability, read_reliability
from lamp_fast.runs.saved import load
from lamp_fast.runs.scorer import class_scores

TEMPLATE = "page.html.jinja"
# Bounds of what a page shows, so that it opens on a phone whatever the data set.
MAX_CONFUSION_CLASSES = 25
MAX_CONFUSIONS = 15
MAX_CLASSES_WITH_EXAMPLES = 30
SCORED_A_CLASS = 40
EXAMPLES_A_KIND = 2
MAX_ROUTED = 8
THUMBNAIL = 112

# More pictures than any data set has; sums of so many stay within 64 bits.
MAX_COUNT = 1 << 40


@dataclass(frozen=True)
class Example:
    """A test picture with both answers: a data URI, class names, and whether each is right."""

    picture: str
    zeroshot: str
    zeroshot_right: bool
    method: str
    method_right: bool


def build_page(run: Path) -> str:
    """One HTML page about a finished run; it loads nothing and runs no script.

    Everything but the example pictures and what they retrieve comes from the run folder. Those need
    the test pictures; where they are not there any more, the page says so.

    Raises:
        InputError: a file of the run that is missing or damaged.
    """
    saved = load(run)
    if saved.results is None:
        raise InputError(f"{finished_file(run, RESULT)}: expected a file of a run (it is missing)")
    record, rows = saved.record.values, saved.results
    method = METHODS[saved.record.settings.method].title
    history = compared = read_history(run / METRICS)
    if record["settings"]["selection"]["retrain"]:
        compared = read_history(run / HOLDOUT / METRICS)
    judged = run / RELIABILITY
    reliability = read_reliability(judged) if judged.is_file() else None
    classes = _read_classes(run / "per_class.csv", [row["name"] for row in rows])
    examples, routes, why_not = [], None, None
    try:
        experiment, _ = load_run(run)
    except InputError as error:
        why_not = str(error)
    else:
        # By place, for classes may share a name: the trained ones first, as in per_class.csv.
        accuracies = [_trained_accuracy(each) for each in classes]
        worst = [
            place
            for place in np.argsort(accuracies, kind="stable").tolist()
            if not np.isnan(accuracies[place])
        ]
        examples = _examples(experiment, worst[:MAX_CLASSES_WITH_EXAMPLES])
        routes = _routes(experiment)
    return (
        page_environment(__file__)
        .get_template(TEMPLATE)
        .render(
            title=f"{method} on {record['settings']['data']['data']}",
            method=method,
            record=record,
            caution=caution(
                saved.record.clip.name, saved.record.clip.random, saved.record.settings.data.data
            ),
            prompt=f"“{record['data']['template']}”"
            if saved.record.words is None
            else str(saved.record.words),
            table=result_table(rows, saved.record.settings.union),
            by_class=by_class_table(rows, classes),
            least_accuracy=LEAST_ACCURACY,
            svg=_svgs(history, compared, classes, reliability),
            reliability=None if reliability is None else reliability_table(reliability),
            halves=[_confusion(run, half) for half in ("base", "new")],
            classes=classes,
            methods=list(classes[0]["accuracies"]) if classes else [],
            examples=examples,
            most_examples=MAX_CLASSES_WITH_EXAMPLES,
            routes=routes,
            why_not=why_not,
            settings=_flat(record["settings"]),
        )
    )


def _read_table(file: Path) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a CSV file of a run, of the same width.

    Raises:
        InputError: missing, damaged, or without a line.
    """
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            header, *lines = csv.reader(stream)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{file}: missing or damaged ({error})") from None
    if not lines or any(len(line) != len(header) for line in lines):
        raise InputError(f"{file}: damaged (expected lines as wide as the header)")
    return header, lines


def _count(text: str) -> int:
    count = int(text)
    if not 0 <= count < MAX_COUNT:
        raise ValueError(f"{text[:20]} is no number of pictures")
    return count


def _share(text: str) -> float:
    share = float(text)
    if not (0 <= share <= 1 or np.isnan(share)):
        raise ValueError(f"{text[:20]} is no accuracy")
    return share


def _read_classes(file: Path, methods: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of per_class.csv; accuracies in 0..1 by method, NaN without a test picture."""
    header, lines = _read_table(file)
    if "size_group" not in header:  # a file of 0.2.0 or earlier
        header.insert(5, "size_group")
        lines = [[*line[:5], "n/a", *line[5:]] for line in lines]
    if header[5:] != ["size_group", *(f"accuracy: {name}" for name in methods)]:
        raise InputError(f"{file}: damaged (expected the accuracies of {', '.join(methods)})")
    try:
        classes = [
            {
                "half": half,
                "class": name,
                "training": _count(training),
                "test": _count(test),
                "group": group,
                "size_group": size_group,
                "accuracies": dict(zip(methods, map(_share, values), strict=True)),
            }
            for half, name, training, test, group, size_group, *values in lines
        ]
    except ValueError as error:
        raise InputError(f"{file}: damaged ({error})") from None
    if all(row["half"] == "new" for row in classes):
        raise InputError(f"{file}: damaged (no trained class)")
    return classes


def _trained_accuracy(row: Mapping[str, Any]) -> float:
    """Of the trained method with b_base, the second row of the table; NaN without a picture, and
    where the method has no score for the class."""
    return list(row["accuracies"].values())[:2][-1]


def _svgs(
    history: Sequence[Mapping[str, Any]],
    compared: Sequence[Mapping[str, Any]],
    classes: Sequence[Mapping[str, Any]],
    reliability: Reliability | None,
) -> dict[str, Markup]:
    """The figures that this run has, as inline SVG."""
    with matplotlib.rc_context(STYLE):
        trained = [each for each in classes if each["half"] != "new"]
        drawings = {"per_class": _draw_per_class(trained)}
        if history:
            drawings["curves"] = figures.draw_curves(history)
            drawings["validation"] = figures.draw_validation(compared)
            drawings["activations"] = figures.draw_activations(history)
        if reliability is not None:
            drawings["reliability"] = figures.draw_reliability(reliability.diagrams)
            drawings["risk_coverage"] = figures.draw_risk_coverage(reliability.curves)
        return {
            name: to_svg(figure, name) for name, figure in drawings.items() if figure is not None
        }


def _draw_per_class(trained: Sequence[Mapping[str, Any]]) -> Figure:
    methods = list(trained[0]["accuracies"])[:2]
    size_groups = [each["size_group"] for each in trained]
    return figures.draw_per_class(
        [each["training"] for each in trained],
        {
            # Dollars begin no formula.
            name.replace("$", r"\$"): [each["accuracies"][name] for each in trained]
            for name in methods
        },
        size_groups if set(size_groups) & set(SIZE_GROUPS) else None,
    )


def _confusion(run: Path, half: str) -> dict[str, Any] | None:
    """The confusion matrix of one half and its most frequent confusions."""
    file = run / f"confusion_{half}.csv"
    if not file.is_file():
        return None
    (_, *names), lines = _read_table(file)
    if [line[0] for line in lines] != names:
        raise InputError(f"{file}: damaged (its rows are not its columns)")
    try:
        counts = np.array([[_count(cell) for cell in line[1:]] for line in lines])  # [C, C]
    except ValueError as error:
        raise InputError(f"{file}: damaged ({error})") from None
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    wrong = counts * (1 - np.eye(len(counts), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSIONS]
    confusions = [
        {"true": names[i], "predicted": names[j], "count": int(wrong[i, j]), "share": shares[i, j]}
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[i, j]
    ]
    small = len(names) <= MAX_CONFUSION_CLASSES
    return {
        "half": half,
        "names": names,
        "counts": counts.tolist() if small else None,
        "shares": shares.tolist() if small else None,
        "picture": None if small else _heat_map(shares),
        "confusions": confusions,
    }


def _heat_map(shares: np.ndarray) -> str:
    """A data URI: a pixel block a cell, darker for a larger share of the true class."""
    cells = Image.fromarray((255 * (1 - shares)).astype(np.uint8))
    scale = max(1, 800 // len(shares))
    return _data_uri(cells.resize((len(shares) * scale,) * 2, Image.Resampling.NEAREST))


def _examples(experiment: Experiment, wanted: Sequence[int]) -> list[tuple[str, list[Example]]]:
    """Names and test pictures of the classes ``wanted``, in that order, wrong ones first.

    Classes are counted through both halves. Of each a few of every kind: who is right, zero-shot
    or the method.
    """
    zeroshot = ZeroShot(experiment.clip)
    found: dict[int, list[Example]] = {place: [] for place in wanted}
    benchmark = experiment.benchmark
    for first, names, pictures in (
        (0, benchmark.base_names, benchmark.test_base),
        (len(benchmark.base_names), benchmark.new_names, benchmark.test_new),
    ):
        pictures = _some_of_each(pictures, [first + label in found for label in range(len(names))])
        scored = not first or experiment.method.entry.no_new_names is None
        if not len(pictures) or not scored:
            continue
        answers = [
            _answers(experiment, method, names, pictures)
            for method in (zeroshot, experiment.method)
        ]
        taken: dict[tuple, int] = defaultdict(int)
        for index, (label, plain, ours) in enumerate(
            zip(pictures.labels.tolist(), *answers, strict=True)
        ):
            kind = (label, plain == label, ours == label)
            taken[kind] += 1
            if taken[kind] <= EXAMPLES_A_KIND:
                found[first + label].append(
                    Example(
                        picture=_thumbnail(pictures, index),
                        zeroshot=names[plain],
                        zeroshot_right=plain == label,
                        method=names[ours],
                        method_right=ours == label,
                    )
                )
    for some in found.values():
        some.sort(key=lambda each: (each.method_right, each.zeroshot_right))
    every = (*benchmark.base_names, *benchmark.new_names)
    return [(every[place], some) for place, some in found.items() if some]


def _some_of_each(pictures: Pictures, wanted: Sequence[bool]) -> Pictures:
    """The first so many pictures of each wanted class, in order."""
    taken: dict[int, int] = defaultdict(int)
    chosen = []
    for index, label in enumerate(pictures.labels.tolist()):
        taken[label] += 1
        if wanted[label] and taken[label] <= SCORED_A_CLASS:
            chosen.append(index)
    return pictures.select(chosen)


def _answers(
    experiment: Experiment, method: Method, names: Sequence[str], pictures: Pictures
) -> list[int]:
    benchmark = experiment.benchmark
    classes = method.prepare(names, benchmark.template, benchmark.origin)
    answers = []
    batches = evaluation_batches(
        pictures, experiment.test_transform, experiment.config.machine.test_batch
    )
    for images, _, _ in experiment.move_batches(batches):
        answers += class_scores(method, images, classes).argmax(1).tolist()
    return answers


@torch.no_grad()
def _routes(experiment: Experiment) -> dict[str, Any] | None:
    """Which pool entries a few test pictures retrieve, with their cosines; None without a pool."""
    method = experiment.method
    if not (isinstance(method, Lamp) and method.config.mpp):
        return None
    pictures = experiment.benchmark.test_base
    _, first = np.unique(pictures.labels, return_index=True)
    pictures = pictures.select(first[:MAX_ROUTED])
    batches = evaluation_batches(pictures, experiment.centre_transform, MAX_ROUTED)
    images, labels, _ = next(experiment.move_batches(batches))
    encoded = method.encode_images(images)
    return {
        "layers": list(method.config.layers),
        "pictures": [
            {
                "picture": _thumbnail(pictures, index),
                "name": experiment.benchmark.base_names[int(labels[index])],
                "retrieved": [
                    sorted(
                        zip(entries[index].tolist(), values[index].tolist(), strict=True),
                        key=lambda pair: -pair[1],
                    )
                    for entries, values in zip(encoded.chosen, encoded.similarity, strict=True)
                ],
            }
            for index in range(len(pictures))
        ],
    }


def _thumbnail(pictures: Pictures, index: int) -> str:
    picture = ImageOps.contain(to_pil_image(pictures.load(index)), (THUMBNAIL, THUMBNAIL))
    return _data_uri(picture)


def _data_uri(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "webp", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value))
    return rows
