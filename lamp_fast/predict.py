"""``python -m lamp_fast.predict RUN FILE|FOLDER|LIST|TABLE ...``: classify pictures with a run.

RUN is a run folder or what save_pretrained wrote; the training pictures need not exist any more.
Rows are written as they come. A call that was stopped leaves FILE.partial, and the same call goes
on from there; FILE itself is whole or not there.

The exit code is 1 where pictures could not be read: they are reported and left out. So are files
and folders in a given folder that look like pictures and are not read (.heic, ...).
"""

import csv
import hashlib
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tqdm import tqdm

import lamp_fast
from lamp_fast import cli
from lamp_fast.answers.asked import Asked, Score
from lamp_fast.answers.prediction import Columns, csv_text
from lamp_fast.data.hierarchy import CLASS
from lamp_fast.data.settings import TTE, Tte
from lamp_fast.errors import InputError, printable
from lamp_fast.fields import TextOrNone, to_json
from lamp_fast.files import path_text, refuse_output, same_file
from lamp_fast.runs.folder import ANSWERS, CONFIG, LEARNED, RESULT, WEIGHTS
from lamp_fast.runs.growing import STDOUT, GrowingFiles, Output, as_document
from lamp_fast.runs.launch import Part, launched

if TYPE_CHECKING:
    from lamp_fast.classifier import Classifier, Picture, Prediction
    from lamp_fast.data.sources.files import LeftOut
    from lamp_fast.data.sources.given import Inputs
    from lamp_fast.runs.prior import Wanted


@dataclass(frozen=True)
class PredictConfig:
    """Classify pictures with a trained run."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, or a folder that save_pretrained wrote."""
    sources: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, folders of pictures (at any depth), .txt lists of a path a line, .csv and .parquet
    tables with a column of paths, which start from the file's own folder (a .parquet table may hold
    the pictures themselves), WebDataset shards (train-{0000..0099}.tar, or a folder with
    nshards.txt), or hf:NAME:SPLIT, a Hugging Face dataset (its name on the hub, or a folder)."""
    classes: str = "trained"
    """trained, all (trained and the run's new classes), or NAME,NAME,... (a name with a comma goes
    in double quotes)."""
    add: str | None = None
    """NAME,NAME,...: classes besides those of --classes."""
    prior: TextOrNone = None
    """Correct the scores to these shares of classes among the pictures, whatever training's were:
    uniform, every class alike; train, those of the training pictures; or a JSON file
    {"cat": 0.9, "dog": 0.1} of every class that is asked for. none leaves scores as they are."""
    level: str | None = None
    """Answer at this level above the classes (genus, family, ...), as the run's --hierarchy names
    it: a probability is the sum over the classes below."""
    hierarchy: Path | None = None
    """As in training: the levels of a run that was trained without, or others."""
    top: int = 5
    """How many classes a picture."""
    csv: Path | None = None
    """Write a line a picture and class to this file; - is standard output."""
    jsonl: Path | None = None
    """Write a JSON object a picture and line to this file; - is standard output."""
    json: Path | None = None
    """Write everything as one JSON object to this file; - is standard output."""
    out: Path | None = None
    """A folder for one file a process of torchrun, or a --part: part-1-of-8.csv, ..."""
    out_format: Literal["csv", "jsonl"] = "csv"
    """Of the files in --out."""
    part: str | None = None
    """I/N: classify every N-th batch, from the I-th (I is 1..N), as process I of N would."""
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
    reject: str | None = None
    """RATE|SCORE: answer "none of these" where the answer's score is too low. 5%: below what 5% of
    the run's validation pictures score; a number: below that score."""
    reject_by: Score | None = None
    """Which score: the largest probability (by default), the largest cosine, or the energy."""
    coverage: float | None = None
    """Also give, of each picture, the set of names that holds the right one this often, as 0.9;
    it takes a run with validation pictures, and its trained classes."""


