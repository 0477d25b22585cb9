"""Class names that a run cannot take are refused before its first step, and leave nothing."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lamp_fast import evaluate, train
from lamp_fast.classifier import Classifier
from lamp_fast.errors import InputError
from lamp_fast.methods import METHODS
from lamp_fast.runs import experiment
from lamp_fast.runs.experiment import assemble
from lamp_fast.runs.folder import CONFIG
from lamp_fast.runs.training import training_settings

pytestmark = pytest.mark.filterwarnings("ignore:.*never seen in the tiny")

LONG = " ".join(["a very long museum label"] * 16)


def draw(root, *classes, count=6):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def rename(root, **names):
    (root / "classes.json").write_text(json.dumps(names))


def settings(root, **flags):
    flags = {"data": "folder", "root": root, "clip": "tiny", "epochs": 1, **flags}
    return training_settings(flags)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    draw(folder / "data", "a1", "a2")
    Classifier.train(data="folder", root=folder / "data", clip="tiny", epochs=1, out=folder / "run")
    return folder / "run"


@pytest.mark.parametrize("method", METHODS)
def test_a_long_name_of_the_new_half(method, tmp_path):
    root = draw(tmp_path / "data", "a1", "a2", "z1", "z2")
    rename(root, z2=LONG)
    config = settings(root, split="base-new", method=method)
    with pytest.raises(InputError, match=r"class prompt '.*longer than 77 tokens"):
        train.main(replace(config, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_template_that_only_zero_shot_clip_reads(tmp_path):
    """CoOp has a prompt of its own, but the table's first row has the data set's."""
    root = draw(tmp_path / "data", "a1", "a2")
    config = settings(root, method="coop")
    built = assemble(config)
    long = replace(built.benchmark, template="a photo of " * 30 + "{}.")
    with pytest.raises(InputError, match="longer than 77 tokens"):
        experiment.check_class_prompts(built.method, long, distinct=True)


def test_a_target_with_a_long_name(run, tmp_path):
    root = draw(tmp_path / "data", "a1", "z1")
    rename(root, z1=LONG)
    with pytest.raises(InputError, match="longer than 77 tokens"):
        evaluate.main(evaluate.EvaluateConfig(run, data="folder", root=root))
    assert not (run / "on_folder").exists()


def test_names_of_the_same_tokens_are_not_trained_against_each_other(tmp_path):
    root = draw(tmp_path / "data", "Cat", "dog", "cat")
    config = settings(root)
    with pytest.raises(InputError, match="--data folder: class names: 'Cat' and 'cat' give the"):
        train.main(replace(config, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_target_with_names_of_the_same_tokens(run, tmp_path):
    root = draw(tmp_path / "data", "Cat", "dog", "cat")
    with pytest.raises(InputError, match="'Cat' and 'cat' give the same tokens"):
        evaluate.main(evaluate.EvaluateConfig(run, data="folder", root=root))


def test_a_class_folder_that_is_not_utf_8(tmp_path):
    root = draw(tmp_path / "data", "dog", os.fsdecode(b"caf\xe9"))
    config = settings(root)
    with pytest.raises(InputError, match=r"class names: 'caf\\udce9' is not UTF-8") as error:
        train.main(replace(config, out=tmp_path / "run"))
    assert str(error.value).isascii()
    assert not (tmp_path / "run").exists()


def test_a_run_of_such_names_from_before_is_still_scored(run, tmp_path):
    """Version 0.1.0 trained it; its labels are what they were."""
    record = json.loads((run / CONFIG).read_text())
    root = draw(tmp_path / "data", "a1", "a2")
    rename(root, a1="Ox", a2="ox")
    moved = tmp_path / "run"
    moved.mkdir()
    for file in run.iterdir():
        if file.is_file():
            (moved / file.name).write_bytes(file.read_bytes())
    record["data"]["base_names"] = ["Ox", "ox"]
    record["settings"]["data"]["root"] = str(root)
    (moved / CONFIG).write_text(json.dumps(record))
    assert evaluate.main(evaluate.EvaluateConfig(moved)) == 0
    assert Classifier.load(moved).check_names(["Ox", "ox", "zebra"])


def test_published_lists_may_share_names(run):
    """ImageNet's has two "missile"."""
    built = assemble(training_settings({"data": "digits", "shots": 1}))
    names = {"base_names": ("missile", "ox"), "new_names": ("missile", "hen")}
    imagenet = replace(built.benchmark, name="imagenet", **names)
    experiment.check_class_prompts(built.method, imagenet, distinct=True)
    with pytest.raises(InputError, match="'missile' is named 2 times"):
        experiment.check_class_prompts(
            built.method, replace(imagenet, name="folder"), distinct=True
        )


def test_trained_classes_are_counted_where_they_share_a_name(run):
    there = Classifier.load(run)
    named = {"base_names": ["missile", "ox", "missile"], "new_names": ["missile", "hen"]}
    record = {**there.record, "data": {**there.record["data"], **named}}
    classifier = Classifier(there.method, there.config, record, there.facts, there.results, None)
    asked = [*classifier.trained_names, *classifier.new_names]
    assert classifier.are_trained(asked) == (True, True, True, False, False)
    assert classifier.check_names(asked) == tuple(asked)
    classifier.facts = {**classifier.facts, "adaptation": {}}
    assert classifier.bias_for(["hen", "missile"]) == "adapted"
    assert classifier.bias_for(["hen", "missile", "missile"]) == "trained"
