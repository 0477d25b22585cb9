"""The validation part: which runs hold one, and its scores beside those of each picture alone."""

import json
from dataclasses import replace

import pytest
import torch

from lamp_fast import train
from lamp_fast.errors import InputError
from lamp_fast.files import read_json
from lamp_fast.methods.zeroshot import ZeroShot
from lamp_fast.runs.config import load_config, uses_validation
from lamp_fast.runs.experiment import load_run
from lamp_fast.runs.folder import CONFIG
from lamp_fast.runs.validation import validation_logits


def settings(*flags):
    words = ["--shots", "2", "--batch", "4", "--threads", "1", "--epochs", "2"]
    return train.read_flags([*words, *map(str, flags)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of a method that reads features, its results aside."""
    out = tmp_path_factory.mktemp("validation") / "run"
    flags = "--method", "clip-adapter", "--validation", "on", "--out", out
    assert train.main(settings(*flags)) == 0
    return out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--method", "coop"], False),
        (["--method", "coop", "--validation", "on"], True),
        (["--method", "coop", "--data", "folder"], True),
        (["--method", "coop", "--data", "folder", "--validation", "off"], False),
        # It searches its own settings there.
        (["--method", "tip", "--validation", "off"], True),
        (["--method", "tip", "--tip-alpha", 1, "--tip-beta", 1], False),
    ],
)
def test_which_runs_hold_one(flags, expected):
    assert uses_validation(settings(*flags)) is expected


def test_a_run_from_before_holds_none(run, tmp_path):
    """Its pictures' hash is without validation pictures, also where they are somebody's own."""
    values = read_json(run / CONFIG)
    assert values["settings"].pop("selection")["validation"] == "on"
    values["settings"]["data"]["data"] = "folder"
    (tmp_path / CONFIG).write_text(json.dumps(values))
    assert not uses_validation(load_config(tmp_path / CONFIG))


@pytest.mark.parametrize("rows", [3, 100])
def test_scores_are_those_of_each_picture(run, rows):
    """Of a method that reads features, and of one that is given the pictures."""
    experiment, _ = load_run(run)
    machine = replace(experiment.config.machine, test_batch=rows, cache_size=0)
    experiment = replace(experiment, config=replace(experiment.config, machine=machine))
    benchmark = experiment.benchmark
    pictures = benchmark.val
    assert len(pictures) == 2 * len(benchmark.base_names)  # as many as training has, --shots 2
    for method in (experiment.method, ZeroShot(experiment.clip)):
        method.reads_features = method is experiment.method
        logits, labels = validation_logits(experiment, method)
        assert logits.dtype == torch.float32
        assert labels.tolist() == pictures.labels.tolist()
        classes = method.prepare(benchmark.base_names, benchmark.template, benchmark.origin)
        alone = []
        for index in range(len(pictures)):
            image = experiment.test_transform(pictures.load(index))[None]
            alone.append(method.logits(image, classes))
        # float32: a product over other rows adds in another order, 2^-24 a step of logits below
        # 100 whose cosines pass some ten layers.
        torch.testing.assert_close(logits, torch.cat(alone).float(), rtol=1e-4, atol=1e-3)


def test_without_one_it_is_refused(run):
    experiment, _ = load_run(run)
    none = replace(experiment.benchmark, val=experiment.benchmark.val.select([]))
    with pytest.raises(InputError, match="holds no validation picture"):
        validation_logits(replace(experiment, benchmark=none), experiment.method)
