"""Two real processes through torchrun and gloo, against one process alone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lamp_fast import train
from lamp_fast.data.loading import training_batches
from lamp_fast.data.pictures import Pictures
from lamp_fast.errors import InputError
from lamp_fast.files import read_json, write_json
from lamp_fast.runs.config import TrainConfig, to_saved
from lamp_fast.runs.folder import (
    CONFIG,
    LEARNED,
    METRICS,
    resume_or_choose_folder,
    resumed_defaults,
)
from lamp_fast.runs.ranks import Ranks, batch_sizes
from lamp_fast.runs.settings import OptimConfig
from lamp_fast.runs.training import _refuse_split_batches
from lamp_fast.tensors import load_tensors

BEFORE = Path(__file__).parents[1] / "before" / "zeroshot"

# 15 training and 15 new-class pictures: 3 batches of 5 an epoch, 3 + 2 rows on two ranks.
SHARED = (
    *("--precision", "fp64", "--epochs", "2", "--warmup-epochs", "0"),
    *("--shots", "3", "--batch", "5"),
)
FLAGS = (*SHARED, "--adapt-passes", "1", "--gamma", "0.1")


def launch(out: Path, *flags: str, torchrun: tuple[str, ...] = ()) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    common = SHARED if "--method" in flags else FLAGS
    command = ["-m", "lamp_fast.train", "--out", str(out), *common, *flags]
    return [*launcher, "--nproc-per-node=2", *torchrun, *command]


def run_two(out: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        launch(out, *flags),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
    )


def train_alone(out: Path, *flags: str) -> None:
    common = SHARED if "--method" in flags else FLAGS
    arguments = ["--out", str(out), *common, *flags]
    assert train.main(train.read_flags(arguments)) == 0


def learned(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return load_tensors(folder / LEARNED)


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """Counts and bias bit for bit, weights to 1e-9, the same table."""
    (expected, facts), (got, their_facts) = learned(one), learned(other)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        if "balance" in name:
            assert torch.equal(value, got[name]), name
        else:
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-9, msg=name)
    for key, value in (facts["adaptation"] or {}).items():
        assert their_facts["adaptation"][key] == pytest.approx(value, abs=1e-12), key
    for line, their in zip(history(one), history(other), strict=True):
        for key in {"loss", "cross_entropy", "similarity_loss", "step_loss"} & line.keys():
            assert their[key] == pytest.approx(line[key], abs=1e-6), key
        for key in {"accuracy", "activations", "epoch", "lr", "val_score"} & line.keys():
            assert their[key] == line[key], key
    for name in ("confusion_base.csv", "confusion_new.csv", "per_class.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            ("--text-query", "class", "--accumulate", "2", "--ahead", "9"),
            id="class",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (
                *("--sampler", "balanced", "--loss", "cb", "--loss-beta", "0.5"),
                *("--select", "best", "--patience", "1"),
            ),
            id="drawn",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--batch", "1", "--clip-grad", "0.5", "--epochs", "1", "--ahead", "4"),
            id="no-row",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_ranks_train_as_one(tmp_path, flags):
    answer = run_two(tmp_path / "two", *flags)
    assert answer.returncode == 0, answer.stderr
    train_alone(tmp_path / "one", *flags)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert answer.stdout.count("run     ") == 1
    assert answer.stdout.count("| LAMP ") == 1


@pytest.mark.slow
def test_what_a_stage_leaves_alone_stays_on_two_ranks(tmp_path):
    """2SFS, the second rank without a row: its sums make no gradient, so no decay, of zeros."""
    flags = ("--method", "2sfs", "--batch", "1", "--weight-decay", "0.5", "--lr", "0.01")
    answer = run_two(tmp_path / "two", *flags)
    assert answer.returncode == 0, answer.stderr
    train_alone(tmp_path / "one", *flags)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_loss_of_whole_batches_wants_one_process():
    config = replace(TrainConfig(), optim=OptimConfig(loss="lade"))
    _refuse_split_batches(config, Ranks(0, 1))
    with pytest.raises(InputError, match=r"--loss lade: compares .* expected one process, got 2"):
        _refuse_split_batches(config, Ranks(1, 2))


@pytest.mark.slow
def test_a_killed_rank_starts_again_from_the_checkpoint(tmp_path):
    """SIGKILL to the second rank: torchrun starts both anew, and the run ends as if undisturbed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ("--epochs", "12")
    launcher = subprocess.Popen(
        launch(killed, *flags, torchrun=("--max-restarts=1",)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while len(history(killed) if (killed / METRICS).is_file() else ()) < 2:
        assert time.monotonic() < deadline
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.02)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    second = next(int(pid) for pid in children if rank_of(pid) == "1")
    os.kill(second, signal.SIGKILL)
    stdout, stderr = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, stderr
    assert "resume  after epoch" in stdout
    train_alone(whole, *flags)
    assert_same_run(whole, killed)


def rank_of(pid: str) -> str | None:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((each[5:].decode() for each in variables if each.startswith(b"RANK=")), None)


@pytest.mark.slow
def test_a_mistake_is_reported_once(tmp_path):
    answer = run_two(tmp_path / "run", "--layers", "3..7")
    assert answer.returncode != 0
    assert answer.stderr.count("error: --layers 3..7") == 1
    assert not list(tmp_path.iterdir())


def test_restarts_need_a_folder_to_find_again(monkeypatch):
    """Otherwise a restarted run would begin in another folder."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(InputError, match="--out: missing; torchrun --max-restarts needs it"):
        resume_or_choose_folder(TrainConfig(), contextlib.ExitStack())


@pytest.mark.parametrize(("restarts", "launch", "resumed"), [(1, "a", 1), (0, "a", 0), (1, "b", 0)])
def test_only_the_same_launch_goes_on(tmp_path, monkeypatch, restarts, launch, resumed):
    """A restart resumes what its own torchrun began, with its settings, and nothing older."""
    for name, value in (("RUN_ID", "a"), ("RESTART_COUNT", restarts), ("MAX_RESTARTS", 3)):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", str(value))
    saved = replace(TrainConfig(), seed=7, out=tmp_path)
    record = read_json(BEFORE / CONFIG) | {"settings": to_saved(saved), "launch": launch}
    write_json(tmp_path / CONFIG, record)
    assert resumed_defaults({"out": tmp_path}).seed == (7 if resumed else 1)
    with contextlib.ExitStack() as made:
        config, folder = resume_or_choose_folder(replace(saved, overwrite=True), made)
    assert folder == tmp_path
    assert (config.resume, config.overwrite) == (bool(resumed), not resumed)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_rows_are_split_without_loss_or_overlap(count, size):
    parts = [list(range(count))[Ranks(rank, size).rows(count)] for rank in range(size)]
    assert [row for part in parts for row in part] == list(range(count))
    lengths = [len(each) for each in parts]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("size", "batch"), [(2, 5), (3, 2), (4, 3)])
def test_ranks_together_load_the_batches_of_one(size, batch):
    """Order, random transform and rows; no picture twice, none missing."""
    count = 11
    arrays = torch.arange(count, dtype=torch.uint8).numpy()[:, None, None, None]
    pictures = Pictures(
        names=tuple(map(str, range(count))),
        labels=torch.arange(count).numpy(),
        arrays=arrays.repeat(2, 1).repeat(2, 2).repeat(3, 3),
    )

    def transform(picture):
        return picture.float() + torch.rand(1)

    def batches():
        return training_batches(pictures, transform, batch, seed=3)

    whole = batches()
    sizes = batch_sizes(count, batch)[: len(whole)]
    parts = [Ranks(rank, size) for rank in range(size)]
    shares = [list(ranks.parts(ranks.share(batches()), sizes, epoch=2)) for ranks in parts]
    for number, expected in enumerate(whole.epoch(2)):
        rows = [share[number] for share in shares]
        assert {total for _, total in rows} == {len(expected[1])}
        for place in range(3):
            filled = [part[place] for part, _ in rows if len(part[place])]
            assert torch.equal(torch.cat(filled), expected[place])
