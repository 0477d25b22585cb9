"""A table or figure of the paper from its jobs: planned, done where they are not, written."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lamp_fast.clip.settings import RANDOM, caution
from lamp_fast.errors import InputError
from lamp_fast.files import read_json
from lamp_fast.jobs.cluster import run_on_cluster
from lamp_fast.jobs.here import local_slots, stoppable
from lamp_fast.jobs.queue import Failure, Queue, Task
from lamp_fast.reproduce import attempt
from lamp_fast.reproduce.jobs import Identities, Job
from lamp_fast.reproduce.layout import TRANSDUCTIVE, ZEROSHOT
from lamp_fast.reproduce.paper import origin
from lamp_fast.reproduce.plan import Plan, make_plan
from lamp_fast.reproduce.render import Drawn, Rendered, write_table
from lamp_fast.reproduce.results import compare, default_pairs, read_cells
from lamp_fast.reproduce.settings import ReproduceConfig
from lamp_fast.runs.config import uses_validation

TABLES_FOLDER = "tables"


def reproduce(config: ReproduceConfig, flags: Sequence[str]) -> int:
    """Do the jobs that are not done, then write the table."""
    plan = make_plan(config, flags)
    pairs = _pairs(plan, config.compare)
    identities = Identities(_codes_of(config.code_of))
    tasks = {job: identities.task(job) for job in dict.fromkeys(plan.every_job())}
    distinct = list({task.address: task for task in tasks.values()}.values())
    queue = Queue(config.out, attempt.command)
    print(*describe(plan, queue, distinct), sep="\n", flush=True)
    if config.plan:
        for task in distinct:
            state = "done" if queue.outcome(task.address) else "to do"
            print(f"{state:6} {queue.job_folder(task.address)}  {task.title}")
        return 0
    with stoppable():
        failures = work(config, queue, distinct)
    outcomes = {task.address: queue.outcome(task.address) for task in distinct}
    outcome_of = {job: outcomes[task.address] for job, task in tasks.items()}
    cells = read_cells(plan, outcome_of.get)
    tests = {pair: compare(plan, cells, *pair) for pair in pairs}
    remarks = remarks_on(plan, [each for each in outcomes.values() if each], outcome_of)
    drawn = drawn_pictures(plan, outcome_of)
    codes = {row.method: identities.code(row.method) for row in plan.table.rows}
    rendered = Rendered(plan, cells, tests, remarks, drawn, codes)
    for file in write_table(rendered, config.out / TABLES_FOLDER):
        print(f"wrote   {file}")
    for failure in failures:
        print(f"failed  {failure.task.title}: {failure.reason}", file=sys.stderr)
        if failure.log is not None:
            print(f"        {failure.log}", file=sys.stderr)
    return 1 if failures else 0


def work(config: ReproduceConfig, queue: Queue, tasks: Sequence[Task]) -> list[Failure]:
    """Do the jobs, here or on a cluster."""
    if config.engine == "submitit":
        return run_on_cluster(
            queue,
            tasks,
            workers=config.workers,
            cluster=config.cluster,
            parameters=config.submit,
        )
    return queue.run(tasks, local_slots(config.workers))


def describe(plan: Plan, queue: Queue, tasks: Sequence[Task]) -> list[str]:
    """What will be done."""
    table = plan.table
    done = sum(queue.outcome(task.address) is not None for task in tasks)
    lines = [
        f"table   {table.name}: {table.caption}",
        f"preset  {table.preset} for LAMP; other methods as they were published",
        f"size    {len(table.rows)} rows, {len(table.columns)} columns,"
        f" {', '.join(panel.title for panel in table.panels)},"
        f" seeds {' '.join(map(str, plan.seeds))}: {len(tasks)} jobs, {done} done",
        f"queue   {queue.folder}",
    ]
    return lines + [f"note    {remark}" for remark in plan.remarks]


def remarks_on(
    plan: Plan, outcomes: Sequence[Mapping[str, Any]], outcome_of: Mapping[Job, Any]
) -> list[str]:
    """What a reader must know; first whether the paper's figures can be compared with."""
    remarks = []
    of_paper = plan.clip.clip.startswith("ViT-B-16") and plan.clip.pretrained == "openai"
    if not of_paper:
        weights = plan.clip.pretrained or "its own weights"
        theirs = origin(plan.table.name)
        remarks.append(
            f"**Not comparable with {theirs.name}.** The figures beside ours are of {theirs.clip};"
            f" these runs used the CLIP {plan.clip.clip} with {weights}. Those figures show the"
            " layout alone."
        )
    random = plan.clip.pretrained == RANDOM
    shown = {column.target or column.data for column in plan.table.columns}
    remarks += sorted({caution(plan.clip.clip, random, name) for name in shown} - {None})
    if any(row.reading == TRANSDUCTIVE for row in plan.table.rows):
        remarks.append(
            "The paper adapts LAMP's bias on unlabelled training pictures of the new classes: its"
            " setting is that of the rows marked transductive. No other row sees those pictures."
        )
    remarks.append(
        f"Mean ± standard deviation (n - 1) over {len(plan.seeds)} seeds; zero-shot CLIP is one run"
        " whatever the seed. Bold: the best of a column, transductive rows aside. LAMP's preset:"
        f" {plan.table.preset}; other methods as published"
        + (", but for what is said below." if plan.table.defaults else ".")
    )
    remarks += plan.remarks
    for name, title in (
        ("commit", "commit"),
        ("torch", "version of torch"),
        ("precision", "precision"),
        ("device", "machine"),
    ):
        found = sorted({str(each["record"][name]) for each in outcomes})
        if len(found) > 1:
            remarks.append(f"These runs are of more than one {title}: {', '.join(found)}.")
        elif found and name == "device":
            remarks.append(f"All runs on {found[0]}.")
    return remarks + _different_pictures(outcome_of)


