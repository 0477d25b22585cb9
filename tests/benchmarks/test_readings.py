"""The study of LAMP's readings: its data, its runs and its tables."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import readings
from benchmarks.letters import Shift, letters
from benchmarks.readings import PRESET, Run
from lamp_fast.data.benchmark import build_benchmark
from lamp_fast.errors import InputError
from lamp_fast.methods.settings.lamp import LampSettings
from lamp_fast.pretrain import glyphs
from lamp_fast.runs.config import default_config
from lamp_fast.runs.experiment import assemble
from lamp_fast.runs.scoring import evaluate_rows


def test_the_letters_are_held_out_and_shifted():
    source = letters(train=3, test=2)
    assert source.classnames == glyphs.LETTERS
    assert np.bincount(source.train.labels).tolist() == [3] * 25
    assert np.bincount(source.test.labels).tolist() == [2] * 25
    assert not set(source.train.names) & set(source.test.names)
    again, other = letters(train=3, test=2), letters(train=3, test=2, seed=1)
    assert np.array_equal(source.test.arrays, again.test.arrays)
    assert not np.array_equal(source.test.arrays, other.test.arrays)
    plain = letters(train=3, test=2, shift=Shift(contrast=1.0, noise=0.0))
    # Ink at 0.6 and noise of 0.08: five deviations above what is left of a full pixel.
    assert plain.test.arrays.max() == 255
    assert source.test.arrays.max() < 255 * (0.6 + 5 * 0.08)


def test_the_shift_leaves_zero_shot_between_60_and_90_percent():
    benchmark = build_benchmark(
        letters(), split="base-new", imb=10, cap=readings.CAP, shots=None, seed=1
    )
    config = default_config({"method": "zeroshot"})
    experiment = assemble(config, (benchmark, (), "letters"))
    (zero_shot,) = evaluate_rows(experiment, 0.0, adapted=False)
    assert 0.6 < zero_shot.base.accuracy < 0.9
    assert 0.6 < zero_shot.new.accuracy < 0.9


def test_a_row_changes_what_it_says_and_nothing_else():
    preset = readings.run_config(Run(PRESET, 10, 1))
    assert preset.own == replace(LampSettings(), layers=(3, 4, 5, 6), adapt_passes=10)
    for row, changes in readings.ROWS.items():
        config = readings.run_config(Run(row, 10, 1))
        assert (config.optim != preset.optim) == ("logit_adjustment" in changes)
        changed = {name: value for name, value in changes.items() if name != "logit_adjustment"}
        assert config.own == replace(preset.own, **changed)
    files = {Run(row, 10, 1).file(readings.Path("x")) for row in readings.ROWS}
    assert len(files) == len(readings.ROWS)


def test_a_run_is_trained_once_and_scored(tmp_path, monkeypatch, capsys):
    small = letters(train=2, test=1)
    monkeypatch.setattr(readings, "letters", lambda: small)
    short = readings.run_config

    def two_epochs(run):
        config = short(run)
        return replace(config, optim=replace(config.optim, epochs=2))

    monkeypatch.setattr(readings, "run_config", two_epochs)
    config = readings.ReadingsConfig(out=tmp_path, imb=(2.0,), seeds=(1,), rows=(PRESET, "coop"))
    assert readings.main(config) == 0
    printed = capsys.readouterr().out
    assert "mlp, keys (the preset)" in printed
    file = Run(PRESET, 2.0, 1).file(tmp_path)
    before = file.read_bytes()
    assert len(json.loads(before)["history"]) == 2
    assert readings.main(config) == 0
    assert file.read_bytes() == before


def fake(row, seed, hm, zero_shot=0.7):
    rows = [dict.fromkeys(readings.METRICS, zero_shot), dict.fromkeys(readings.METRICS, hm)]
    history = [
        {"layers": [3, 4], "activations": [[3, 1], [2, 2]], "key_cosine": [0.5, 0.25]},
        {"layers": [3, 4], "activations": [[4, 0], [1, 3]], "key_cosine": [0.5, 0.75]},
    ]
    return Run(row, 10.0, seed), {"rows": rows, "history": history, "data": []}


def test_a_table_compares_on_the_same_seeds():
    found = dict(
        [
            fake(PRESET, 1, 0.80),
            fake(PRESET, 2, 0.90),
            fake("linear, keys", 1, 0.75),
            fake("linear, keys", 2, 0.95),
        ]
    )
    table = readings.score_table(found, list(readings.ROWS), 10.0).splitlines()
    zero_shot, preset, linear = table[2:]
    assert "70.00 ± 0.00" in zero_shot
    assert "85.00 ± 7.07" in preset
    # The differences are -5 and +5: none on average, and half of all sign flips reach 0.
    assert "+0.00 (1 of 2)" in linear
    assert "| 1.000 |" in linear


def test_loads_are_in_units_of_the_even_share():
    found = dict([fake(PRESET, 1, 0.8), fake(PRESET, 2, 0.8)])
    load = readings.loads(found, PRESET, 10.0)
    assert load.shape == (2, 2, 2, 2)
    assert load[0, 1].tolist() == [[2.0, 0.0], [0.5, 1.5]]
    last = readings.load_table(found, 10.0).splitlines()[-1]
    assert "2.0" in last
    assert "1.5" in last
    assert "25%" in last
    axes = readings.draw(found, 10.0).axes
    assert axes[0].lines[0].get_ydata() == pytest.approx([0.5, 1.0])


def test_an_unknown_row_is_refused():
    with pytest.raises(InputError, match="--rows 'mlp': expected some of"):
        readings.main(readings.ReadingsConfig(rows=("mlp",), train=False))