def main(config: PredictConfig) -> int:
    """Classify every picture; print or write the result."""
    part = choose_part(config)
    asked = Asked(config.reject, config.reject_by, config.coverage)
    outputs = _files(config, part)
    _check_outputs(config, outputs, lambda: config.sources)
    from lamp_fast.classifier import Classifier
    from lamp_fast.data.sources.files import LeftOut
    from lamp_fast.data.sources.given import Inputs
    from lamp_fast.runs.prior import read_prior
    from lamp_fast.runs.ranks import own_device

    left_out = LeftOut(skip_unreadable=True)
    inputs = Inputs(config.sources, config.path_column, left_out)
    total, digest = inputs.check()
    _check_outputs(config, outputs, inputs.files)
    if total == 0:
        raise InputError("FILE|FOLDER|LIST|TABLE: missing, expected at least one picture")
    prior = read_prior(config.prior)
    device = own_device(config.device)
    classifier = Classifier.load(
        config.run,
        device=device,
        pretrained=config.pretrained,
        tte=TTE[config.tte],
        hierarchy=config.hierarchy,
    )
    names = choose_classes(classifier, config)
    batch = classifier.config.machine.test_batch if config.batch is None else config.batch
    names = classifier.check_names(names)
    answering = classifier.answering(names, asked, prior, config.level)
    about = _about(config, classifier, names, prior, left_out) | answering.about
    call = {"inputs": digest, **_settings(config, classifier, batch, about), "--part": str(part)}
    columns = Columns(
        level=about["level"],
        rejects=asked.reject is not None,
        sets=asked.coverage is not None,
    )
    files = GrowingFiles(
        [_output(each, about, columns) for each in outputs],
        {**call, **{each.flag: path_text(each.file) for each in outputs}},
        recorded=config.out is not None,
    )
    ahead = _Ahead(inputs, files, part, batch)
    outcomes = classifier.classify_each(
        ahead,
        names,
        top=config.top,
        batch=batch,
        prior=prior,
        level=config.level,
        reject=asked.reject,
        reject_by=asked.by,
        coverage=asked.coverage,
    )
    if part.index == 0 or not launched():
        _tell(_about_classes(names, classifier.are_trained(names)))
        _tell(f"bias    {about['bias']}")
        if (words := classifier.origin.words) is not None:
            _tell(f"words   {words.describe(names)}")
        if config.prior is not None:
            _tell(f"prior   {config.prior}")
        if config.level is not None:
            _tell(f"level   {config.level}: probabilities are sums over classes")
        for line in answering.lines:
            _tell(line)
        for line in left_out.lines():
            _tell(line)
    if config.out is not None:
        config.out.mkdir(exist_ok=True)
    with files:
        if files.complete:
            _tell(f"done    {outputs[0].file}: {files.done:,} pictures")
        else:
            if files.done:
                _tell(f"goes on after {files.done:,} pictures")
            own = None if total is None else part.size(total, batch)
            _classify(files, outputs, columns, ahead, outcomes, own)
            if part.count == 1 and not files.done:
                raise InputError(f"{config.sources[0]}: holds no pictures")
            files.finish()
    if files.unreadable:
        _tell(f"skipped {files.unreadable} of {files.done} pictures that could not be read")
    # torchrun would stop the other processes of one that ends with 1.
    return int(bool(files.unreadable or left_out.looks_like_pictures) and not launched())


