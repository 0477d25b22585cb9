"""A folder of jobs that any number of workers share, on one machine or on many.

    jobs/ADDRESS/task.json             what is to be done
    jobs/ADDRESS/lease.lock            filelock's lease: who does the job, and a beat that it lives
    jobs/ADDRESS/attempt-1/            made by who holds the lease, for this attempt alone
        claim.json                     who made it, and how it failed if it did
        log.txt                        everything that the job printed
        run/, outcome.json             what it leaves
    jobs/ADDRESS/outcome.json          there once the job is done, and for good

Who holds the lease works. A lease whose beat stands still passes to another worker, which makes
``attempt-2``. A lease cannot stop a holder that was only asleep, so what filelock leaves to its
users is done here: attempts are numbered by ``mkdir``, which one of many succeeds with, also on a
network file system; a holder whose lease is lost, or that finds a later attempt, publishes nothing
and has written in its own attempt's folder alone; and an outcome is published by a link that never
replaces one, so the first stands. At worst a job is computed twice.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import SoftFileLease, Timeout
from tqdm import tqdm

from lamp_fast.files import write_json
from lamp_fast.jobs.here import uninterrupted

OUTCOME = "outcome.json"
CLAIM, LEASE, LOG, TASK = "claim.json", "lease.lock", "log.txt", "task.json"

TAKEN_OVER, OUT_OF_TIME = "taken over by another worker", "out of time"

# States of a job.
DONE, FREE, RUNNING, FAILED, WAITING = "done", "free", "running", "failed", "waiting"


@dataclass(frozen=True)
class Task:
    """A job as the queue sees it.

    Attributes:
        address: names its folder; jobs of one address are one job.
        title: for progress lines.
        content: JSON values, kept in ``task.json`` for the process that does it.
        needs: addresses of jobs whose outcome it reads.
    """

    address: str
    title: str
    content: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A job without an outcome, and why."""

    task: Task
    reason: str
    log: Path | None


@dataclass(frozen=True)
class Timing:
    """How patient the queue is, in seconds.

    Attributes:
        poll: between two looks at own processes.
        scan: between two looks at what other workers do.
        beat: between two signs of life.
        stale: without a sign of life a worker loses its lease; several beats, and more than a
            network file system holds back what another machine wrote (a minute, often). The same
            for all workers that share a folder.
        stop: between the request to stop and the kill.
    """

    poll: float = 0.2
    scan: float = 3.0
    beat: float = 10.0
    stale: float = 180.0
    stop: float = 20.0


# The command that does a job: its folder and the number of the attempt, as arguments of a process.
Command = Callable[[Path, int], Sequence[str]]


