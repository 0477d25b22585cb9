"""A full disk, a folder that is taken, a process that dies: one line, nothing half-written."""

import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lamp_fast import cli, train
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.data.settings import DataConfig
from lamp_fast.errors import InputError
from lamp_fast.files import read_json, write_bytes, write_json
from lamp_fast.methods.lamp import model
from lamp_fast.runs import training
from lamp_fast.runs.config import TrainConfig, apply_preset
from lamp_fast.runs.experiment import load_run
from lamp_fast.runs.folder import CHECKPOINT, CONFIG, LEARNED, LOCK, RESULT, hold_folder
from lamp_fast.runs.scoring import evaluate_rows
from lamp_fast.runs.trainer import Trainer
from lamp_fast.tensors import load_tensors

BEFORE = Path(__file__).parents[1] / "before"


def settings(out, **changes) -> TrainConfig:
    """Two epochs on two pictures a class."""
    config = apply_preset(TrainConfig(out=out, clip=ClipConfig("tiny"), **changes), "tiny")
    return replace(
        config,
        data=replace(config.data, shots=2),
        optim=replace(config.optim, epochs=2),
        own=replace(config.own, adapt_passes=1),
    )


def command(config: TrainConfig) -> int:
    """Exit code of the command with these settings."""
    with pytest.raises(SystemExit) as stop:
        cli.run_read(lambda _: config, train.main, [])
    return stop.value.code


@pytest.fixture
def limit_file_size():
    """A function that stops files from growing beyond some bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def child():
    """A function that runs another in a forked process, which is killed at the end."""
    children = []

    def start(function, *arguments):
        pid = os.fork()
        if pid == 0:
            try:
                function(*arguments)
            finally:
                os._exit(1)
        children.append(pid)
        return pid

    def kill(pid):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        children.remove(pid)

    start.kill = kill
    yield start
    for pid in list(children):
        kill(pid)


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path, capsys, limit_file_size):
    """The first checkpoint fits; with the optimiser's state it is three times as large."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert command(settings(whole)) == 0
    capsys.readouterr()
    limit_file_size(200_000)
    assert command(settings(out)) == 1
    limit_file_size(resource.RLIM_INFINITY)
    assert capsys.readouterr().err == f"error: {out / CHECKPOINT}: File too large\n"
    assert {each.name for each in out.iterdir()} == {
        "checkpoint.safetensors",
        "config.json",
        "metrics.jsonl",
    }
    assert load_tensors(out / CHECKPOINT)[1]["epoch"] == 0
    assert command(settings(out, resume=True)) == 0
    expected, got = (load_tensors(each / LEARNED)[0] for each in (whole, out))
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


