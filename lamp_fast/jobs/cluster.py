"""Workers as jobs of a cluster, through submitit (Slurm, or processes of this machine).

What is submitted is not one job of a table each but a few workers, which share the queue's folder
as workers on one machine do. So a worker that the cluster stops or starts again costs what it did
since its last epoch, and the number of workers has nothing to do with the number of jobs.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamp_fast.errors import InputError
from lamp_fast.extras import need
from lamp_fast.jobs.queue import Failure, Queue, Task

LOGS = "cluster"


@dataclass(frozen=True)
class Worker:
    """What a job of the cluster does; pickled by submitit, on both sides our own.

    Attributes:
        queue, tasks, retry: see :meth:`.queue.Queue.run`.
    """

    queue: Queue
    tasks: Sequence[Task]
    retry: Mapping[str, int]

    def __call__(self) -> int:
        """Work until nothing is left; returns how many jobs failed, here or elsewhere."""
        return len(self.queue.run(self.tasks, [{}], retry=self.retry, show=False))

    def checkpoint(self) -> Any:
        """What submitit submits again when the cluster takes the machine back."""
        return _submitit().helpers.DelayedSubmission(self)


def run_on_cluster(
    queue: Queue,
    tasks: Sequence[Task],
    *,
    workers: int,
    cluster: str | None = None,
    parameters: Sequence[str] = (),
) -> list[Failure]:
    """Submit workers, watch until every job is done or has failed, and return those that failed.

    Args:
        queue: on a file system that the cluster's machines share.
        tasks: see :meth:`.queue.Queue.run`.
        workers: how many to submit.
        cluster: slurm, or local for processes of this machine; None takes Slurm where there is one.
        parameters: NAME=VALUE of submitit's ``update_parameters``.

    Raises:
        InputError: submitit is missing, or does not know a parameter or the cluster.
    """
    executor = _executor(queue, cluster, parameters)
    queue.add(tasks)
    worker = Worker(queue, tasks, queue.failed_attempts(tasks))
    submitted = [executor.submit(worker) for _ in range(workers)]
    print(f"cluster {executor.cluster}: {', '.join(each.job_id for each in submitted)}", flush=True)
    try:
        # Without slots: nothing is done here, but the bar goes on and failures are named.
        return queue.run(
            tasks,
            [],
            retry=worker.retry,
            others=lambda: not all(each.done() for each in submitted),
        )
    except BaseException:
        for each in submitted:
            each.cancel()
        raise


def _submitit() -> Any:
    return need("--engine submitit", "submitit", "cluster")


def _executor(queue: Queue, cluster: str | None, parameters: Sequence[str]) -> Any:
    submitit = _submitit()
    given = {}
    for each in parameters:
        name, equals, text = each.partition("=")
        if not (name and equals):
            raise InputError(f"--submit {each}: expected NAME=VALUE")
        try:
            given[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            given[name] = text
    if cluster is None and submitit.AutoExecutor.which() != "slurm":
        raise InputError("--engine submitit: found no Slurm; --cluster local runs processes here")
    executor = submitit.AutoExecutor(queue.folder / LOGS, cluster=cluster or "slurm")
    try:
        executor.update_parameters(**{"name": "lamp_fast", **given})
    except (NameError, TypeError, ValueError, AssertionError) as error:
        raise InputError(f"--submit {' '.join(parameters)}: {error}") from None
    return executor
