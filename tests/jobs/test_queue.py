"""The queue of jobs: each done once, whoever dies, wherever; with shell commands as jobs."""

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from lamp_fast.files import write_json
from lamp_fast.jobs import queue as queues
from lamp_fast.jobs.queue import Queue, Task, Timing

FAST = Timing(poll=0.01, scan=0.02, beat=0.05, stale=0.6, stop=5.0)
PATIENT = Timing(poll=0.01, scan=0.02, beat=0.05, stale=1e6, stop=5.0)

DOES = 'echo x >> {job}/did; echo \'{{"run": "here"}}\' > {job}/attempt-{attempt}/outcome.json'
FAILS = "echo x >> {job}/did; echo no luck; exit 3"
HANGS_ONCE = "if [ {attempt} = 1 ]; then echo $$ > {job}/pid; exec sleep 600; fi; " + DOES
WAITS = (
    "mkdir {job}/attempt-{attempt}/run; echo $$ > {job}/pid;"
    " until [ -e {job}/go-{attempt} ]; do sleep 0.02; done; " + DOES
)

fork = multiprocessing.get_context("fork")


def make_queue(folder, script=DOES, timing=PATIENT, **other_scripts):
    """A queue whose jobs run ``script``, or another by the first letter of their address."""

    def command(job, attempt):
        chosen = other_scripts.get(job.name[0], script)
        return ["sh", "-c", chosen.format(job=job, attempt=attempt)]

    return Queue(folder, command, timing)


def named(*addresses, needs=()):
    return [Task(address, f"job {address}", needs=needs) for address in addresses]


def times_done(queue, address):
    file = queue.job_folder(address) / "did"
    return len(file.read_text().splitlines()) if file.exists() else 0


def work_in_process(queue, tasks, host=None):
    """A worker, on a machine of another name where one is given."""

    def work():
        if host is not None:
            socket.gethostname = lambda: host
        os._exit(len(queue.run(tasks, [{}], show=False)))

    process = fork.Process(target=work)
    process.start()
    return process


def pid_of_job(queue, address):
    """Of the process that does it, once it runs."""
    file = queue.job_folder(address) / "pid"
    wait_for(lambda: file.is_file() and file.read_text().strip())
    return int(file.read_text())


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def claim_of(queue, address, attempt):
    return json.loads((queue.attempt_folder(address, attempt) / "claim.json").read_text())


def test_every_job_is_done_once_and_what_is_done_stays_done(tmp_path, capsys):
    queue, tasks = make_queue(tmp_path), named("a", "b", "c")
    assert queue.run(tasks, [{}, {}]) == []
    assert [times_done(queue, task.address) for task in tasks] == [1, 1, 1]
    left = queue.outcome("a")
    assert left.pop("seconds") > 0
    assert left == {"run": "here", "attempt": 1}
    assert json.loads((queue.job_folder("a") / "task.json").read_text())["title"] == "job a"
    assert capsys.readouterr().out.count("done: job") == 3
    more = named("a", "b", "c", "d")
    assert queue.run(more, [{}]) == []
    assert [times_done(queue, task.address) for task in more] == [1, 1, 1, 1]


def test_a_slot_brings_its_environment(tmp_path):
    script = 'echo "{{\\"gpu\\": \\"$GPU\\"}}" > {job}/attempt-{attempt}/outcome.json'
    queue = make_queue(tmp_path, script)
    queue.run(named("a"), [{"GPU": "7"}], show=False)
    assert queue.outcome("a")["gpu"] == "7"