@pytest.mark.slow
def test_the_block_is_a_fact_that_a_resume_takes_over(tmp_path, monkeypatch):
    """However much memory is free by then: another block would add up in another order."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert command(settings(whole)) == 0
    block = read_json(whole / CONFIG)["block"]
    assert read_json(whole / CONFIG)["settings"]["trim"]["block"] is None
    epoch = Trainer._epoch

    def stop(trainer, number):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(trainer, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", stop)
        assert command(settings(out)) == cli.INTERRUPTED
    monkeypatch.setattr(model, "free_memory", lambda device: 1)
    assert command(settings(tmp_path / "poor")) == 0
    assert read_json(tmp_path / "poor" / CONFIG)["block"] < block
    assert command(settings(out, resume=True)) == 0
    assert read_json(out / CONFIG)["block"] == block
    expected, got = (load_tensors(each / LEARNED)[0] for each in (whole, out))
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    experiment, _ = load_run(out)
    assert (experiment.block, experiment.method.block) == (block, block)


def test_an_interrupt_says_what_it_left(tmp_path, capsys, monkeypatch):
    """While it is scored a run can be gone on with; before it began there is nothing to say."""

    def interrupt(*_):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    monkeypatch.setattr(training, "evaluate_rows", interrupt)
    assert command(settings(out)) == cli.INTERRUPTED
    assert f"--out {out} --resume goes on" in capsys.readouterr().err
    monkeypatch.setattr(training, "assemble", interrupt)
    assert command(settings(tmp_path / "other")) == cli.INTERRUPTED
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_run_goes_on_where_its_pictures_have_moved(tmp_path, capsys):
    """Their bytes say that they are the same; other bytes are refused."""
    pictures, moved = tmp_path / "pictures", tmp_path / "moved"
    for number in range(12):
        folder = pictures / ("train", "test")[number % 2] / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    config = settings(tmp_path / "run", data=DataConfig(data="folder", root=pictures))
    assert command(config) == 0
    pictures.rename(moved)
    there = replace(config, data=replace(config.data, root=moved), resume=True)
    assert command(there) == 0
    rows = read_json(tmp_path / "run" / RESULT)
    experiment, facts = load_run(tmp_path / "run", root=moved)
    found = evaluate_rows(experiment, facts["seconds"], False)
    assert [each.row(experiment.benchmark)["acc_base"] for each in found] == [
        row["acc_base"] for row in rows
    ]
    Image.new("RGB", (8, 8), (0, 99, 0)).save(moved / "train" / "a" / "0.png")
    capsys.readouterr()
    assert command(there) == 2
    assert "--resume: the data differs" in capsys.readouterr().err
    with pytest.raises(InputError, match="the data are not those of the run"):
        load_run(tmp_path / "run", root=moved)


def test_a_run_of_lists_goes_on_where_they_have_moved(tmp_path):
    pictures, moved = tmp_path / "pictures", tmp_path / "moved"
    pictures.mkdir()
    for part in ("train", "test"):
        lines = []
        for number in range(6):
            path = pictures / "abc"[number % 3] / f"{part}{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0 if part == "train" else 9)).save(path)
            lines.append(f"{path.relative_to(pictures)} {number % 3}")
        (pictures / f"{part}.txt").write_text("\n".join(lines))

    def lists(folder):
        return {part: folder / f"{part}.txt" for part in ("train", "test")}

    out = tmp_path / "run"
    config = settings(out, data=DataConfig(data="list", **lists(pictures)))
    assert command(replace(config, out=pictures.parent)) == 2  # the lists lie in it
    assert command(config) == 0
    pictures.rename(moved)
    data = replace(config.data, **lists(moved))
    assert command(replace(config, data=data, resume=True)) == 0
    with pytest.raises(InputError, match=r"--train .*: does not exist"):
        load_run(out)
    experiment, facts = load_run(out, **lists(moved))
    found = evaluate_rows(experiment, facts["seconds"], False)
    assert [each.row(experiment.benchmark)["acc_base"] for each in found] == [
        row["acc_base"] for row in read_json(out / RESULT)
    ]


def test_a_full_disk_is_told_at_once(tmp_path, capsys, limit_file_size):
    out = tmp_path / "run"
    limit_file_size(0)
    code = command(settings(out))
    limit_file_size(resource.RLIM_INFINITY)
    assert code == 1
    assert capsys.readouterr().err == f"error: {out / CONFIG}: File too large\n"
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_folder(tmp_path, capsys):
    (tmp_path / "shelf").mkdir(mode=0o500)
    out = tmp_path / "shelf" / "run"
    assert command(settings(out)) == 2
    assert capsys.readouterr().err == f"error: --out {out}: cannot be written (Permission denied)\n"


def test_a_killed_writer_leaves_the_old_file_or_the_new(tmp_path, child):
    file, size = tmp_path / "run" / "file", 1 << 20

    def write_for_ever():
        while True:
            for letter in (b"a", b"b"):
                write_bytes(file, letter * size)

    for moment in (0.03, 0.011, 0.027, 0.019, 0.041, 0.023):
        writer = child(write_for_ever)
        deadline = time.monotonic() + 30
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moment)
        child.kill(writer)
        assert file.read_bytes() in (b"a" * size, b"b" * size)
    (file.parent / ".file.1.partial").write_text("what a killed process may leave")
    with hold_folder(file.parent):
        pass
    assert list(file.parent.iterdir()) == [file]


def test_two_runs_into_one_folder(tmp_path, child):
    """Refused while the first lives, whatever the second is told; free once it is dead."""
    out = tmp_path / "run"

    def hold_for_ever():
        with hold_folder(out):
            write_json(out / CONFIG, read_json(BEFORE / "zeroshot" / CONFIG))
            signal.pause()

    holder = child(hold_for_ever)
    deadline = time.monotonic() + 30
    while not (out / CONFIG).is_file():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    before = {each.name for each in out.iterdir()}
    with pytest.raises(InputError, match=f"--out {out}: another run is writing there"):
        train.main(settings(out, overwrite=True))
    with pytest.raises(InputError, match=f"--out {out}: not empty"):
        train.main(settings(out))
    assert {each.name for each in out.iterdir()} == before
    child.kill(holder)
    with hold_folder(out):
        assert (out / LOCK).exists()
    assert not (out / LOCK).exists()


def test_a_run_that_comes_second_by_a_moment(tmp_path, monkeypatch):
    """Both found the folder empty; the one that fills it first keeps it."""
    out = tmp_path / "run"
    assemble = training.assemble

    def slowly(*arguments):
        write_json(out / CONFIG, {"of": "the other"})
        return assemble(*arguments)

    monkeypatch.setattr(training, "assemble", slowly)
    with pytest.raises(InputError, match=f"--out {out}: not empty"):
        train.main(settings(out))
    assert read_json(out / CONFIG) == {"of": "the other"}
    assert {each.name for each in out.iterdir()} == {CONFIG}
