"""What a table is made of: trained runs, and scores of them on other data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lamp_fast.data.settings import DataConfig
from lamp_fast.fields import to_json
from lamp_fast.jobs.identity import address, code_identity, data_identity, run_identity
from lamp_fast.jobs.queue import Task
from lamp_fast.reproduce.layout import ZEROSHOT
from lamp_fast.runs.config import TrainConfig, to_saved


@dataclass(frozen=True)
class Job:
    """One run, or one score of a run.

    Attributes:
        settings: of the training, every default resolved.
        target: the data set to score the trained run on; None trains, and scores on the test
            pictures of the run's own data.
        label: of the row and the panel, for progress lines.
        tte: the score is of five crops, see ``--tte``.
        by_size: see :func:`lamp_fast.jobs.identity.run_identity`.
    """

    settings: TrainConfig
    target: DataConfig | None = None
    label: str = field(default="", compare=False)
    tte: bool = False
    by_size: bool = False

    @property
    def trained(self) -> "Job":
        """The job that trains what this one scores."""
        return replace(self, target=None, tte=False)

    @property
    def title(self) -> str:
        """What a progress line calls it."""
        seed = "" if self.settings.method == ZEROSHOT else f", seed {self.settings.seed}"
        scored = "" if self.target is None else f", scored on {self.target.data}"
        if self.tte:
            scored = ", scored on five crops"
        return f"{self.label}, {self.settings.data.data}{seed}{scored}"


@dataclass(frozen=True)
class Identities:
    """Finds, once each, what addresses depend on beside settings.

    Attributes:
        codes: by method, what stands for the sources of today: those of results that are to count
            although something has changed since.
    """

    codes: Mapping[str, str] = field(default_factory=dict)

    def code(self, method: str) -> str:
        """See :func:`code_identity`."""
        return self.codes.get(method) or code_identity(method)

    def task(self, job: Job) -> Task:
        """The queue's view of a job: its address, and all that another process needs to do it."""
        needs = () if job.target is None else (self.task(job.trained).address,)
        identity = self._identity(job)
        return Task(
            address=address(identity),
            title=job.title,
            content={
                "identity": identity,
                "settings": to_saved(job.settings),
                "target": None if job.target is None else to_json(job.target),
                "tte": job.tte,
            },
            needs=needs,
        )

    def _identity(self, job: Job) -> dict[str, Any]:
        settings = job.settings
        target = None if job.target is None else data_identity(job.target)
        identity = run_identity(settings, self.code(settings.method), by_size=job.by_size)
        identity["target"] = target
        return identity | {"tte": True} if job.tte else identity