def test_processes_that_share_a_folder_do_no_job_twice(tmp_path):
    queue = make_queue(tmp_path)
    tasks = named(*(f"{number:02}" for number in range(24)))
    workers = [work_in_process(queue, tasks) for _ in range(4)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [times_done(queue, task.address) for task in tasks] == [1] * 24
    owners = {claim_of(queue, task.address, 1)["pid"] for task in tasks}
    assert len(owners) > 1


def test_the_job_of_a_killed_worker_is_taken_over(tmp_path):
    queue = make_queue(tmp_path, HANGS_ONCE)
    tasks = named("a")
    worker = work_in_process(queue, tasks)
    job = pid_of_job(queue, "a")
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    # Real jobs look for their parent themselves; a shell does not.
    os.kill(job, signal.SIGKILL)
    (queue.attempt_folder("a", 1) / "run").mkdir()
    # The clock is never asked here: a dead process of this machine is known at once.
    assert queue.run(tasks, [{}], show=False) == []
    assert queue.outcome("a")["attempt"] == 2
    assert times_done(queue, "a") == 1
    assert not (queue.attempt_folder("a", 1) / "run").exists()


def test_a_worker_of_another_machine_keeps_its_job_while_it_beats(tmp_path):
    timing = Timing(poll=0.01, scan=0.02, beat=0.05, stale=1.5, stop=5.0)
    queue, tasks = make_queue(tmp_path, "sleep 4; " + DOES, timing), named("a")
    worker = work_in_process(queue, tasks, host="elsewhere")
    wait_for((queue.attempt_folder("a", 1) / "log.txt").is_file)
    assert queue.run(tasks, [{}], show=False) == []
    worker.join()
    assert worker.exitcode == 0
    assert (queue.outcome("a")["attempt"], times_done(queue, "a")) == (1, 1)


def test_a_worker_of_another_machine_counts_as_dead_once_its_beat_stands_still(tmp_path):
    queue, tasks = make_queue(tmp_path, HANGS_ONCE, FAST), named("a")
    worker = work_in_process(queue, tasks, host="elsewhere")
    job = pid_of_job(queue, "a")
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    os.kill(job, signal.SIGKILL)
    # Nothing but its beat can tell: its process id says nothing here.
    assert queue.run(tasks, [{}], show=False) == []
    assert (queue.outcome("a")["attempt"], times_done(queue, "a")) == (2, 1)


def test_of_many_that_notice_a_death_one_takes_over(tmp_path):
    queue, tasks = make_queue(tmp_path, timing=FAST), named("a", "b")
    queue.add(tasks)

    def die_holding():
        socket.gethostname = lambda: "elsewhere"
        for task in tasks:
            queue._lease(task.address).acquire()
        os._exit(0)

    holder = fork.Process(target=die_holding)
    holder.start()
    holder.join()
    # The other one died between its lease and its first attempt.
    queue.attempt_folder("a", 1).mkdir()
    workers = [work_in_process(queue, tasks) for _ in range(4)]
    for worker in workers:
        worker.join()
    assert [times_done(queue, "a"), times_done(queue, "b")] == [1, 1]
    assert [queue.outcome(each)["attempt"] for each in "ab"] == [2, 1]


@pytest.mark.parametrize("woken", ["before the other is done", "after its last look", "after"])
def test_a_worker_that_slept_past_its_lease_publishes_nothing(tmp_path, monkeypatch, woken):
    """Its process ended meanwhile, another worker has taken over and may be done."""
    queue, tasks = make_queue(tmp_path, WAITS, FAST), named("a")
    if woken == "after its last look":
        monkeypatch.setattr(queues._Running, "is_lost", lambda _: False)
    sleeper = work_in_process(queue, tasks)
    pid_of_job(queue, "a")
    os.kill(sleeper.pid, signal.SIGSTOP)
    (queue.job_folder("a") / "go-1").touch()
    wait_for((queue.attempt_folder("a", 1) / "outcome.json").is_file)
    other = work_in_process(queue, tasks)
    wait_for((queue.attempt_folder("a", 2) / "run").is_dir)
    if woken == "before the other is done":
        os.kill(sleeper.pid, signal.SIGCONT)
        time.sleep(0.5)  # what it would publish would stand
    (queue.job_folder("a") / "go-2").touch()
    other.join()
    os.kill(sleeper.pid, signal.SIGCONT)
    sleeper.join()
    assert [sleeper.exitcode, other.exitcode] == [0, 0]
    assert (queue.outcome("a")["attempt"], times_done(queue, "a")) == (2, 2)
    assert not (queue.attempt_folder("a", 1) / "run").exists()
    assert (queue.attempt_folder("a", 2) / "run").is_dir()


def test_a_worker_that_slept_past_its_lease_stops_its_process(tmp_path):
    queue, tasks = make_queue(tmp_path, HANGS_ONCE, FAST), named("a")
    worker = work_in_process(queue, tasks)
    job = pid_of_job(queue, "a")
    os.kill(worker.pid, signal.SIGSTOP)
    assert queue.run(tasks, [{}], show=False) == []
    os.kill(worker.pid, signal.SIGCONT)
    worker.join()
    assert worker.exitcode == 0
    assert not Path(f"/proc/{job}").exists()
    assert queue.outcome("a")["attempt"] == 2


def test_a_job_that_ended_since_the_last_look_is_not_done_again(tmp_path):
    queue, tasks = make_queue(tmp_path), named("a")
    queue.add(tasks)
    queue.attempt_folder("a", 1).mkdir()
    with queue._lease("a"):
        late = queues._Work(queue, tasks, [{}], {}, False, None)
        write_json(queue.job_folder("a") / "outcome.json", {"run": "here", "attempt": 1})
    late.start()
    late.close()
    assert not queue.attempt_folder("a", 2).exists()
    assert late.until_done() == []


def test_a_failed_job_stops_nothing_and_is_named_with_its_log(tmp_path):
    queue = make_queue(tmp_path, f=FAILS, s="kill -9 $$", e="true")
    tasks = [*named("f", "s", "e", "a"), *named("n", needs=("f",)), *named("m", needs=("a",))]
    failures = queue.run(tasks, [{}], show=False)
    assert [(each.task.address, each.reason) for each in failures] == [
        ("f", "exit code 3"),
        ("s", "killed by signal 9"),
        ("e", "exit code 0, but it left no outcome.json"),
        ("n", "needs job f"),
    ]
    assert failures[0].log.read_text() == "no luck\n"
    assert failures[3].log is None
    assert times_done(queue, "a") == times_done(queue, "m") == 1


def test_a_failed_job_is_tried_once_more_by_the_next_call(tmp_path):
    queue, tasks = make_queue(tmp_path, FAILS), named("a")
    for attempt in (1, 2):
        (failure,) = queue.run(tasks, [{}, {}], show=False)
        assert failure.log == queue.attempt_folder("a", attempt) / "log.txt"
        assert times_done(queue, "a") == attempt
    # A worker that joins later does not try what failed before the others' call had ended.
    queue.run(tasks, [{}], retry={}, show=False)
    assert times_done(queue, "a") == 2
    assert make_queue(tmp_path).run(tasks, [{}], show=False) == []


def test_what_a_job_needs_is_done_before_it(tmp_path):
    needing = "test -f {job}/../a/outcome.json || exit 4; " + DOES
    queue = make_queue(tmp_path, "sleep 0.2; " + DOES, n=needing)
    assert queue.run([*named("a"), *named("n", needs=("a",))], [{}, {}], show=False) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_worker_stops_its_job_and_leaves_it_to_others(tmp_path, number):
    queue, tasks = make_queue(tmp_path, HANGS_ONCE), named("a")

    def work():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            queue.run(tasks, [{}], show=False)
        except KeyboardInterrupt:
            os._exit(130)

    worker = fork.Process(target=work)
    worker.start()
    job = pid_of_job(queue, "a")
    os.kill(worker.pid, number)
    worker.join()
    assert worker.exitcode == 130
    assert not Path(f"/proc/{job}").exists()
    assert not (queue.job_folder("a") / "lease.lock").exists()
    assert queue.run(tasks, [{}], show=False) == []


def test_without_slots_the_queue_is_watched_until_no_worker_is_left(tmp_path):
    queue = make_queue(tmp_path)
    tasks = named("a", "b")
    queue.run(tasks[:1], [{}], show=False)
    failures = queue.run(tasks, [], show=False, others=lambda: False)
    assert [(each.task.address, each.reason) for each in failures] == [("b", "no worker is left")]
