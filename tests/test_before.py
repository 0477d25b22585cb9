"""Run folders of every method that version 0.1.0 wrote: they load, resume and predict as they were.

``before/NAME`` is a run of four epochs on twenty digits a class; ``after_2.safetensors`` is its
checkpoint after two. LAMP's hold no ``phi`` and no ``similarity_gradient``: linear, and both.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lamp_fast import Classifier, evaluate, train
from lamp_fast.runs.config import load_config
from lamp_fast.runs.folder import CHECKPOINT, LEARNED, RESULT

BEFORE = Path(__file__).parent / "before"
RUNS = sorted(each.name for each in BEFORE.iterdir())
TRAINED = [name for name in RUNS if name != "zeroshot"]
# A processor with other vector units adds up in another order: float32's 6e-8 grows over some
# twenty steps of a rate of 3e-3, while one test picture in 269 is 4e-3.
SAME = {"rel": 1e-3, "abs": 1e-4}
ONE_PICTURE = 1 / 269


@pytest.fixture
def run(tmp_path, request):
    """A finished run folder, to write into."""
    folder = tmp_path / "run"
    shutil.copytree(BEFORE / request.param, folder)
    return folder


@pytest.mark.parametrize("name", ["lamp", "lamp-class"])
def test_settings_that_it_did_not_have_are_what_it_did(name):
    lamp = load_config(BEFORE / name / "config.json").own
    assert (lamp.phi, lamp.similarity_gradient) == ("linear", "both")


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_its_scores_come_out_again(run):
    before = json.loads((run / "result.json").read_text())
    assert evaluate.main(evaluate.EvaluateConfig(run)) == 0
    after = json.loads((run / "result.json").read_text())
    assert [row["name"] for row in after] == [row["name"] for row in before]
    for row, expected in zip(after, before, strict=True):
        for column in ("acc_base", "acc_new"):
            assert row[column] == pytest.approx(expected[column], abs=1.01 * ONE_PICTURE)


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_it_predicts(run):
    classifier = Classifier.load(run)
    pictures = [torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()]
    (answer,) = classifier.classify(pictures)
    assert set(answer.names) <= set(classifier.trained_names)
    assert sum(answer.probabilities) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("run", TRAINED, indirect=True)
def test_it_resumes_where_it_stopped(run):
    expected = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "after_2.safetensors").rename(run / CHECKPOINT)
    for name in (LEARNED, RESULT):
        (run / name).unlink()
    config = train.read_flags(["--out", str(run), "--resume"])
    assert train.main(config) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    for line, before in zip(lines[2:], expected[2:], strict=True):
        assert line["step_loss"] == pytest.approx(before["step_loss"], **SAME)
