"""When the state of a run is written, and that what is held until then is of the epoch's end."""

import json
import math

import pytest
import torch

from lamp_fast import train
from lamp_fast.runs import trainer
from lamp_fast.runs.checkpoint import Snapshot
from lamp_fast.runs.folder import CHECKPOINT, LEARNED, METRICS
from lamp_fast.runs.trainer import NonFiniteLossError, Trainer
from lamp_fast.tensors import load_tensors

EPOCHS = 4


def settings(out, *flags):
    words = ["--method", "clip-adapter", "--shots", "2", "--batch", "4", "--threads", "1"]
    return train.read_flags([*words, "--epochs", str(EPOCHS), "--out", str(out), *flags])


@pytest.fixture
def written(monkeypatch):
    """The epochs whose state was written."""
    epochs, write = [], Snapshot.write

    def record(snapshot, folder, expected):
        epochs.append(snapshot.progress.epoch)
        write(snapshot, folder, expected)

    monkeypatch.setattr(Snapshot, "write", record)
    return epochs


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, [0, 1, 2, 3, 4]), (math.inf, [0, EPOCHS])])
def test_how_often(tmp_path, monkeypatch, written, seconds, expected):
    """In the end always, and the log is as long as ever."""
    monkeypatch.setattr(trainer, "SECONDS_BETWEEN_CHECKPOINTS", seconds)
    assert train.main(settings(tmp_path / "run")) == 0
    assert written == expected
    lines = (tmp_path / "run" / METRICS).read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]


def test_a_second_epoch_waits_a_second(tmp_path, monkeypatch, written):
    now = [100.0]
    epoch = Trainer._epoch

    def timed(self, number):
        now[0] += 0.4
        return epoch(self, number)

    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Trainer, "_epoch", timed)
    assert train.main(settings(tmp_path / "run", "--epochs", "7")) == 0
    assert written == [0, 3, 6, 7]


@pytest.mark.parametrize("seconds", [0.0, math.inf])
@pytest.mark.parametrize("step", [0, 1])
def test_stopped_within_an_epoch(tmp_path, monkeypatch, seconds, step):
    """The steps since the last whole epoch leave no trace."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train.main(settings(whole)) == 0
    take, epoch = Trainer._take_step, [0]

    def stop(self, *batch):
        if self.progress.epoch == 2:
            epoch[0] += 1
            if epoch[0] > step:
                raise KeyboardInterrupt
        return take(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "SECONDS_BETWEEN_CHECKPOINTS", seconds)
        patch.setattr(Trainer, "_take_step", stop)
        with pytest.raises(KeyboardInterrupt, match="stopped after epoch 2"):
            train.main(settings(stopped))
    assert load_tensors(stopped / CHECKPOINT)[1]["epoch"] == 2
    assert len((stopped / METRICS).read_text().splitlines()) == 2
    assert train.main(settings(stopped, "--resume")) == 0
    expected, got = (load_tensors(each / LEARNED)[0] for each in (whole, stopped))
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_the_last_good_state_of_a_run_that_diverged(tmp_path, monkeypatch, capsys):
    check = Trainer._check_state

    def diverge(self, number):
        if number == 2:
            raise NonFiniteLossError(f"The last good checkpoint, of epoch {self.progress.epoch}")
        check(self, number)

    monkeypatch.setattr(trainer, "SECONDS_BETWEEN_CHECKPOINTS", math.inf)
    monkeypatch.setattr(Trainer, "_check_state", diverge)
    assert train.main(settings(tmp_path / "run")) == 1
    assert "last good checkpoint, of epoch 2" in capsys.readouterr().err
    assert load_tensors(tmp_path / "run" / CHECKPOINT)[1]["epoch"] == 2


def test_every_epoch_is_an_event(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(trainer, "SECONDS_BETWEEN_CHECKPOINTS", math.inf)
    assert train.main(settings(tmp_path / "run", "--tensorboard")) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [each.step for each in events.Scalars("loss")] == [1, 2, 3, 4]
