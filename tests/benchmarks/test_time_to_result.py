"""The curve of accuracy against seconds of training."""

import contextlib
import io
import json
from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks import time_to_result
from benchmarks.time_to_result import Settings, draw, run_config, seconds_to, table
from lamp_fast import train
from lamp_fast.methods import METHODS
from lamp_fast.runs.folder import RESULT


def short(method, epochs=2):
    config = run_config(method, 50.0, 1)
    return replace(config, optim=replace(config.optim, epochs=epochs, batch=32))


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(each, marks=pytest.mark.slow) for each in ("maple", "tip-f")), "ss-text"],
)
def test_a_curve_ends_where_the_run_itself_does(tmp_path, name):
    """Scoring on the way changes nothing, and the last score is that of the command."""
    config = short(name)
    curve = time_to_result.train(config)
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main(replace(config, out=tmp_path / "run")) in (0, None)
    rows = json.loads((tmp_path / "run" / RESULT).read_text())
    assert curve[-1][1] == rows[1]["hm_a"]
    assert len(curve) == (1 if name == "ss-text" else 3)
    assert all(before < after for (before, _), (after, _) in pairwise(curve))


def test_a_goal_is_reached_when_the_curve_first_gets_there():
    curve = [(0.5, 0.8), (1.0, 0.9), (1.5, 0.7), (2.0, 0.95)]
    assert seconds_to(curve, 0.9) == 1.0
    assert seconds_to(curve, 0.8) == 0.5
    assert seconds_to(curve, 0.96) is None


def test_the_table_says_how_many_seeds_got_there():
    curves = {"one": [[(1.0, 0.5), (2.0, 0.9)], [(1.0, 0.5), (4.0, 0.8)]], "none": [[], []]}
    lines = table(curves, (85.0, 99.0)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells[0] == ["one", "50.00", "85.00", "3.0", "2.0 (1 of 2)", "not reached"]
    assert cells[1] == ["none", *["n/a"] * 5]
    assert len(draw("title", curves).axes[0].lines) == 1


@pytest.mark.slow
def test_the_command_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    """A method without a score for new names has no curve."""
    monkeypatch.setattr(time_to_result, "run_config", lambda name, imb, seed: short(name, 1))
    methods = ("zeroshot", "linear-probe", "lfa")
    time_to_result.main(Settings(tmp_path, methods, seeds=(1, 2)))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        METHODS[name].title for name in methods
    ]
    record = json.loads((tmp_path / "time_to_result.json").read_text())
    assert [len(curve) for runs in record["curves"].values() for curve in runs] == [
        1,
        1,
        0,
        0,
        2,
        2,
    ]
    assert (tmp_path / "time_to_result.png").stat().st_size > 0
