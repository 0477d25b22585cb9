"""Loading processes: they die in one line, and never run the script that started the run."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lamp_fast.data.loading import evaluation_batches, report_dead_workers
from lamp_fast.data.pictures import Pictures
from lamp_fast.errors import InputError

SCRIPT = """
import sys
with open(sys.argv[3], "a") as log:
    log.write("begun\\n")
from lamp_fast import Classifier
trained = Classifier.train(
    data="folder", root=sys.argv[1], clip="tiny", epochs=1, workers=2, out=sys.argv[2]
)
print("trained", *trained.trained_names)
"""


class Dies:
    """A transform that ends its process as a full memory does."""

    def __call__(self, picture):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_loading_process_that_dies_is_one_line():
    pictures = Pictures(["a", "b"], [0, 1], arrays=np.zeros((2, 8, 8, 3), dtype=np.uint8))
    batches = evaluation_batches(pictures, Dies(), 1, workers=2)
    with pytest.raises(
        InputError, match=r"--workers: a loading process died .*--workers 0"
    ) as told:
        list(batches)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        # As torch's signal handler raises it, wherever the main process is.
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), InputError),
        (RuntimeError("size mismatch"), RuntimeError),
    ],
)
def test_other_errors_stay_what_they_are(error, expected):
    with pytest.raises(expected) as told, report_dead_workers():
        raise error
    assert type(told.value) is expected


@pytest.mark.slow
@pytest.mark.parametrize("source", ["file", "standard input"])
def test_a_script_without_a_main_guard_runs_once(source, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "script.py").write_text(SCRIPT)
    script = str(tmp_path / "script.py") if source == "file" else "-"
    places = [str(tmp_path / each) for each in ("data", "run", "log")]
    done = subprocess.run(
        [sys.executable, script, *places],
        input=SCRIPT if source == "standard input" else None,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "trained cat dog"
    assert "Traceback" not in done.stderr
    assert (tmp_path / "log").read_text() == "begun\n"
