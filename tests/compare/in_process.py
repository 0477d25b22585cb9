"""A queue whose jobs are done by the process that asks, for tests that count what a job does."""

from lamp_fast.compare import attempt
from lamp_fast.files import read_json, write_json
from lamp_fast.jobs.queue import OUTCOME, Failure, Queue


class InProcess(Queue):
    """Jobs in turn; the first that fails is a failure of its own words."""

    def run(self, tasks, slots, *, retry=None, show=True, others=None, end=None):
        self.add(tasks)
        failures = []
        for task in tasks:
            number = self._last_attempt(task.address) + 1
            folder = self.attempt_folder(task.address, number)
            folder.mkdir(parents=True)
            try:
                code = attempt.main(attempt.AttemptConfig(self.job_folder(task.address), number))
            except Exception as error:
                failures.append(Failure(task, str(error), None))
                continue
            assert code == 0
            outcome = read_json(folder / OUTCOME)
            write_json(
                self.job_folder(task.address) / OUTCOME,
                outcome | {"attempt": number, "seconds": 1.0},
            )
        return failures