def choose_part(config: PredictConfig) -> Part:
    """What of the pictures is this process's, by torchrun or ``--part``.

    Raises:
        InputError: no part, or outputs that several processes would write.
    """
    others = [f"--{each}" for each in ("csv", "jsonl", "json") if getattr(config, each) is not None]
    if config.out is not None and others:
        raise InputError(f"{others[0]}: expected it or --out, not both")
    if not launched():
        if config.part is None:
            return Part()
        found = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", config.part, re.ASCII)
        if found is None or int(found[1]) > int(found[2]):
            raise InputError(f"--part {config.part}: expected I/N, I in 1..N")
        return Part(int(found[1]) - 1, int(found[2]))
    if config.part is not None:
        raise InputError(f"--part {config.part}: expected it or torchrun, which says it, not both")
    if config.out is None:
        raise InputError("--out: missing, expected a folder for the files of torchrun's processes")
    return Part(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


class _Ahead:
    """The pictures that are still to be classified; threads read some of them before their turn.

    Attributes:
        names: of those that were asked for and have no answer yet.
    """

    def __init__(self, inputs: "Inputs", files: GrowingFiles, part: Part, batch: int) -> None:
        self._inputs, self._files = inputs, files
        self._part, self.batch = part, batch
        self.names: deque[Path] = deque()

    def __iter__(self) -> "Iterator[Picture | InputError]":
        own = self._part.of(self._inputs, self.batch)
        for given in islice(own, self._files.done, None):
            self.names.append(given.name)
            yield given.picture


def _classify(
    files: GrowingFiles,
    outputs: Sequence["_File"],
    columns: Columns,
    ahead: _Ahead,
    outcomes: "Iterator[Prediction | InputError]",
    total: int | None,
) -> None:
    """Write what becomes of each picture, and mark every whole batch."""
    texts = [_text_of(each, columns) for each in outputs]
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
                cli.say(columns.line(name, outcome))
            files.write([text(name, outcome) for text in texts])
            if done % ahead.batch == 0:
                files.mark(done, unreadable)
    except KeyboardInterrupt:
        if files.continues and files.done:
            told = f"interrupted after {files.done:,} pictures; the same call goes on"
            raise KeyboardInterrupt(told) from None
        raise
    files.mark(done, unreadable)


def _about(
    config: PredictConfig,
    classifier: "Classifier",
    names: Sequence[str],
    prior: "Wanted | None",
    left_out: "LeftOut",
) -> dict[str, Any]:
    """What a document tells beside its pictures."""
    about: dict[str, Any] = {
        "run": path_text(config.run),
        "template": classifier.template,
        "bias": classifier.bias_for(names),
        "level": config.level or CLASS,
        "classes": [
            {"name": name, "trained": known}
            for name, known in zip(names, classifier.are_trained(names), strict=True)
        ],
    }
    if prior is not None:
        about["prior"] = prior
    if (words := classifier.origin.words) is not None:
        about["words"] = to_json(words)
    return {**about, "left_out": left_out.lines()}


def _settings(
    config: PredictConfig, classifier: "Classifier", batch: int, about: dict[str, Any]
) -> dict[str, Any]:
    """What must be the same where a call is continued, beside the pictures."""
    digest = hashlib.sha256()
    for file in (config.run / name for name in (CONFIG, LEARNED, WEIGHTS, ANSWERS)):
        digest.update(file.read_bytes() if file.is_file() else b"")
    machine = classifier.config.machine
    return {
        "run": digest.hexdigest(),
        "classes": about["classes"],
        "prior": about.get("prior"),
        "--reject": config.reject,
        "--reject-by": config.reject_by,
        "--coverage": config.coverage,
        "--level": config.level,
        "hierarchy": None if config.level is None else to_json(classifier.hierarchy),
        "--top": config.top,
        "--batch": batch,
        "--tte": classifier.config.views.tte,
        "--device": machine.device,
        "--precision": machine.precision,
        "version": lamp_fast.__version__,
    }


def choose_classes(classifier: "Classifier", config: PredictConfig) -> tuple[str, ...]:
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


@dataclass(frozen=True)
class _File:
    """An output: the flag that named it, its kind (csv, jsonl or json) and where it lies."""

    flag: str
    kind: str
    file: Path


def _files(config: PredictConfig, part: Part) -> list[_File]:
    if config.out is not None:
        width = len(str(part.count))
        name = f"part-{part.index + 1:0{width}}-of-{part.count}.{config.out_format}"
        return [_File("--out", config.out_format, config.out / name)]
    named = {"csv": config.csv, "jsonl": config.jsonl, "json": config.json}
    return [_File(f"--{kind}", kind, file) for kind, file in named.items() if file is not None]


def _check_outputs(
    config: PredictConfig, outputs: Sequence[_File], inputs: Callable[[], Iterable[Path]]
) -> None:
    """Refuse before any work what could not be written after it, or is read for it."""
    if config.out is not None and config.out.exists() and not config.out.is_dir():
        raise InputError(f"--out {config.out}: is a file, expected a folder")
    if config.out is not None:
        _, of, count = outputs[0].file.stem.rpartition("-of-")
        for other in config.out.glob("part-*-of-*"):
            if not other.name.partition(of)[2].startswith(f"{count}."):
                raise InputError(f"--out {config.out}: has {other.name}, expected parts of {count}")
    of_the_run = [config.run / name for name in (CONFIG, LEARNED, WEIGHTS, RESULT, ANSWERS)]
    for each in outputs:
        flag, file = each.flag, each.file
        if file == STDOUT:
            continue
        refuse_output(flag, file, chain(inputs(), of_the_run))
        if file.exists() and not file.is_file():
            continue
        # A folder of parts is made when the first of them is written.
        made = config.out is not None and not config.out.exists()
        folder = (config.out if made else file).resolve().parent
        if not folder.is_dir():
            raise InputError(f"{flag} {file}: expected a file in a folder that exists")
        if not os.access(folder, os.W_OK):
            raise InputError(f"{flag} {file}: cannot be written, expected a folder that can")
    for one, other in combinations(outputs, 2):
        standard = STDOUT in (one.file, other.file)
        if one.file == other.file or (not standard and same_file(one.file, other.file)):
            raise InputError(f"{other.flag} {other.file}: {one.flag} writes there too")


def _about_classes(names: Sequence[str], trained: Sequence[bool]) -> str:
    new = [name for name, known in zip(names, trained, strict=True) if not known]
    told = f"classes {len(names) - len(new)} trained, {len(new)} not"
    if new:
        shown = ", ".join(" ".join(name.split()) for name in new[:20])
        told += f" ({shown}{', ...' if len(new) > 20 else ''})"
    return told


def _output(each: _File, about: dict[str, Any], columns: Columns) -> Output:
    header = csv_text([columns.header]) if each.kind == "csv" else ""
    finish = as_document(about) if each.kind == "json" else None
    return Output(each.flag, each.file, header, finish)


def _text_of(each: _File, columns: Columns) -> "Callable[[Path, Prediction | InputError], str]":
    """What makes the text of a picture's rows."""
    if each.kind != "csv":
        return columns.json_line
    # On a terminal a name is for people, in a file or a pipe for programs.
    shown = printable if each.file == STDOUT and sys.stdout.isatty() else str
    return partial(columns.csv_rows, shown)


def _tell(line: str) -> None:
    # Standard output is the result's alone.
    cli.say(line, stream=sys.stderr)


if __name__ == "__main__":
    cli.run(
        PredictConfig, main, sys.argv[1:], prog="python -m lamp_fast.predict", description=__doc__
    )
