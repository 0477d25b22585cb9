"""The work of a comparison within its budget: probe, published settings, search, tests.

What is settled stays settled: the settings of a method are written down before its test pictures
are scored, and from then on nothing more is tried of it, also by later calls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lamp_fast.compare import probe
from lamp_fast.compare.candidates import GROUPS, Candidate
from lamp_fast.compare.cost import (
    PROBE_SHARE,
    Budget,
    Cost,
    Measured,
    Sizes,
    affordable,
    in_order,
    predict_cost,
)
from lamp_fast.compare.jobs import fit_task, probe_task, test_task
from lamp_fast.compare.search import Search
from lamp_fast.compare.settings import format_duration
from lamp_fast.errors import InputError
from lamp_fast.files import read_json, write_json
from lamp_fast.jobs.here import local_slots
from lamp_fast.jobs.queue import OUT_OF_TIME, Failure, Queue, Task
from lamp_fast.runs.config import TrainConfig, from_saved, to_saved
from lamp_fast.runs.folder import VALIDATION
from lamp_fast.runs.metrics import scores
from lamp_fast.tensors import load_tensors

SETTLED = "settled.json"

# What became of a method.
TESTED, FITTED, REFUSED, FAILED = "tested", "fitted", "refused", "failed"
LEFT_OUT, STOPPED = "left out", "stopped"


@dataclass(frozen=True)
class Trial:
    """Settings that a method was fitted with.

    Attributes:
        settings: these.
        address: of the job that fitted them.
        labels, predicted: of the validation pictures, integers [n].
        score: macro-F1 on them, in 0..1.
        seconds: that the fit took.
    """

    settings: TrainConfig
    address: str
    labels: np.ndarray
    predicted: np.ndarray
    score: float
    seconds: float


@dataclass
class Entry:
    """A method, and how far it has come.

    Attributes:
        candidate: which.
        state: TESTED and so on; empty before anything was tried.
        why: a line, where it was not tested.
        cost: predicted, of the published settings; None where they were not timed.
        trials: that were fitted, the published settings first.
        settled: the trial that was or will be tested.
        tested: the outcome of the test.
    """

    candidate: Candidate
    state: str = ""
    why: str = ""
    cost: Cost | None = None
    trials: list[Trial] = field(default_factory=list)
    settled: Trial | None = None
    tested: Mapping[str, Any] | None = None

    @property
    def best(self) -> Trial:
        """The trial that the validation pictures prefer, of equal ones the first."""
        return max(self.trials, key=lambda trial: trial.score)


class Work:
    """One call's work in a folder.

    Args:
        folder: of the comparison.
        queue: its jobs.
        candidates: in the order of the table.
        sizes: pictures of each part.
        budget: of this call.
        trials: further settings of each method.
        say: prints a line.
    """

    def __init__(
        self,
        folder: Path,
        queue: Queue,
        candidates: Sequence[Candidate],
        sizes: Sizes,
        budget: Budget,
        trials: int,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.queue, self.sizes = folder, queue, sizes
        self.budget, self.trials, self.say = budget, trials, say
        self.entries = {each.method: Entry(each) for each in candidates}
        for entry in self.entries.values():
            if entry.candidate.published is None:
                entry.state, entry.why = REFUSED, entry.candidate.refusal or ""
        self.steps: dict[str, int] = {}

    def run(self) -> list[Entry]:
        """Do it all; the entries say what became of each method."""
        self._read_settled()
        self._probe()
        self._fit_published()
        self._search()
        self._settle()
        self._test()
        return list(self.entries.values())

    def _read_settled(self) -> None:
        """Take over what earlier calls have settled."""
        file = self.folder / SETTLED
        for method, held in (read_json(file) if file.is_file() else {}).items():
            if method in self.entries:
                entry = self.entries[method]
                settings = from_saved(held["settings"], str(file))
                entry.settled = self._trial(settings, held["address"])
                entry.trials = [
                    self._trial(from_saved(each["settings"], str(file)), each["address"])
                    for each in held["trials"]
                ]
                entry.state = FITTED

    def _open(self) -> list[Entry]:
        return [each for each in self.entries.values() if not each.state]

    def _probe(self) -> None:
        """Time the methods that are neither settled nor refused."""
        settings = {
            each.candidate.method: each.candidate.published
            for each in self.entries.values()
            if each.candidate.published is not None
        }
        if not settings:
            return
        task = probe_task(settings)
        end = self.budget.clock() + PROBE_SHARE * self.budget.seconds
        if any(not self._timed(task, each.candidate.method) for each in self._open()):
            self.say(f"probe   {task.title}")
        # An attempt that dies takes one method with it, once or twice.
        for _ in range(probe.MAX_DEATHS * len(settings) + 1):
            if not self._open() or self._outcome_of(task) is not None:
                break
            failures = self._do(task, end)
            if failures and failures[0].reason == OUT_OF_TIME:
                break
        for method in settings:
            self._take_probe(self.entries[method], self._timed(task, method))

    def _timed(self, task: Task, method: str) -> dict[str, Any]:
        file = probe.measured_file(self.queue.job_folder(task.address), method)
        return read_json(file) if file.is_file() else {}

    def _take_probe(self, entry: Entry, found: Mapping[str, Any]) -> None:
        if "step" in found:
            measured = Measured.from_json(found)
            entry.cost = predict_cost(measured, self.sizes)
            self.steps[entry.candidate.method] = measured.steps
        elif entry.state:
            pass
        elif "failed" in found:
            entry.state, entry.why = FAILED, found["failed"]
        elif entry.candidate.group != GROUPS[0]:
            entry.state = LEFT_OUT
            entry.why = f"not timed within {PROBE_SHARE:.0%} of the budget"

    def _fit_published(self) -> None:
        """The published settings of each method that fits into the budget; of zero-shot CLIP, which
        every other one is compared with, in any case."""
        costs = {each.candidate.method: each.cost for each in self._open() if each.cost}
        groups = {
            method: GROUPS.index(entry.candidate.group) for method, entry in self.entries.items()
        }
        order = in_order(groups, costs, GROUPS.index("training"))
        self._tell_plan(order, costs)
        untimed = [each.candidate.method for each in self._open() if each.cost is None]
        for method in (*untimed, *order):
            entry = self.entries[method]
            task = self._fit_task(entry, entry.candidate.published)
            if self._is_too_long(entry, task):
                entry.state, left = LEFT_OUT, format_duration(max(0.0, self.budget.left))
                entry.why = f"predicted {format_duration(entry.cost.whole)}, {left} were left"
                continue
            predicted = None if entry.cost is None else entry.cost.fit
            failure = self._fit(entry, entry.candidate.published, task, predicted)
            if failure is None:
                entry.state = FITTED
                if entry.cost is not None:
                    self.budget.owe(entry.cost)
            elif failure.reason == OUT_OF_TIME:
                entry.state = STOPPED
                entry.why = "stopped at the end of the budget; the same command goes on with it"
            else:
                entry.state, entry.why = FAILED, reason_of(failure)

    def _is_too_long(self, entry: Entry, task: Task) -> bool:
        if entry.candidate.group == GROUPS[0] or self._outcome_of(task) is not None:
            return False
        return not self.budget.fits(entry.cost)

    def _tell_plan(self, order: Sequence[str], costs: Mapping[str, Cost]) -> None:
        def is_new(method: str) -> bool:
            entry = self.entries[method]
            return self._outcome_of(self._fit_task(entry, entry.candidate.published)) is None

        new = list(filter(is_new, order))
        kept = affordable(new, costs, self.budget.left)
        total = format_duration(sum(costs[method].whole for method in kept))
        left = format_duration(self.budget.left)
        self.say(f"plan    {len(kept)} of {len(new)} methods to do, predicted {total} of {left}")

    def _search(self) -> None:
        """Further settings, round by round, of the methods that validation prefers first."""
        searches: dict[str, Search] = {}
        fitted = [
            entry
            for entry in self.entries.values()
            if entry.state == FITTED
            and entry.settled is None
            and self.steps.get(entry.candidate.method)
        ]
        fitted.sort(key=lambda entry: -entry.trials[0].score)
        told: dict[str, float | None] = {
            entry.candidate.method: entry.trials[0].score for entry in fitted
        }
        for number in range(1, self.trials + 1):
            for entry in fitted:
                method, published = entry.candidate.method, entry.candidate.published
                if method not in told:
                    continue
                if method not in searches:
                    searches[method] = Search(published, published.seed)
                settings = searches[method].next(told[method])
                title = f"{entry.candidate.title}, settings {number} of {self.trials}"
                task = fit_task(settings, title)
                # What the published settings took is the best prediction.
                cost = Cost(entry.trials[0].seconds, entry.cost.test if entry.cost else 0.0)
                done = self._outcome_of(task) is not None
                if not done and not self.budget.fits_again(cost):
                    del told[method]
                    continue
                failure = self._fit(entry, settings, task, cost.fit)
                if failure is not None and failure.reason == OUT_OF_TIME:
                    return
                told[method] = None if failure is not None else entry.trials[-1].score

    def _fit_task(self, entry: Entry, settings: TrainConfig) -> Task:
        return fit_task(settings, f"{entry.candidate.title}, published settings")

    def _fit(
        self, entry: Entry, settings: TrainConfig, task: Task, predicted: float | None
    ) -> Failure | None:
        """Do one fit, say what came of it, and keep it as a trial."""
        new = self._outcome_of(task) is None
        if new:
            known = "" if predicted is None else f": predicted {format_duration(predicted)}"
            self.say(f"fit     {task.title}{known}")
        end = self.budget.end - self.budget.owed
        failures = self._do(task, end)
        if failures:
            self.say(f"        {reason_of(failures[0])}")
            return failures[0]
        trial = self._trial(settings, task.address)
        entry.trials.append(trial)
        if new:
            self.say(
                f"        took {format_duration(trial.seconds)}, validation macro-F1"
                f" {100 * trial.score:.1f}"
            )
        return None

    def _trial(self, settings: TrainConfig, address: str) -> Trial:
        """A fit that is done."""
        outcome = self.queue.outcome(address)
        if outcome is None:
            raise InputError(
                f"--out {self.folder}: job {address[:12]} of a tested method is missing, expected"
                " another folder"
            )
        tensors, _ = load_tensors(self.folder / "jobs" / outcome["run"] / VALIDATION)
        labels, logits = tensors["labels"].numpy(), tensors["logits"]
        predicted = logits.argmax(dim=1).numpy()
        score = scores(labels, predicted, logits.shape[1]).macro_f1
        return Trial(settings, address, labels, predicted, score, outcome["seconds"])

    def _settle(self) -> None:
        """Write down, for good, which settings of each method will be tested."""
        for entry in self.entries.values():
            if entry.state == FITTED and entry.settled is None:
                entry.settled = entry.best
        file = self.folder / SETTLED
        held = read_json(file) if file.is_file() else {}
        held |= {
            entry.candidate.method: {
                "settings": to_saved(entry.settled.settings),
                "address": entry.settled.address,
                "trials": [
                    {"settings": to_saved(trial.settings), "address": trial.address}
                    for trial in entry.trials
                ],
            }
            for entry in self.entries.values()
            if entry.settled is not None and entry.candidate.method not in held
        }
        write_json(file, held)

    def _test(self) -> None:
        """Score each settled method on the test pictures, once."""
        for entry in self.entries.values():
            if entry.settled is None:
                continue
            task = test_task(entry.settled.address, f"{entry.candidate.title}, test pictures")
            if self._outcome_of(task) is None:
                self.say(f"test    {entry.candidate.title}")
            failures = self._do(task, None)
            if entry.cost is not None:
                self.budget.pay(entry.cost)
            if failures:
                entry.state, entry.why = FAILED, reason_of(failures[0])
            else:
                entry.state, entry.tested = TESTED, self._outcome_of(task)

    def _outcome_of(self, task: Task) -> dict[str, Any] | None:
        return self.queue.outcome(task.address)

    def _do(self, task: Task, end: float | None) -> list[Failure]:
        """One job, unless it is done."""
        if self._outcome_of(task) is not None:
            return []
        # What the job needs was done before.
        alone = Task(task.address, task.title, {**task.content, "needs": task.needs})
        return self.queue.run([alone], local_slots(1), show=False, end=end)


def reason_of(failure: Failure) -> str:
    """Why a job failed, in one line: its own error where it printed one."""
    if failure.reason == OUT_OF_TIME or failure.log is None or not failure.log.is_file():
        return failure.reason
    if failure.reason.startswith("killed"):
        return f"{failure.reason}, perhaps for memory"
    lines = failure.log.read_text(encoding="utf-8", errors="replace").split("\n")
    words = [line.strip() for line in lines if line.strip()]
    errors = [line for line in words if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    return words[-1] if words else failure.reason
