"""The page about a run: everything that its folder says, and its test pictures where they are."""

import base64
import csv
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import to_pil_image

from lamp_fast.data import Pictures, evaluation_batches
from lamp_fast.errors import InputError
from lamp_fast.files import read_json
from lamp_fast.methods import METHODS, Lamp, Method, ZeroShot
from lamp_fast.runs import figures, scoring
from lamp_fast.runs.experiment import Experiment, load_run
from lamp_fast.runs.folder import CONFIG, METRICS, read_learned, read_results

TEMPLATE = "page.html.jinja"
# Bounds of what a page shows, so that it opens on a phone whatever the data set.
MOST_CONFUSION_CELLS_A_SIDE = 25
MOST_CONFUSIONS = 15
MOST_CLASSES_WITH_EXAMPLES = 30
SCORED_A_CLASS = 40
EXAMPLES_A_KIND = 2
MOST_ROUTED = 8
THUMBNAIL = 112

# Stands for the page's own text colour, which differs between light and dark.
_INK = "#010203"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "axes.titlecolor",
            "xtick.color",
            "ytick.color",
        ),
        _INK,
    ),
}


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
    record = read_json(run / CONFIG)
    read_learned(run)
    rows = read_results(run)
    method = METHODS[record["settings"]["method"]].title
    history = _read_history(run / METRICS)
    classes = _read_classes(run / "per_class.csv")
    examples, routes, why_not = {}, None, None
    try:
        experiment, _ = load_run(run)
    except InputError as error:
        why_not = str(error)
    else:
        worst = [each["class"] for each in sorted(classes, key=_trained_accuracy)]
        examples = _examples(experiment, worst[:MOST_CLASSES_WITH_EXAMPLES])
        routes = _routes(experiment)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=f"{method} on {record['settings']['data']['data']}",
        method=method,
        record=record,
        table=_result_table(rows),
        svg=_svgs(history, classes),
        halves=[_confusion(run, half) for half in ("base", "new")],
        classes=classes,
        methods=list(classes[0]["accuracies"]) if classes else [],
        examples=examples,
        most_examples=MOST_CLASSES_WITH_EXAMPLES,
        routes=routes,
        why_not=why_not,
        settings=_flat(record["settings"]),
    )


def _read_history(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: missing or damaged ({error})") from None


def _read_rows(file: Path) -> list[list[str]]:
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            return list(csv.reader(stream))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{file}: missing or damaged ({error})") from None


def _read_classes(file: Path) -> list[dict[str, Any]]:
    """The lines of per_class.csv; accuracies in 0..1 by method, NaN without a test picture."""
    header, *lines = _read_rows(file)
    methods = [each.removeprefix("accuracy: ") for each in header[5:]]
    try:
        return [
            {
                "half": half,
                "class": name,
                "training": int(training),
                "test": int(test),
                "group": group,
                "accuracies": dict(zip(methods, map(float, values), strict=True)),
            }
            for half, name, training, test, group, *values in lines
        ]
    except ValueError as error:
        raise InputError(f"{file}: damaged ({error})") from None


def _trained_accuracy(row: Mapping[str, Any]) -> float:
    """Of the trained method with b_base, the second row of the table; last without a picture."""
    value = list(row["accuracies"].values())[:2][-1]
    return 2.0 if np.isnan(value) else value


def _result_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Header and lines of the closing table, without columns that nothing fills."""
    columns = [
        (key, title)
        for key, title in scoring.columns(rows)
        if any(row[key] is not None for row in rows)
    ]
    return {
        "header": [title for _, title in columns],
        "rows": [
            {
                "name": row["name"],
                "values": [
                    "n/a" if row[key] is None else f"{100 * row[key]:.2f}" for key, _ in columns
                ],
                "parameters": f"{row['parameters']:,}",
                "seconds": f"{row['seconds']:.1f}",
            }
            for row in rows
        ],
    }


def _svgs(
    history: Sequence[Mapping[str, Any]], classes: Sequence[Mapping[str, Any]]
) -> dict[str, Markup]:
    """The figures that this run has, as inline SVG."""
    with matplotlib.rc_context(_STYLE):
        trained = [each for each in classes if each["half"] != "new"]
        drawings = {"per_class": _draw_per_class(trained)}
        if history:
            drawings["curves"] = figures.draw_curves(history)
            drawings["activations"] = figures.draw_activations(history)
        return {
            name: _to_svg(figure, name) for name, figure in drawings.items() if figure is not None
        }


def _draw_per_class(trained: Sequence[Mapping[str, Any]]) -> Figure:
    methods = list(trained[0]["accuracies"])[:2]
    return figures.draw_per_class(
        [each["training"] for each in trained],
        {name: [each["accuracies"][name] for each in trained] for name in methods},
    )


def _to_svg(figure: Figure, name: str) -> Markup:
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    content = io.StringIO()
    # Distinct ids: several drawings share one page.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    drawing = content.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(_INK, "currentColor")
    return Markup(drawing)  # matplotlib escapes the text that it draws


def _confusion(run: Path, half: str) -> dict[str, Any] | None:
    """The confusion matrix of one half and its most frequent confusions."""
    file = run / f"confusion_{half}.csv"
    if not file.is_file():
        return None
    (_, *names), *lines = _read_rows(file)
    try:
        counts = np.array([line[1:] for line in lines], dtype=int)  # [C, C]
    except ValueError as error:
        raise InputError(f"{file}: damaged ({error})") from None
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    wrong = counts * (1 - np.eye(len(counts), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    confusions = [
        {"true": names[i], "predicted": names[j], "count": int(wrong[i, j]), "share": shares[i, j]}
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[i, j]
    ]
    small = len(names) <= MOST_CONFUSION_CELLS_A_SIDE
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


def _examples(experiment: Experiment, wanted: Sequence[str]) -> dict[str, list[Example]]:
    """Test pictures of the classes ``wanted``, in that order, wrong ones first.

    Of each class a few of every kind: who is right, zero-shot or the method.
    """
    zeroshot = ZeroShot(experiment.clip)
    found: dict[str, list[Example]] = {name: [] for name in wanted}
    benchmark = experiment.benchmark
    for names, pictures in (
        (benchmark.base_names, benchmark.test_base),
        (benchmark.new_names, benchmark.test_new),
    ):
        pictures = _some_of_each(pictures, [name in found for name in names])
        if not len(pictures):
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
                found[names[label]].append(
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
    return {name: some for name, some in found.items() if some}


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
    classes = method.prepare(names, experiment.benchmark.template)
    answers = []
    batches = evaluation_batches(
        pictures, experiment.test_transform, experiment.config.machine.test_batch
    )
    for images, _, _ in experiment.on_device(batches):
        answers += method.logits(images, classes).argmax(1).tolist()
    return answers


@torch.no_grad()
def _routes(experiment: Experiment) -> dict[str, Any] | None:
    """Which pool entries a few test pictures retrieve, with their cosines; None without a pool."""
    method = experiment.method
    if not (isinstance(method, Lamp) and method.config.mpp):
        return None
    pictures = experiment.benchmark.test_base
    _, first = np.unique(pictures.labels, return_index=True)
    pictures = pictures.select(first[:MOST_ROUTED])
    batches = evaluation_batches(pictures, experiment.test_transform, MOST_ROUTED)
    images, labels, _ = next(experiment.on_device(batches))
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