class Queue:
    """Jobs in ``folder``, each done once by one of the workers that share it.

    Args:
        folder: made if it is not there.
        command: see :data:`Command`. The process is to leave ``outcome.json`` in the attempt's
            folder and exit with 0; anything else is a failure.
        timing: see :class:`Timing`.
    """

    def __init__(self, folder: Path, command: Command, timing: Timing | None = None) -> None:
        self.folder, self.command = Path(folder), command
        self.timing = timing or Timing()

    def add(self, tasks: Iterable[Task]) -> None:
        """Write down what is not there yet."""
        for task in tasks:
            file = self.job_folder(task.address) / TASK
            if not file.is_file():
                write_json(file, {"title": task.title, "needs": task.needs, **task.content})

    def job_folder(self, address: str) -> Path:
        """Where everything of a job lies."""
        return self.folder / "jobs" / address

    def attempt_folder(self, address: str, attempt: int) -> Path:
        """Where an attempt, from 1, keeps its files."""
        return self.job_folder(address) / f"attempt-{attempt}"

    def outcome(self, address: str) -> dict[str, Any] | None:
        """What a done job left, with the number of its attempt and the seconds that this took; None
        before."""
        try:
            return json.loads((self.job_folder(address) / OUTCOME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def failed_attempts(self, tasks: Iterable[Task]) -> dict[str, int]:
        """Attempts that have failed so far: what a new call may try once more."""
        attempts = {task.address: self._last_attempt(task.address) for task in tasks}
        return {
            address: attempt
            for address, attempt in attempts.items()
            if attempt and self._claim(address, attempt).get("state") == FAILED
        }

    def run(
        self,
        tasks: Sequence[Task],
        slots: Sequence[Mapping[str, str]],
        *,
        retry: Mapping[str, int] | None = None,
        show: bool = True,
        others: Callable[[], bool] | None = None,
        end: float | None = None,
    ) -> list[Failure]:
        """Work until every job is done or has failed, here or elsewhere.

        Args:
            tasks: in the order of preference; what a job needs comes before it.
            slots: one process at a time each, with these environment variables on top.
            retry: failed attempts that are to be tried again; by default those that there are now.
            show: a progress bar, and a line a job.
            others: whether workers elsewhere may still do something. Where there is no slot, jobs
                that are left when they may not have failed; without it they are waited for.
            end: of ``time.monotonic``; what still runs then is stopped, and a later call goes on
                with it.

        Returns:
            The jobs that failed, in the order of ``tasks``.
        """
        self.add(tasks)
        retry = self.failed_attempts(tasks) if retry is None else retry
        with contextlib.closing(_Work(self, tasks, slots, retry, show, others, end)) as work:
            return work.until_done()

    def _state(self, task: Task, retry: Mapping[str, int]) -> tuple[str, int]:
        """State of a job and its last attempt. What it needs is not looked at."""
        address = task.address
        if (self.job_folder(address) / OUTCOME).is_file():
            return DONE, 0
        attempt = self._last_attempt(address)
        if attempt == 0:
            return FREE, 0
        if self._claim(address, attempt).get("state") == FAILED:
            return (FREE if retry.get(address) == attempt else FAILED), attempt
        # Whether a holder lives is found out by taking its lease.
        held = (self.job_folder(address) / LEASE).is_file()
        return (RUNNING if held else FREE), attempt

    def _last_attempt(self, address: str) -> int:
        folder = self.job_folder(address)
        names = (each.name.partition("-") for each in folder.glob("attempt-*"))
        return max((int(number) for _, _, number in names if number.isdigit()), default=0)

    def _claim(self, address: str, attempt: int) -> dict[str, Any]:
        """What a claim says; nothing for one that is being written."""
        try:
            file = self.attempt_folder(address, attempt) / CLAIM
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _lease(self, address: str) -> SoftFileLease:
        return SoftFileLease(
            self.job_folder(address) / LEASE,
            lease_duration=self.timing.stale,
            heartbeat_interval=self.timing.beat,
            blocking=False,
        )


class _Running:
    """A job that a process of ours does, in a folder that is there, under a lease that is held."""

    def __init__(
        self, queue: Queue, task: Task, attempt: int, slot: Mapping[str, str], lease: SoftFileLease
    ) -> None:
        self.queue, self.task, self.attempt, self.slot = queue, task, attempt, slot
        self.lease, self.folder = lease, queue.attempt_folder(task.address, attempt)
        self.started = time.monotonic()
        self.claim = {"host": socket.gethostname(), "pid": os.getpid(), "state": RUNNING}
        write_json(self.folder / CLAIM, self.claim)
        with open(self.folder / LOG, "wb") as log:
            self.process = subprocess.Popen(
                [*queue.command(queue.job_folder(task.address), attempt)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(slot),
                start_new_session=True,
            )

    def is_lost(self) -> bool:
        """Whether the job is another worker's by now."""
        later = self.queue._last_attempt(self.task.address) > self.attempt
        return later or self.lease.compromise is not None

    def finish(self) -> str:
        """Publish the outcome of a process that has ended; returns what became of the job."""
        code = self.process.returncode
        if code == 0 and (self.folder / OUTCOME).is_file():
            return "done" if not self.is_lost() and self.publish() else TAKEN_OVER
        reason = f"exit code {code}" if code else f"exit code 0, but it left no {OUTCOME}"
        if code < 0:
            reason = f"killed by signal {-code}"
        write_json(self.folder / CLAIM, self.claim | {"state": FAILED, "reason": reason})
        return f"failed ({reason})"

    def publish(self) -> bool:
        """Make the outcome the job's; False where there is one already, which stands."""
        job = self.queue.job_folder(self.task.address)
        outcome = json.loads((self.folder / OUTCOME).read_text(encoding="utf-8"))
        own, published = job / f".{OUTCOME}.{self.attempt}", job / OUTCOME
        seconds = time.monotonic() - self.started
        write_json(own, outcome | {"attempt": self.attempt, "seconds": seconds})
        # A network file system may report as there already what it has just linked.
        with contextlib.suppress(FileExistsError):
            os.link(own, published)
        first = published.samefile(own)
        own.unlink()
        if first:
            for earlier in range(1, self.attempt):
                folder = self.queue.attempt_folder(self.task.address, earlier)
                shutil.rmtree(folder / "run", ignore_errors=True)
        return first

    def ask_to_stop(self) -> None:
        """Ask the process, and what it started, to end; every file that it leaves is whole."""
        self._signal(signal.SIGTERM)

    def end(self) -> None:
        """Wait for the process a while, then kill it."""
        try:
            self.process.wait(self.queue.timing.stop)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class _Work:
    """One call of :meth:`Queue.run`."""

    def __init__(
        self,
        queue: Queue,
        tasks: Sequence[Task],
        slots: Sequence[Mapping[str, str]],
        retry: Mapping[str, int],
        show: bool,
        others: Callable[[], bool] | None,
        end: float | None = None,
    ) -> None:
        self.queue, self.retry, self.show = queue, dict(retry), show
        self.others, self.end = others, end
        self.tasks = {task.address: task for task in tasks}
        self.slots, self.free_slots = slots, list(slots)
        self.running: list[_Running] = []
        self.states: dict[str, tuple[str, int]] = {}
        # Kept, since a lease learns by comparing with what it saw earlier that a beat stands still.
        self.leases: dict[str, SoftFileLease] = {}
        self.not_tried: list[str] = []
        self.scanned = float("-inf")
        self.scan()
        done = sum(state == DONE for state, _ in self.states.values())
        self.bar = tqdm(
            total=len(self.tasks),
            initial=done,
            unit="job",
            smoothing=0,
            disable=None if show else True,
        )

    def until_done(self) -> list[Failure]:
        """See :meth:`Queue.run`."""
        while True:
            ended = self.reap()
            if ended or time.monotonic() - self.scanned > self.queue.timing.scan:
                self.scan()
            self.start()
            self.draw()
            states = {state for state, _ in self.states.values()}
            if not self.running and not states & {FREE, RUNNING, WAITING}:
                return self.failures()
            if not self.slots and self.others is not None and not self.others():
                self.scan()
                return self.failures()
            if self.end is not None and time.monotonic() >= self.end:
                return self.failures()
            time.sleep(self.queue.timing.poll)

    def scan(self) -> None:
        """Look at every job that was not done; a job waits for what it needs, or fails with it."""
        self.scanned = time.monotonic()
        for address, task in self.tasks.items():
            if self.states.get(address, ("", 0))[0] != DONE:
                self.states[address] = self.queue._state(task, self.retry)
            state, attempt = self.states[address]
            needed = {self.states[each][0] for each in task.needs}
            if state == FREE and needed - {DONE}:
                self.states[address] = FAILED if FAILED in needed else WAITING, attempt
        own = {each.task.address for each in self.running}
        self.not_tried = [
            address
            for address, (state, _) in self.states.items()
            if state in (FREE, RUNNING) and address not in own
        ]

    def start(self) -> None:
        """Take free jobs, and those whose holder is dead, for free slots."""
        while self.free_slots and self.not_tried:
            address = self.not_tried.pop(0)
            task, attempt = self.tasks[address], self.states[address][1] + 1
            self.states[address] = RUNNING, attempt
            lease = self.leases.setdefault(address, self.queue._lease(address))
            # An interruption in between would leave a process that nobody knows of.
            with uninterrupted(), contextlib.suppress(Timeout), contextlib.ExitStack() as held:
                held.enter_context(lease)
                # The last scan may be out of date: the job has ended since, or was taken and left.
                if self.queue._state(task, self.retry)[0] in (DONE, FAILED):
                    continue
                try:
                    self.queue.attempt_folder(address, attempt).mkdir()
                except FileExistsError:
                    continue
                self.retry.pop(address, None)
                self.running.append(_Running(self.queue, task, attempt, self.free_slots[0], lease))
                del self.free_slots[0]
                held.pop_all()

    def reap(self) -> int:
        """End what has ended or was taken over; returns how many."""
        ended = 0
        for each in list(self.running):
            if each.process.poll() is not None:
                self.tell(each.finish(), each)
            elif each.lease.compromise is not None:
                each.ask_to_stop()
                each.end()
                self.tell(TAKEN_OVER, each)
            else:
                continue
            each.lease.release()
            self.running.remove(each)
            self.free_slots.append(each.slot)
            ended += 1
        return ended

    def draw(self) -> None:
        """Bring the bar up to date."""
        states = [state for state, _ in self.states.values()]
        counts = {"running": len(self.running), "failed": states.count(FAILED)}
        counts["elsewhere"] = max(0, states.count(RUNNING) - len(self.running))
        shown = {name: count for name, count in counts.items() if count}
        self.bar.set_postfix(shown, refresh=False)
        # Failed jobs are no longer to be waited for, so the time that is left counts them as done.
        self.bar.update(states.count(DONE) + states.count(FAILED) - self.bar.n)

    def tell(self, what: str, ended: _Running) -> None:
        """A line above the bar."""
        if self.show:
            self.bar.write(f"{what}: {ended.task.title}, {time.monotonic() - ended.started:.0f} s")

    def failures(self) -> list[Failure]:
        """The jobs that failed, needed one that did, or were left by workers that are gone."""
        failures = []
        for address, task in self.tasks.items():
            state, attempt = self.states[address]
            if state == DONE:
                continue
            claim = self.queue._claim(address, attempt) if attempt else {}
            log = self.queue.attempt_folder(address, attempt) / LOG if attempt else None
            needed = [each for each in task.needs if self.states[each][0] == FAILED]
            if claim.get("state") == FAILED:
                failures.append(Failure(task, claim["reason"], log))
            elif needed:
                failures.append(Failure(task, f"needs {self.tasks[needed[0]].title}", None))
            elif self.end is not None and time.monotonic() >= self.end:
                failures.append(Failure(task, OUT_OF_TIME, log))
            else:
                failures.append(Failure(task, "no worker is left", log))
        return failures

    def close(self) -> None:
        """Stop what still runs, and leave it to others."""
        for each in self.running:
            each.ask_to_stop()
        for each in self.running:
            each.end()
            with contextlib.suppress(OSError):
                each.lease.release()
        self.bar.close()
