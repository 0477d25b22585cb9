"""A comparison from its flags to its folder: what is compared, table, page and the chosen run."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lamp_fast
from lamp_fast import cli
from lamp_fast.clip.settings import caution
from lamp_fast.clip.towers import ClipIdentity
from lamp_fast.compare import attempt
from lamp_fast.compare.candidates import Candidate, find_candidates, published_settings
from lamp_fast.compare.cost import Budget, Sizes
from lamp_fast.compare.page import build_page
from lamp_fast.compare.results import build_record, flat, text_table, warnings_of
from lamp_fast.compare.search import DEFAULT_TRIALS, EXTRA, resolve_trials
from lamp_fast.compare.settings import CompareConfig, format_duration
from lamp_fast.compare.work import LEFT_OUT, STOPPED, TESTED, Entry, Work
from lamp_fast.data.benchmark import Benchmark
from lamp_fast.data.loading import report_dead_workers
from lamp_fast.errors import InputError
from lamp_fast.fields import to_json
from lamp_fast.files import read_json, write_bytes, write_csv, write_json
from lamp_fast.jobs.here import stoppable
from lamp_fast.jobs.identity import describe_clip
from lamp_fast.jobs.queue import Queue
from lamp_fast.runs.experiment import Checked, check_data, load_benchmark
from lamp_fast.runs.folder import (
    CHECKPOINT,
    LOCK,
    hold_folder,
    is_filled,
    make_folder,
    refuse_nested,
)

BEGUN, CHOSEN = "begun.json", "chosen"
RECORD, TABLE, LINES, PAGE = (
    "comparison.json",
    "table.md",
    "comparison.csv",
    "comparison.html",
)


def compare(config: CompareConfig) -> int:
    """Compare, and leave the table, the page and the chosen run.

    Returns:
        An exit code: 0, or 1 where no method could be tested.

    Raises:
        InputError: what cannot be served; nothing has been written.
    """
    budget = Budget(config.budget)
    refuse_nested(config.out, config.data)
    filled, begun = is_filled(config.out), config.out / BEGUN
    trials = resolve_trials(config.trials)
    if begun.is_file() and config.trials is None:
        trials = read_json(begun)["trials"]
        resolve_trials(trials)
    if filled and not begun.is_file():
        raise InputError(
            f"--out {config.out}: holds something else than a comparison, expected a new folder"
        )
    # Every method has the data and the CLIP of zero-shot; what is wrong with these is no method's.
    with report_dead_workers():
        first = published_settings(config, "zeroshot")
        listed = load_benchmark(first)  # is quick; weights may have to be fetched
        clip, _ = describe_clip(first.clip)
        checked = check_data(first, listed)
    benchmark = checked[0]
    if not len(benchmark.val):
        raise InputError(
            f"--data {benchmark.name}: no validation picture to choose a method by, expected at"
            " least 3 pictures of a class"
        )
    candidates = find_candidates(config)
    asked = {
        "clip": [clip.name, clip.activation, clip.fingerprint, to_json(clip.preprocessing)],
        "data": checked[2],
        "template": benchmark.template,
        "words": None if benchmark.words is None else to_json(benchmark.words),
        "seed": config.seed,
        "trials": trials,
        "epochs": config.epochs,
    }
    with make_folder(config.out), hold_folder(config.out):
        _begin(config.out, asked)
        _describe(config, benchmark, clip, candidates, trials)
        work = Work(
            config.out,
            Queue(config.out, attempt.command),
            candidates,
            Sizes(len(benchmark.train), len(benchmark.val), len(benchmark.test_base)),
            budget,
            trials,
            cli.say,
        )
        try:
            with stoppable():
                entries = work.run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on") from None
        facts = _facts(config, checked, clip, trials)
        record = build_record(entries, benchmark, config.out, facts)
        record["warnings"] = warnings_of(record)
        _keep_chosen(config.out, record, entries)
        _write(config.out, record)
    _tell(config.out, record)
    return 0 if record["chosen"] else 1


def _begin(folder: Path, asked: Mapping[str, Any]) -> None:
    """Write down what the comparison is of, or hold it to what it was begun with.

    Raises:
        InputError: it was begun with something else.
    """
    file = folder / BEGUN
    if not file.is_file():
        write_json(file, asked)
        return
    held = read_json(file)
    for name, value in asked.items():
        if held.get(name) != value:
            shown = f"--{name} {value}" if isinstance(value, int | None) else f"--{name}"
            then = f" ({held.get(name)})" if isinstance(value, int | None) else ""
            raise InputError(
                f"{shown}: the comparison in {folder} was begun with another{then}, and its methods"
                " may be tested already; expected the same or a new --out"
            )


def _describe(
    config: CompareConfig,
    benchmark: Benchmark,
    clip: ClipIdentity,
    candidates: Sequence[Candidate],
    trials: int,
) -> None:
    """The first lines: what is compared, on what."""
    cli.say(
        f"clip    {clip.name}, weights {clip.weights}",
        *(f"data    {line}" for line in benchmark.describe()),
        *(f"note    {line}" for line in _cautions(clip, benchmark)),
        f"methods {len(candidates)}, each tested once, with its settings settled on validation",
        f"search  {trials} further settings of each that trains"
        + ("" if trials or config.trials == 0 else f" (for {DEFAULT_TRIALS}: {EXTRA})"),
        f"budget  {format_duration(config.budget)}",
        f"out     {config.out}",
    )
    counts = [
        f"{name} {sum(benchmark.val.labels == label)}"
        for label, name in enumerate(benchmark.base_names)
    ]
    shown = ", ".join(counts[:MOST_CLASSES])
    more = len(counts) - MOST_CLASSES
    cli.say(f"val     pictures a class: {shown}" + (f", and {more} more" if more > 0 else ""))


# Classes whose validation pictures are counted on the first lines; the page has all.
MOST_CLASSES = 20


def _cautions(clip: ClipIdentity, benchmark: Benchmark) -> list[str]:
    """What a reader must know of the CLIP before its figures."""
    found = caution(clip.name, clip.random, benchmark.name)
    return [] if found is None else [found]


def _facts(
    config: CompareConfig, checked: Checked, clip: ClipIdentity, trials: int
) -> dict[str, Any]:
    benchmark, unreadable, digest = checked
    return {
        "version": lamp_fast.__version__,
        "data": {
            "name": benchmark.name,
            "template": benchmark.template,
            "sha256": digest,
            "unreadable": list(unreadable),
            "lines": benchmark.describe(),
        },
        "clip": to_json(clip),
        "clip_notes": _cautions(clip, benchmark),
        "seed": config.seed,
        "trials": trials,
        "epochs": config.epochs,
        "budget": config.budget,
    }


def _keep_chosen(folder: Path, record: dict[str, Any], entries: Sequence[Entry]) -> None:
    """Copy the chosen run beside the table, without what only training needs."""
    for entry in entries:
        if entry.candidate.method == record["chosen"]:
            run = folder / "jobs" / entry.tested["run"]
            partial, place = folder / f".{CHOSEN}.partial", folder / CHOSEN
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(run, partial, ignore=shutil.ignore_patterns(CHECKPOINT, LOCK))
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
            record["chosen_run"] = CHOSEN


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    write_json(folder / RECORD, record)
    write_csv(folder / LINES, *flat(record))
    write_bytes(folder / TABLE, (_table_page(record) + "\n").encode())
    write_bytes(folder / PAGE, build_page(record).encode())


def _table_page(record: Mapping[str, Any]) -> str:
    notes = [*record["clip_notes"], *record["warnings"], record["statistics"]]
    return "\n\n".join([text_table(record), *not_tested(record), *notes])


def not_tested(record: Mapping[str, Any]) -> list[str]:
    """A line for each method without figures, and why."""
    return [
        f"{row['title']}: {row['state']}, {row['why']}"
        for row in record["rows"]
        if row["state"] != TESTED
    ]


def _tell(folder: Path, record: Mapping[str, Any]) -> None:
    """The table, what it leaves out, and what comes next."""
    cli.say("", *text_table(record).split("\n"), "")
    cli.say(*not_tested(record))
    cli.say(*(f"warning {line}" for line in record["warnings"]))
    cli.say(*(f"note    {line}" for line in record["clip_notes"]))
    if record["chosen"] is None:
        cli.say("error: no method could be tested", stream=sys.stderr)
        return
    run = folder / CHOSEN
    open_ones = sum(row["state"] in (LEFT_OUT, STOPPED) for row in record["rows"])
    cli.say(
        f"chosen  {record['chosen_title']}, by the validation pictures alone: {run}",
        f"page    {folder / PAGE}",
        f"next    python -m lamp_fast.predict {run} PICTURES",
    )
    if open_ones:
        cli.say(f"more    the same command with a larger --budget goes on with {open_ones} methods")