def _different_pictures(outcome_of: Mapping[Job, Any]) -> list[str]:
    """Where runs that should have seen the same pictures read different bytes.

    Runs that choose on validation pictures read these too.
    """
    seen: dict[tuple, set[str]] = {}
    for job, outcome in outcome_of.items():
        settings = job.settings
        if outcome is not None and settings.method != ZEROSHOT:
            key = settings.data, settings.seed, uses_validation(settings)
            seen.setdefault(key, set()).add(outcome["record"]["data_sha256"])
    return [
        f"**The pictures of {data.data} changed between runs of seed {seed}**, so its rows cannot"
        " be compared: remove the older runs and repeat them."
        for (data, seed, _), hashes in seen.items()
        if len(hashes) > 1
    ]


def drawn_pictures(plan: Plan, outcome_of: Mapping[Job, Any]) -> list[Drawn]:
    """What each panel's training sets were, by the first run of each that there is."""
    found = []
    for panel in plan.table.panels:
        # Targets share what their source was trained on.
        for trained in dict.fromkeys(column.trained for column in plan.table.columns):
            keys = {each.key for each in plan.table.columns if each.trained == trained}
            jobs = (
                job.trained
                for (of, _, column, _), job in plan.jobs.items()
                if of == panel.title and column in keys
            )
            records = (
                outcome_of[job]["record"]
                for job in jobs
                if job.settings.method != ZEROSHOT and outcome_of.get(job) is not None
            )
            if (record := next(records, None)) is not None:
                found.append(Drawn(panel.title, trained, **record["drawn"]))
    return found


def _pairs(plan: Plan, compare: Sequence[str]) -> list[tuple[str, str]]:
    """The rows to test against each other."""
    if not compare:
        return default_pairs(plan)
    titles = [row.title for row in plan.table.rows]
    if len(compare) != 2:
        raise InputError(f"--compare {' '.join(compare)}: expected two titles of rows")
    for each in compare:
        if each not in titles:
            raise InputError(f"--compare {each}: expected one of {'; '.join(titles)}")
    return [tuple(compare)]


def _codes_of(file: Path | None) -> Mapping[str, str]:
    if file is None:
        return {}
    codes = read_json(file)
    codes = codes.get("code") if isinstance(codes, dict) else None
    if not isinstance(codes, dict):
        raise InputError(f"--code-of {file}: expected the JSON file of a table")
    return codes
