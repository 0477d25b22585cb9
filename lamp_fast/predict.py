"""``python -m lamp_fast.predict RUN FILE|FOLDER|CSV ...``: classify pictures with a trained run.

RUN is a run folder or what save_pretrained wrote; the training pictures need not exist any more.
The exit code is 1 where pictures could not be read: they are reported and left out. So are files
and folders in a given folder that look like pictures and are not read (.heic, ...).
"""

import csv
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from lamp_fast import cli
from lamp_fast.classifier import Classifier, Prediction
from lamp_fast.data.sources.files import LeftOut
from lamp_fast.data.sources.given import list_pictures
from lamp_fast.data.views import TTE, Tte
from lamp_fast.errors import InputError, printable
from lamp_fast.files import refuse_output, write_csv, write_json
from lamp_fast.runs.folder import CONFIG, LEARNED, RESULT, WEIGHTS

# In place of a file: standard output.
STDOUT = Path("-")


@dataclass(frozen=True)
class PredictConfig:
    """Classify pictures with a trained run."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder, or a folder that save_pretrained wrote."""
    sources: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, folders of pictures (at any depth), or .csv files with a column of paths, which
    start from the file's own folder."""
    classes: str = "trained"
    """trained, all (trained and the run's new classes), or NAME,NAME,... (a name with a comma goes
    in double quotes)."""
    add: str | None = None
    """NAME,NAME,...: classes besides those of --classes."""
    top: int = 5
    """How many classes a picture."""
    csv: Path | None = None
    """Write a line a picture and class to this file; - is standard output."""
    json: Path | None = None
    """Write everything as JSON to this file; - is standard output."""
    path_column: str = "path"
    """The column of paths in .csv files."""
    batch: int | None = None
    """Pictures at once; by default the run's --test-batch."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    pretrained: Path | None = None
    """The file with the CLIP's weights, where it is not where the run found it."""
    tte: Tte = "as-trained"
    """on: the mean of the logits of five crops answers; off: one view's; by default as the run
    tests."""


def main(config: PredictConfig) -> int:
    """Classify every picture; print or write the result."""
    _check_outputs(config, config.sources)
    left_out = LeftOut(skip_unreadable=True)
    files = [
        file
        for source in config.sources
        for file in list_pictures(source, config.path_column, left_out)
    ]
    _check_outputs(config, files)
    if not files:
        raise InputError("FILE|FOLDER|CSV: missing, expected at least one picture")
    classifier = Classifier.load(
        config.run, device=config.device, pretrained=config.pretrained, tte=TTE[config.tte]
    )
    names = choose_classes(classifier, config)
    outcomes = classifier.classify_each(files, names, top=config.top, batch=config.batch)
    bias = classifier.bias_for(names)
    trained = classifier.are_trained(names)
    _tell(_about_classes(names, trained))
    _tell(f"bias    {bias}")
    for line in left_out.lines():
        _tell(line)
    plain = config.csv is None and config.json is None
    predictions: list[tuple[Path, Prediction]] = []
    unreadable: list[tuple[Path, str]] = []
    bar = tqdm(files, desc="predicting", leave=False, disable=True if plain else None)
    for file, outcome in zip(bar, outcomes, strict=True):
        if isinstance(outcome, InputError):
            unreadable.append((file, str(outcome)))
            _tell(f"skipped {' '.join(str(outcome).split())}")
            continue
        predictions.append((file, outcome))
        if plain:
            cli.say(_line(file, outcome))
    if config.csv is not None:
        _write_csv(config.csv, predictions)
    if config.json is not None:
        about = {
            "run": _text(config.run),
            "template": classifier.template,
            "bias": bias,
            "classes": [
                {"name": name, "trained": known} for name, known in zip(names, trained, strict=True)
            ],
        }
        about["left_out"] = left_out.lines()
        _write_json(config.json, about, predictions, unreadable)
    if unreadable:
        _tell(f"skipped {len(unreadable)} of {len(files)} pictures that could not be read")
    return 1 if unreadable or left_out.looks_like_pictures else 0


def choose_classes(classifier: Classifier, config: PredictConfig) -> tuple[str, ...]:
    """The class names that ``--classes`` and ``--add`` mean.

    Raises:
        InputError: ``--classes all`` of nothing more, empty names, or a name that is there twice.
    """
    trained, new = classifier.trained_names, classifier.new_names
    chosen = {"trained": trained, "all": trained + new}.get(config.classes)
    if chosen is None:
        chosen = _names("--classes", config.classes)
    return chosen + (() if config.add is None else _names("--add", config.add))


