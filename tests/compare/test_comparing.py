"""A comparison of real methods on a folder of pictures: chosen by validation, tested once."""

import csv
import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from in_process import InProcess
from PIL import Image

from lamp_fast import cli
from lamp_fast.classifier import Classifier
from lamp_fast.clip.settings import caution
from lamp_fast.compare import attempt, comparing, probe, work
from lamp_fast.compare.comparing import compare
from lamp_fast.compare.results import Answers, choose, compare_with, figures_of
from lamp_fast.compare.settings import CompareConfig
from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.jobs.queue import OUT_OF_TIME, Failure
from lamp_fast.runs import training
from lamp_fast.runs.metrics import scores
from lamp_fast.runs.stats import mcnemar

CLASSES = ("ant", "bee", "cow")
METHODS = ("linear-probe", "ss-text")

pytestmark = pytest.mark.filterwarnings("ignore:.*never seen in the tiny", "ignore:Glyph")


def draw(root, poisoned=False):
    """Three classes of noise around a grey of their own; poisoned test folders hold others'."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 5), ("test", 5)):
        for place in range(len(CLASSES)):
            label = (place + 1) % 3 if poisoned and part == "test" else place
            folder = root / part / CLASSES[label]
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.normal(60 + 40 * place, 50, (16, 16, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def config_of(root, out, *flags):
    words = ["--data", "folder", "--root", root, "--clip", "tiny", "--threads", "1", "--out", out]
    words += ["--methods", *METHODS, "--trials", "0", *flags]
    config = cli.parse(CompareConfig, [str(each) for each in words])
    validate(config)
    return config


@contextmanager
def counted():
    """In this process; which runs were scored on their test pictures."""
    tested = []

    def evaluate_rows(experiment, *arguments):
        tested.append(experiment.config.method)
        return score(experiment, *arguments)

    score = training.evaluate_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "Queue", InProcess)
        patch.setattr(training, "evaluate_rows", evaluate_rows)
        yield tested


def read(out):
    return json.loads((out / "comparison.json").read_text())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def compared(pictures, tmp_path_factory):
    """A comparison that was stopped in its second fit, and went on."""
    out = tmp_path_factory.mktemp("compared") / "out"
    with counted() as tested, pytest.MonkeyPatch.context() as patch:
        fits = []

        def stop_second(settings, *arguments):
            fits.append(settings.method)
            if len(fits) == 2:
                raise KeyboardInterrupt
            return fit(settings, *arguments)

        fit = attempt._fit
        patch.setattr(attempt, "_fit", stop_second)
        with pytest.raises(KeyboardInterrupt):
            compare(config_of(pictures, out))
        assert tested == []
        assert not (out / "comparison.json").exists()
        assert compare(config_of(pictures, out)) == 0
    # The first fit was not done again, the second went on in another attempt.
    assert fits == [METHODS[0], METHODS[1], METHODS[1]]
    return out, tested


def test_each_method_is_tested_once_and_nothing_again(compared, pictures, capsys):
    out, tested = compared
    assert tested == list(METHODS)
    before = read(out)
    with counted() as again:
        assert compare(config_of(pictures, out)) == 0
    assert again == []
    assert {**read(out), "budget": None} == {**before, "budget": None}
    assert "fit     " not in capsys.readouterr().out


def test_what_is_chosen_is_ready_for_use(compared, pictures):
    out, _ = compared
    record = read(out)
    validation = {row["method"]: row["validation"]["macro_f1"]["value"] for row in record["rows"]}
    assert validation[record["chosen"]] == max(validation.values())
    saved = json.loads((out / "chosen" / "config.json").read_text())
    assert saved["settings"]["method"] == record["chosen"]
    result = json.loads((out / "chosen" / "result.json").read_text())[-1]
    row = next(each for each in record["rows"] if each["method"] == record["chosen"])
    assert row["test"]["accuracy"]["value"] == result["acc_base"]
    assert row["test"]["macro_f1"]["value"] == pytest.approx(result["f1_base"], abs=1e-15)
    classifier = Classifier.load(out / "chosen")
    assert len(classifier.classify([pictures / "test" / "ant" / "0.png"])) == 1
    with open(out / "comparison.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines if line["chosen"] == "True"] == [record["chosen"]]
    page = (out / "comparison.html").read_text()
    assert page.count("<svg") == 2
    assert all(row["title"] in page for row in record["rows"])
    assert caution("tiny", False, "folder") in page
    assert [each["val"] for each in record["classes"]] == [5, 5, 5]


def test_poisoned_test_labels_change_no_choice(compared, tmp_path):
    before = read(compared[0])
    poisoned = draw(tmp_path / "pictures", poisoned=True)
    with counted():
        assert compare(config_of(poisoned, tmp_path / "out")) == 0
    after = read(tmp_path / "out")
    assert after["chosen"] == before["chosen"]
    for one, other in zip(before["rows"], after["rows"], strict=True):
        assert one["validation"] == other["validation"]
        assert one["settings"] == other["settings"]
    assert [row["test"] for row in before["rows"]] != [row["test"] for row in after["rows"]]


def test_another_comparison_needs_another_folder(compared, pictures, tmp_path):
    out, _ = compared
    with pytest.raises(
        InputError, match=r"--seed 2: the comparison in .* begun with another \(1\)"
    ):
        compare(config_of(pictures, out, "--seed", "2"))
    (tmp_path / "note.txt").touch()
    with pytest.raises(InputError, match="holds something else than a comparison"):
        compare(config_of(pictures, tmp_path))
    with pytest.raises(InputError, match="lies in --root"):
        compare(config_of(pictures, pictures / "out"))


def test_what_fails_and_what_does_not_fit_are_rows(pictures, tmp_path, capsys):
    flags = ("--methods", "ss-text", "zeroshot", "coop", "linear-probe", "--budget", "1h")

    def refuse_one(config, *arguments):
        if config.method == "linear-probe":
            raise MemoryError("no more\nof it")
        found, clip = measure(config, *arguments)
        return (replace(found, step=1e6) if config.method == "coop" else found), clip

    measure = probe.measure
    with counted() as tested, pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "measure", refuse_one)
        assert compare(config_of(pictures, tmp_path / "out", *flags)) == 0
    rows = {row["method"]: row for row in read(tmp_path / "out")["rows"]}
    assert sorted(tested) == ["ss-text", "zeroshot"]
    assert (rows["linear-probe"]["state"], rows["linear-probe"]["why"]) == (
        "failed",
        "MemoryError: no more of it",
    )
    assert rows["coop"]["state"] == "left out"
    assert rows["coop"]["why"].startswith("predicted ")
    assert rows["coop"]["predicted_seconds"] > 1e6
    printed = capsys.readouterr().out
    assert "CoOp: left out, predicted " in printed
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "MemoryError: no more of it" in page


def test_a_probe_that_died_with_a_method_twice_goes_on_without_it(tmp_path):
    files = {name: probe.measured_file(tmp_path, name) for name in ("coop", "lamp")}
    probe.write_json(files["coop"], {"deaths": 2})
    probe.write_json(files["lamp"], {"step": 1.0})
    probe.measure_all({"coop": None, "lamp": None}, tmp_path, 0.0)
    assert "the process died" in json.loads(files["coop"].read_text())["failed"]
    assert json.loads(files["lamp"].read_text()) == {"step": 1.0}


def test_a_failure_is_told_in_its_own_words(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("one\nerror: --lr 3: expected less\nlast line\n")
    assert work.reason_of(Failure(None, "exit code 2", log)) == "--lr 3: expected less"
    log.write_text("Traceback\n  File\nRuntimeError: odd\n\n")
    assert work.reason_of(Failure(None, "exit code 1", log)) == "RuntimeError: odd"
    assert work.reason_of(Failure(None, OUT_OF_TIME, log)) == OUT_OF_TIME
    assert "memory" in work.reason_of(Failure(None, "killed by signal 9", log))
    assert work.reason_of(Failure(None, "exit code 1", Path("gone"))) == "exit code 1"


def test_a_comparison_with_the_chosen_one_is_of_the_same_pictures():
    labels = np.array([0, 0, 0, 1, 1, 2])
    predicted = {"a": [0, 0, 0, 1, 1, 2], "b": [0, 0, 1, 1, 1, 2], "c": [1, 1, 1, 0, 0, 0]}
    answers = {name: Answers(labels, np.array(each)) for name, each in predicted.items()}
    found = compare_with("a", answers, 3)
    assert found.keys() == {"b", "c"}
    for name, each in found.items():
        f1 = [scores(labels, answers[other].predicted, 3).macro_f1 for other in ("a", name)]
        assert each["difference"] == f1[0] - f1[1]
        assert each["p"] == mcnemar(answers["a"].right, answers[name].right)
        low, high = each["interval"]
        assert low <= each["difference"] <= high
    # The smaller p times 2; the other one is no smaller.
    assert found["c"]["p_holm"] == 2 * found["c"]["p"]
    assert found["b"]["p_holm"] == found["b"]["p"] == 1
    assert figures_of(answers, 3)["a"]["macro_f1"] == {"value": 1.0, "interval": (1.0, 1.0)}
    assert choose({"first": 0.5, "second": 0.5, "third": 0.4}) == "first"


@pytest.mark.slow
def test_in_processes_of_their_own_and_stopped_by_a_signal(pictures, tmp_path):
    """What was under way when the command was stopped is gone on with, and nothing done again."""
    command = [sys.executable, "-m", "lamp_fast.compare", "--data", "folder", "--root", pictures]
    command += ["--clip", "tiny", "--out", tmp_path / "out", "--trials", "0", "--budget", "1h"]
    command = list(map(str, [*command, "--methods", "ss-text", "zeroshot"]))
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    told = next(line for line in first.stdout if line.startswith("fit     SS-Text"))
    first.send_signal(signal.SIGTERM)
    assert first.communicate()[0].endswith("stopped; the same command goes on\n"), told
    assert first.returncode == cli.INTERRUPTED
    assert not (tmp_path / "out" / "comparison.json").exists()
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "probe   " not in second.stdout
    assert "fit     CLIP zero-shot" not in second.stdout
    rows = read(tmp_path / "out")["rows"]
    assert [row["state"] for row in rows] == ["tested", "tested"]
    assert all(row["predicted_seconds"] > 0 and row["took_seconds"] > 0 for row in rows)
