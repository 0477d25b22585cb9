"""What the queue does for a comparison: a probe of all methods, fits, and tests of what is settled.

A fit trains with some settings and scores the validation pictures. It never scores a test picture:
that is a test's, another job, which there is once for each method.
"""

import socket
from collections.abc import Mapping

from lamp_fast.fields import to_json
from lamp_fast.jobs.identity import address, code_identity, run_identity
from lamp_fast.jobs.queue import Task
from lamp_fast.runs.config import TrainConfig, to_saved

PROBE, FIT, TEST = "probe", "fit", "test"


def fit_task(settings: TrainConfig, title: str) -> Task:
    """Train without the test pictures, and score the validation pictures.

    Raises:
        InputError: see :func:`lamp_fast.jobs.identity.run_identity`.
    """
    identity = {"kind": FIT, **run_identity(settings, code_identity(settings.method))}
    content = {"kind": FIT, "identity": identity, "settings": to_saved(settings)}
    return Task(address(identity), title, content)


def test_task(fit: str, title: str) -> Task:
    """Score a fitted run on the test pictures.

    Args:
        fit: the address of the job that it was fitted by.
        title: for progress lines.
    """
    identity = {"kind": TEST, "of": fit}
    content = {"kind": TEST, "identity": identity}
    return Task(address(identity), title, content, needs=(fit,))


def probe_task(settings: Mapping[str, TrainConfig]) -> Task:
    """Time a few steps of each method on this machine.

    Args:
        settings: by method, in the order in which they are timed.
    """
    machines = {method: to_json(config.machine) for method, config in settings.items()}
    identity = {
        "kind": PROBE,
        "host": socket.gethostname(),
        "machines": machines,
        "of": [fit_task(config, method).address for method, config in settings.items()],
    }
    saved = {method: to_saved(config) for method, config in settings.items()}
    content = {"kind": PROBE, "identity": identity, "settings": saved}
    return Task(address(identity), "timing a few steps of each method", content)
