"""``python -m lamp_fast.predict RUN FILE|FOLDER|LIST|TABLE ...``: classify pictures with a run.

RUN is a run folder or what save_pretrained wrote; the training pictures need not exist any more.
Rows are written as they come. A call that was stopped leaves FILE.partial, and the same call goes
on from there; FILE itself is whole or not there.

The exit code is 1 where pictures could not be read: they are reported and left out. So are files
and folders in a given folder that look like pictures and are not read (.heic, ...).
"""

import csv
import hashlib
import io
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

import lamp_fast
from lamp_fast import cli
from lamp_fast.classifier import Classifier, Picture, Prediction
from lamp_fast.data.sources.files import LeftOut
from lamp_fast.data.sources.given import Inputs
from lamp_fast.data.views import TTE, Tte
from lamp_fast.errors import InputError, printable
from lamp_fast.fields import TextOrNone
from lamp_fast.files import refuse_output
from lamp_fast.runs.folder import CONFIG, LEARNED, RESULT, WEIGHTS
from lamp_fast.runs.growing import STDOUT, GrowingFiles, Output, as_document
from lamp_fast.runs.prior import Wanted, read_prior

CSV_HEADER = ("file", "rank", "class", "probability", "trained")


@dataclass(frozen=True)
class PredictConfig:
    """Classify pictures with a trained run."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder, or a folder that save_pretrained wrote."""
    sources: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, folders of pictures (at any depth), .txt lists of a path a line, or .csv and
    .parquet tables with a column of paths, which start from the file's own folder; a .parquet table
    may hold the pictures themselves."""
    classes: str = "trained"
    """trained, all (trained and the run's new classes), or NAME,NAME,... (a name with a comma goes
    in double quotes)."""
    add: str | None = None
    """NAME,NAME,...: classes besides those of --classes."""
    prior: TextOrNone = None
    """Correct the scores to these shares of classes among the pictures, whatever training's were:
    uniform, every class alike; train, those of the training pictures; or a JSON file
    {"cat": 0.9, "dog": 0.1} of every class that is asked for. none leaves scores as they are."""
    top: int = 5
    """How many classes a picture."""
    csv: Path | None = None
    """Write a line a picture and class to this file; - is standard output."""
    jsonl: Path | None = None
    """Write a JSON object a picture and line to this file; - is standard output."""
    json: Path | None = None
    """Write everything as one JSON object to this file; - is standard output."""
    path_column: str = "path"
    """The column of paths in tables, or of the pictures themselves."""
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
    outputs = _files(config)
    _check_outputs(config, outputs, lambda: config.sources)
    left_out = LeftOut(skip_unreadable=True)
    inputs = Inputs(config.sources, config.path_column, left_out)
    total, digest = inputs.check()
    _check_outputs(config, outputs, inputs.files)
    if total == 0:
        raise InputError("FILE|FOLDER|LIST|TABLE: missing, expected at least one picture")
    prior = read_prior(config.prior)
    classifier = Classifier.load(
        config.run, device=config.device, pretrained=config.pretrained, tte=TTE[config.tte]
    )
    names = choose_classes(classifier, config)
    batch = classifier.config.machine.test_batch if config.batch is None else config.batch
    about = _about(config, classifier, names, prior, left_out)
    files = GrowingFiles(
        [_output(flag, file, about) for flag, file in outputs.items()],
        {"inputs": digest, **_settings(config, classifier, batch, about)},
    )
    ahead = _Ahead(inputs, files)
    outcomes = classifier.classify_each(ahead, names, top=config.top, batch=batch, prior=prior)
    _tell(_about_classes(names, classifier.are_trained(names)))
    _tell(f"bias    {about['bias']}")
    if config.prior is not None:
        _tell(f"prior   {config.prior}")
    for line in left_out.lines():
        _tell(line)
    with files:
        if files.done:
            _tell(f"goes on after {files.done:,} pictures")
        _classify(files, list(outputs.items()), ahead, outcomes, batch, total)
        files.finish()
    if files.unreadable:
        _tell(f"skipped {files.unreadable} of {files.done} pictures that could not be read")
    return 1 if files.unreadable or left_out.looks_like_pictures else 0


class _Ahead:
    """The pictures that are still to be classified; threads read some of them before their turn.

    Attributes:
        names: of those that were asked for and have no answer yet.
    """

    def __init__(self, inputs: Inputs, files: GrowingFiles) -> None:
        self._inputs, self._files = inputs, files
        self.names: deque[Path] = deque()

    def __iter__(self) -> Iterator[Picture | InputError]:
        for given in islice(self._inputs, self._files.done, None):
            self.names.append(given.name)
            yield given.picture


def _classify(
    files: GrowingFiles,
    outputs: Sequence[tuple[str, Path]],
    ahead: _Ahead,
    outcomes: Iterator[Prediction | InputError],
    batch: int,
    total: int | None,
) -> None:
    """Write what becomes of each picture, and mark every whole batch."""
    texts = [_text_of(flag, file) for flag, file in outputs]
    done, unreadable = files.done, files.unreadable
    bar = tqdm(
        outcomes,
        desc="predicting",
        leave=False,
        disable=None if outputs else True,
        total=total,
        initial=done,
    )
    try:
        for outcome in bar:
            done += 1
            name = ahead.names.popleft()
            if isinstance(outcome, InputError):
                unreadable += 1
                _tell(f"skipped {' '.join(str(outcome).split())}")
            elif not outputs:
                cli.say(_line(name, outcome))
            files.write([text(name, outcome) for text in texts])
            if done % batch == 0:
                files.mark(done, unreadable)
    except KeyboardInterrupt:
        if files.continues and files.done:
            told = f"interrupted after {files.done:,} pictures; the same call goes on"
            raise KeyboardInterrupt(told) from None
        raise
    files.mark(done, unreadable)


def _about(
    config: PredictConfig,
    classifier: Classifier,
    names: Sequence[str],
    prior: Wanted | None,
    left_out: LeftOut,
) -> dict[str, Any]:
    """What a document tells beside its pictures."""
    about: dict[str, Any] = {
        "run": _text(config.run),
        "template": classifier.template,
        "bias": classifier.bias_for(names),
        "classes": [
            {"name": name, "trained": known}
            for name, known in zip(names, classifier.are_trained(names), strict=True)
        ],
    }
    if prior is not None:
        about["prior"] = prior
    return {**about, "left_out": left_out.lines()}


def _settings(
    config: PredictConfig, classifier: Classifier, batch: int, about: dict[str, Any]
) -> dict[str, Any]:
    """What must be the same where a call is continued, beside the pictures."""
    digest = hashlib.sha256()
    for file in (config.run / name for name in (CONFIG, LEARNED, WEIGHTS)):
        digest.update(file.read_bytes() if file.is_file() else b"")
    machine = classifier.config.machine
    return {
        "run": digest.hexdigest(),
        "classes": about["classes"],
        "prior": about.get("prior"),
        "--top": config.top,
        "--batch": batch,
        "--tte": classifier.config.views.tte,
        "--device": machine.device,
        "--precision": machine.precision,
        **{flag: _text(file) for flag, file in _files(config).items()},
        "version": lamp_fast.__version__,
    }


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


def _files(config: PredictConfig) -> dict[str, Path]:
    """The files that are asked for, by their flags."""
    named = {"--csv": config.csv, "--jsonl": config.jsonl, "--json": config.json}
    return {flag: file for flag, file in named.items() if file is not None}


def _check_outputs(
    config: PredictConfig, outputs: Mapping[str, Path], inputs: Callable[[], Iterable[Path]]
) -> None:
    """Refuse before any work what could not be written after it, or is read for it."""
    of_the_run = [config.run / name for name in (CONFIG, LEARNED, WEIGHTS, RESULT)]
    for flag, file in outputs.items():
        if file == STDOUT:
            continue
        refuse_output(flag, file, chain(inputs(), of_the_run))
        if file.exists() and not file.is_file():
            continue
        folder = file.resolve().parent
        if not folder.is_dir():
            raise InputError(f"{flag} {file}: expected a file in a folder that exists")
        if not os.access(folder, os.W_OK):
            raise InputError(f"{flag} {file}: cannot be written, expected a folder that can")
    for (flag, file), (other, there) in combinations(outputs.items(), 2):
        standard = STDOUT in (file, there)
        if file == there or (not standard and _same(file, there)):
            raise InputError(f"{other} {there}: {flag} writes there too")


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


def _output(flag: str, file: Path, about: dict[str, Any]) -> Output:
    if flag == "--csv":
        return Output(flag, file, header=_csv_text([CSV_HEADER]))
    return Output(flag, file, finish=as_document(about) if flag == "--json" else None)


def _text_of(flag: str, file: Path) -> Callable[[Path, Prediction | InputError], str]:
    """What makes the text of a picture's rows."""
    if flag != "--csv":
        return _json_line
    # On a terminal a name is for people, in a file or a pipe for programs.
    return partial(_csv_rows, printable if file == STDOUT and sys.stdout.isatty() else str)


def _csv_rows(shown: Callable[[str], str], picture: Path, outcome: Prediction | InputError) -> str:
    if isinstance(outcome, InputError):
        return ""
    classes = zip(outcome.names, outcome.probabilities, outcome.trained, strict=True)
    return _csv_text(
        [shown(_text(picture)), rank, shown(name), f"{probability:.6g}", str(trained).lower()]
        for rank, (name, probability, trained) in enumerate(classes, start=1)
    )


def _csv_text(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _json_line(picture: Path, outcome: Prediction | InputError) -> str:
    found: dict[str, Any] = {"file": _text(picture)}
    if isinstance(outcome, InputError):
        found["reason"] = str(outcome)
    else:
        found["predictions"] = [
            {"class": name, "probability": probability, "trained": trained}
            for name, probability, trained in zip(
                outcome.names, outcome.probabilities, outcome.trained, strict=True
            )
        ]
    return json.dumps(found) + "\n"


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
