"""Training from the command line to the last file: files, resume, refusals, schedule."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from lamp_fast import train
from lamp_fast.errors import InputError
from lamp_fast.runs.config import TrainConfig, apply_preset
from lamp_fast.runs.experiment import assemble, load_run
from lamp_fast.runs.folder import CHECKPOINT, CONFIG, LEARNED, resumed_defaults
from lamp_fast.runs.optimisation import build_criterion, learning_rate
from lamp_fast.runs.settings import OptimConfig
from lamp_fast.runs.trainer import Trainer
from lamp_fast.tensors import load_tensors

FILES = {
    "activations.png",
    "checkpoint.safetensors",
    "config.json",
    "confusion_base.csv",
    "confusion_new.csv",
    "curves.png",
    "learned.safetensors",
    "metrics.jsonl",
    "per_class.csv",
    "per_class.png",
    "result.json",
    "table.md",
}


def settings(out: Path, **optim) -> TrainConfig:
    config = apply_preset(TrainConfig(out=out), "tiny")
    return replace(
        config,
        own=replace(config.own, adapt_passes=1),
        optim=replace(config.optim, **({"epochs": 2} | optim)),
    )


def learned(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / LEARNED)[0]


def command(out: Path, *flags: str) -> list[str]:
    common = ("--out", str(out), "--adapt-passes", "1")
    return [sys.executable, "-m", "lamp_fast.train", *common, *flags]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished two-epoch run and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    answer = subprocess.run(
        command(folder, "--epochs", "2", "--threads", "1", "--precision", "fp32"),
        capture_output=True,
        text=True,
        check=True,
    )
    return folder, answer


def test_a_run_leaves_every_file_and_says_what_it_did(finished):
    folder, answer = finished
    assert {each.name for each in folder.iterdir()} == FILES
    for word in ("clip    tiny", "quick_gelu", "data    ", "method  lamp", "LAMP", "zero-shot"):
        assert word in answer.stdout, word
    assert (folder / "table.md").read_text().strip() in answer.stdout
    record = json.loads((folder / "config.json").read_text())
    assert record["settings"]["lamp"]["layers"] == [3, 4, 5, 6]
    assert len(record["clip"]["fingerprint"]) == len(record["data"]["sha256"]) == 64
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    rows = [sum(counts) for counts in lines[0]["activations"]]
    seen = len(lines[0]["step_loss"]) * 16
    assert rows == [seen * 2] * 4  # K = 2 choices of every picture, in each of four layers
    assert not any("model." in name or "visual." in name for name in learned(folder))


def test_evaluate_reproduces_the_table_to_the_digit(finished):
    folder, _ = finished
    answer = subprocess.run(
        [sys.executable, "-m", "lamp_fast.evaluate", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (folder / "table.md").read_text().strip() in answer.stdout


def test_the_result_file_holds_what_the_table_shows(finished):
    folder, _ = finished
    rows = json.loads((folder / "result.json").read_text())
    names = [row["name"] for row in rows]
    assert names == ["CLIP zero-shot", "LAMP", "LAMP, b_new on new (transductive)"]
    zero_shot, lamp, adapted = rows
    assert zero_shot["parameters"] == 0
    assert lamp["parameters"] > 0
    assert adapted["acc_base"] == lamp["acc_base"]
    for row in rows:
        base, new = row["acc_base"], row["acc_new"]
        assert row["hm_a"] == pytest.approx(2 * base * new / (base + new))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, precision):
    """SIGKILL at three random moments, then run on: the weights of a run that never died."""
    flags = ("--epochs", "6", "--threads", "1", "--imb", "50", "--precision", precision)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, *flags), check=True, capture_output=True)
    moments = random.Random(11)
    extra: tuple[str, ...] = flags
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(
            command(killed, *extra), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for line in process.stdout:
            if line.startswith("run "):
                break
        time.sleep(moments.uniform(0.0, 1.5))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
        extra = ("--resume",)
    assert kills == 3, "the run finished before it could be killed: make it longer"
    subprocess.run(command(killed, "--resume"), check=True, capture_output=True)
    expected, got = learned(whole), learned(killed)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    keys = ("loss", "accuracy", "activations", "step_loss", "lr")
    histories = [
        [
            {key: json.loads(line)[key] for key in keys}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (whole, killed)
    ]
    assert histories[0] == histories[1]


def test_interrupt_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(out, "--epochs", "200", "--threads", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the suite in the background has it ignore interrupts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stdout:
            if line.startswith("run "):
                break
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"--out {out} --resume" in stderr
    assert "Traceback" not in stderr
    assert (out / CHECKPOINT).is_file()


def test_a_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    config = settings(out, epochs=3, warmup_epochs=1, lr=1e30, optimiser="adam")
    assert train.main(config) == 1
    message = capsys.readouterr().err
    assert "the loss is" in message
    assert "of epoch" in message
    assert str(out) in message
    tensors, facts = load_tensors(out / CHECKPOINT)
    assert facts["epoch"] >= 1
    assert all(
        torch.isfinite(value).all() for value in tensors.values() if value.is_floating_point()
    )
    assert not (out / LEARNED).exists()


@pytest.mark.parametrize("text_query", ["image", pytest.param("class", marks=pytest.mark.slow)])
def test_accumulation_changes_nothing_but_rounding(tmp_path, text_query):
    """Float64: three pieces a batch, the same selections, bias bit for bit, weights to 1e-9."""
    results = []
    for pieces in (1, 3):
        config = settings(tmp_path / str(pieces), accumulate=pieces, epochs=1, warmup_epochs=0)
        config = replace(
            config,
            own=replace(config.own, text_query=text_query),
            machine=replace(config.machine, precision="fp64"),
        )
        assert train.main(config) == 0
        results.append(learned(config.out))
    for name, value in results[0].items():
        if "balance" in name:
            assert torch.equal(value, results[1][name]), name
        else:
            torch.testing.assert_close(value, results[1][name], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_results_do_not_depend_on_worker_processes(tmp_path):
    results = []
    for workers in (0, 2):
        config = settings(tmp_path / str(workers), epochs=1, warmup_epochs=0)
        config = replace(config, machine=replace(config.machine, workers=workers, threads=1))
        train.main(config)
        results.append(learned(config.out))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_filled_folder_is_refused_then_overwritten(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    for config in (settings(out), replace(settings(out), overwrite=True)):
        with pytest.raises(InputError, match=r"not empty|not the folder of a run"):
            train.main(config)
    assert (out / "thesis.tex").read_text() == "precious"
    (out / "thesis.tex").unlink()
    assert train.main(settings(out, epochs=1)) == 0
    with pytest.raises(InputError, match="--resume to go on, --overwrite to replace"):
        train.main(settings(out, epochs=1))
    assert train.main(replace(settings(out, epochs=1), overwrite=True, seed=2)) == 0
    assert json.loads((out / "config.json").read_text())["settings"]["seed"] == 2
    with pytest.raises(InputError, match=r"--resume --seed 3: the run in .* was begun with 2"):
        train.main(replace(settings(out, epochs=1), resume=True, seed=3))


@pytest.mark.parametrize("file", [LEARNED, CONFIG])
def test_evaluate_names_a_damaged_file(finished, tmp_path, file):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=file):
        load_run(copy)


def test_evaluate_refuses_another_clip(finished, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    record = json.loads((copy / "config.json").read_text())
    record["clip"]["fingerprint"] = "0" * 64
    (copy / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="CLIP weights are not those of the run"):
        load_run(copy)


def test_saved_settings_serve_as_defaults(finished):
    config = resumed_defaults({"config": finished[0] / "config.json"})
    assert config.optim.epochs == 2
    assert config.own.layers == (3, 4, 5, 6)
    assert config.preset == "tiny"
    assert config.out is None  # another run than the one whose settings it takes


@pytest.mark.parametrize(
    ("epochs", "warmup", "expected"),
    [
        # PEERS 1.1: lr/2 (1 + cos(pi (e - W) / E)), E not reduced by W
        (5, 1, [1e-5, 1.0, *(0.5 * (1 + math.cos(math.pi * e / 5)) for e in (1, 2, 3))]),
        (2, 1, [1e-5, 1.0]),
        (1, 1, [1.0]),
        (3, 0, [1.0, 0.75, 0.25]),
    ],
)
def test_learning_rate(epochs, warmup, expected):
    optim = OptimConfig(lr=1.0, epochs=epochs, warmup_epochs=warmup)
    rates = [learning_rate(optim, epoch) for epoch in range(epochs)]
    assert rates == pytest.approx(expected)
    if epochs == 5:
        assert rates[-1] == pytest.approx(0.35, abs=0.005)


def test_logit_adjustment():
    """CE(logits + tau log prior), against a loop over the definition."""
    counts = [6, 3, 1]
    criterion = build_criterion(
        OptimConfig(logit_adjustment=True, tau=1.5), counts, torch.device("cpu")
    )
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 2])
    losses = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        adjusted = [x + 1.5 * math.log(n / 10) for x, n in zip(row, counts, strict=True)]
        losses.append(math.log(sum(map(math.exp, adjusted))) - adjusted[label])
    assert criterion(logits, labels).item() == pytest.approx(sum(losses) / 4)


@pytest.mark.slow
def test_the_default_runs_curve_is_literals(tmp_path):
    """The embedded default, float64, the first 24 steps: losses of both paths to 1e-9.

    Equal curves also say that no choice hung on rounding: another choice is another loss.
    """
    curves = []
    for path in ("exact", "literal"):
        config = settings(tmp_path / path, epochs=2)
        config = replace(config, machine=replace(config.machine, precision="fp64", path=path))
        trainer = Trainer(assemble(config), config.out)
        trainer.run()
        curves.append([loss for line in trainer.progress.history for loss in line["step_loss"]])
    assert len(curves[0]) == 24
    assert curves[0] == pytest.approx(curves[1], rel=1e-9, abs=1e-9)