def _names(flag: str, text: str) -> tuple[str, ...]:
    rows = list(csv.reader([text], skipinitialspace=True))
    names = tuple(name.strip() for name in rows[0]) if rows else ()
    if not names or not all(names):
        raise InputError(f"{flag} {text!r}: expected NAME,NAME,...")
    return names


def _check_outputs(config: PredictConfig, inputs: Sequence[Path]) -> None:
    """Refuse before any work what could not be written after it, or is read for it."""
    outputs = [("--csv", config.csv), ("--json", config.json)]
    of_the_run = [config.run / name for name in (CONFIG, LEARNED, WEIGHTS, RESULT)]
    for flag, file in outputs:
        if file is None or file == STDOUT:
            continue
        refuse_output(flag, file, [*inputs, *of_the_run])
        if file.exists() and not file.is_file():
            continue
        folder = file.resolve().parent
        if not folder.is_dir():
            raise InputError(f"{flag} {file}: expected a file in a folder that exists")
        if not os.access(folder, os.W_OK):
            raise InputError(f"{flag} {file}: cannot be written, expected a folder that can")
    if config.csv is None or config.json is None:
        return
    standard = STDOUT in (config.csv, config.json)
    if config.csv == config.json or (not standard and _same(config.csv, config.json)):
        raise InputError(f"--json {config.json}: --csv writes there too")


def _same(file: Path, other: Path) -> bool:
    """Whether two names lead to one regular file, there or to come."""
    if not (file.exists() and other.exists()):
        return file.resolve() == other.resolve()
    return file.is_file() and file.samefile(other)


def _about_classes(names: Sequence[str], trained: Sequence[bool]) -> str:
    new = [name for name, known in zip(names, trained, strict=True) if not known]
    told = f"classes {len(names) - len(new)} trained, {len(new)} not"
    if new:
        shown = ", ".join(" ".join(name.split()) for name in new[:20])
        told += f" ({shown}{', ...' if len(new) > 20 else ''})"
    return told


def _line(file: Path, prediction: Prediction) -> str:
    classes = zip(prediction.names, prediction.probabilities, prediction.trained, strict=True)
    told = (
        f"{name} {100 * probability:.2f}%{'' if trained else ' (not trained)'}"
        for name, probability, trained in classes
    )
    return f"{_text(file)}: {', '.join(told)}"


def _write_csv(file: Path, predictions: Sequence[tuple[Path, Prediction]]) -> None:
    # On a terminal a name is for people, in a file or a pipe for programs.
    text = printable if file == STDOUT and sys.stdout.isatty() else str
    header = ["file", "rank", "class", "probability", "trained"]
    rows: list[list[Any]] = [
        [text(_text(picture)), rank, text(name), f"{probability:.6g}", str(trained).lower()]
        for picture, each in predictions
        for rank, (name, probability, trained) in enumerate(
            zip(each.names, each.probabilities, each.trained, strict=True), start=1
        )
    ]
    if file == STDOUT:
        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *rows])
    else:
        write_csv(file, header, rows)


def _write_json(
    file: Path,
    about: dict[str, Any],
    predictions: Sequence[tuple[Path, Prediction]],
    unreadable: Sequence[tuple[Path, str]],
) -> None:
    pictures = [
        {
            "file": _text(picture),
            "predictions": [
                {"class": name, "probability": probability, "trained": trained}
                for name, probability, trained in zip(
                    each.names, each.probabilities, each.trained, strict=True
                )
            ],
        }
        for picture, each in predictions
    ]
    left_out = [{"file": _text(picture), "reason": reason} for picture, reason in unreadable]
    everything = {**about, "pictures": pictures, "unreadable": left_out}
    if file == STDOUT:
        print(json.dumps(everything, indent=2))
    else:
        write_json(file, everything)


def _text(path: Path) -> str:
    """A path as text, also where its bytes are no UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _tell(line: str) -> None:
    # Standard output is the result's alone.
    cli.say(line, stream=sys.stderr)


if __name__ == "__main__":
    cli.run(
        PredictConfig, main, sys.argv[1:], prog="python -m lamp_fast.predict", description=__doc__
    )
