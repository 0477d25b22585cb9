"""``--help`` of every command, and a flag that is refused, wait for nothing that computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lamp_fast

PACKAGE = Path(lamp_fast.__file__).parent
COMMANDS = sorted(
    [file.stem for file in PACKAGE.glob("*.py") if '__name__ == "__main__"' in file.read_text()]
    + [file.parent.name for file in PACKAGE.glob("*/__main__.py")]
)
HEAVY = {
    *("torch", "torchvision", "triton", "open_clip", "safetensors"),
    *("sklearn", "scipy", "matplotlib", "PIL", "jinja2", "onnx", "pyarrow"),
    *("starlette", "uvicorn", "prometheus_client"),
}
# METHODS imports the settings of all methods, so that one method's flags stand for all.
CALLS = {
    **{name: [name, "--help"] for name in COMMANDS},
    "train --method": ["train", "--method", "linear-probe", "--help"],
    "out of bounds": ["train", "--m", "0"],
    "a flag of another method": ["train", "--method", "coop", "--m", "3"],
    "together": ["train", "--method", "lfa", "--loss", "la"],
    "two outputs": ["predict", "run", "pictures", "--csv", "a.csv", "--out", "b"],
    "no room": ["serve", "run", "--queue", "2"],
    "no data": ["evaluate", "run", "--level", "genus"],
}
# Code, output, complaint, and what is imported by then, of each call in turn.
PROGRAM = """
import contextlib, io, json, runpy, sys
import lamp_fast
told = [[0, "", "", sorted(sys.modules)]]
for name, *flags in json.loads(sys.argv[1]):
    sys.argv = [name, *flags]
    out, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(complaint):
        try:
            runpy.run_module(f"lamp_fast.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code
    told.append([code, out.getvalue(), complaint.getvalue(), sorted(sys.modules)])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Of ``import lamp_fast`` and of every call, one after the other in one process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(list(CALLS.values()))],
        cwd=tmp_path_factory.mktemp("nowhere"),
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(("import", *CALLS), json.loads(done.stdout), strict=True))


def test_the_commands_are_found():
    assert {"train", "evaluate", "predict", "info", "cache", "data", "report"} <= {*COMMANDS}


@pytest.mark.parametrize("call", ["import", *CALLS])
def test_nothing_heavy_is_imported(told, call):
    """By this call or one before it."""
    assert not HEAVY & {name.partition(".")[0] for name in told[call][3]}


@pytest.mark.parametrize("call", CALLS)
def test_help_is_shown_and_mistakes_are_refused(told, call):
    code, shown, complaint, _ = told[call]
    if "--help" in CALLS[call]:
        assert (code, shown[:6], complaint) == (0, "usage:", "")
    else:
        assert (code, shown, complaint[:9], complaint.count("\n")) == (2, "", "error: --", 1)
