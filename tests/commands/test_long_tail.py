"""Runs with a loss, class weights or a sampler for unequal classes, and their scores for others."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lamp_fast import Classifier, cli, evaluate, predict, train
from lamp_fast.data.loading import evaluation_batches
from lamp_fast.data.sources import load_source
from lamp_fast.errors import InputError
from lamp_fast.runs.config import default_config
from lamp_fast.runs.experiment import assemble, load_run
from lamp_fast.runs.folder import CONFIG, RESULT
from lamp_fast.runs.prior import log_implied_prior
from lamp_fast.runs.trainer import Trainer
from lamp_fast.runs.training import training_settings

DIGITS = load_source("digits", None).classnames


def settings(out, *, precision="fp32", **optim):
    config = replace(default_config({"method": "coop"}), out=out)
    return replace(
        config,
        data=replace(config.data, imb=10.0, cap=20),
        machine=replace(config.machine, threads=1, precision=precision),
        optim=replace(config.optim, **({"epochs": 1, "warmup_epochs": 0, "batch": 6} | optim)),
    )


def trained(config):
    """A trainer that has trained, without the scores that follow."""
    config.out.mkdir()
    trainer = Trainer(assemble(config), config.out)
    trainer.run()
    return trainer


def losses_of(trainer):
    return [line["step_loss"] for line in trainer.progress.history]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """LDAM with given weights and drawn classes: an implied prior that nothing else has."""
    folder = tmp_path_factory.mktemp("long_tail")
    weights = dict(zip(DIGITS[:5], (1, 2, 3, 4, 5), strict=True))
    (folder / "weights.json").write_text(json.dumps(weights))
    given = {"loss": "ldam", "sampler": "sqrt", "class_weights": str(folder / "weights.json")}
    assert train.main(settings(folder / "run", epochs=2, **given)) == 0
    (folder / "weights.json").unlink()
    return folder / "run"


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Six scans as files."""
    place = tmp_path_factory.mktemp("scans")
    pictures = load_source("digits", None).test
    for index in range(6):
        Image.fromarray(pictures.arrays[index * 20]).save(place / f"{index}.png")
    return sorted(place.iterdir())


def call(module, config_class, *arguments):
    """A command's exit code, through its own entry."""
    with pytest.raises(SystemExit) as stop:
        cli.run(config_class, module.main, [str(each) for each in arguments])
    return stop.value.code


@pytest.mark.parametrize("sampler", ["balanced", "sqrt"])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, sampler):
    given = {"sampler": sampler, "loss": "focal", "epochs": 4}
    whole = trained(settings(tmp_path / "whole", **given))
    config = settings(tmp_path / "stopped", **given)
    config.out.mkdir()
    stopped, resumed = (Trainer(assemble(config), config.out) for _ in range(2))
    for epoch in range(2):
        stopped.progress.history.append(stopped._epoch(epoch))
        stopped.progress.epoch = epoch + 1
        stopped.save()
    resumed.restore()
    resumed.run()
    assert losses_of(resumed) == losses_of(whole)
    expected, got = whole.method.state_dict(), resumed.method.state_dict()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


@pytest.mark.parametrize(
    "given",
    [
        {"loss": "cb", "loss_beta": 0.9, "sampler": "balanced"},
        {"loss": "la", "class_weights": "auto"},
    ],
)
def test_pieces_of_a_batch_train_alike(tmp_path, given):
    """float64: 6 pictures in two pieces; weights to 1e-9, as with the plain loss."""
    states = [
        trained(
            settings(tmp_path / str(pieces), precision="fp64", accumulate=pieces, **given)
        ).method.state_dict()
        for pieces in (1, 2)
    ]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-9, atol=1e-9, msg=name)


def test_a_run_keeps_its_class_weights(run, tmp_path, capsys):
    """The file is gone; the run's content serves resuming, and another file is another run."""
    saved = json.loads((run / CONFIG).read_text())["settings"]["optim"]["class_weights"]
    assert json.loads(saved) == dict(zip(DIGITS[:5], map(float, (1, 2, 3, 4, 5)), strict=True))
    assert train.main(train.read_flags(["--out", str(run), "--resume"])) == 0
    assert "train   loss ldam, class weights given, sampler sqrt" in capsys.readouterr().out
    other = tmp_path / "other.json"
    other.write_text(json.dumps(dict.fromkeys(DIGITS[:5], 2)))
    again = ["--out", str(run), "--resume", "--class-weights", str(other)]
    with pytest.raises(InputError, match="--resume --class-weights"):
        train.main(train.read_flags(again))


def test_class_weights_from_python(tmp_path):
    """A dictionary is what a file holds."""
    weights = dict(zip(DIGITS[:5], (1, 2, 3, 4, 5), strict=True))
    file = tmp_path / "weights.json"
    file.write_text(json.dumps(weights))
    resolved = [
        assemble(training_settings({"cap": 8, "class_weights": given})).config.optim.class_weights
        for given in (weights, file)
    ]
    assert (
        resolved[0] == resolved[1] == json.dumps({name: float(weights[name]) for name in weights})
    )


def log_q(experiment):
    return log_implied_prior(
        experiment.config.optim,
        experiment.benchmark.counts.tolist(),
        experiment.benchmark.base_names,
    )


def table_rows(text):
    """Figures of the printed table by the row's name."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def test_evaluate_corrects_the_base_half(run, capsys):
    """Against the method's logits + log p - log q over all test pictures; the files stay."""
    experiment, _ = load_run(run)
    benchmark, method = experiment.benchmark, experiment.method
    classes = method.prepare(benchmark.base_names, benchmark.template, benchmark.origin)
    logits, labels = [], []
    for images, some, _ in evaluation_batches(
        benchmark.test_base, experiment.test_transform, experiment.config.machine.test_batch
    ):
        logits.append(method.logits(images.to(experiment.clip.dtype), classes))
        labels.append(some)
    logits, labels = torch.cat(logits), torch.cat(labels)

    def accuracy(shares):
        shift = np.log(shares / np.sum(shares)) - log_q(experiment)
        hits = (logits + torch.from_numpy(shift).to(logits)).argmax(1) == labels
        return f"{100 * hits.double().mean().item():.2f}"

    # Far from what is true of the test pictures, so that the figures differ.
    given = dict(zip(DIGITS, [1e-6, 1, 1e-6, 1, 1] * 2, strict=True))
    file = run.parent / "prior.json"
    file.write_text(json.dumps(given))
    before = {each.name: each.read_bytes() for each in run.iterdir() if each.is_file()}
    uniform, skewed = accuracy(np.ones(5)), accuracy(np.array([1e-6, 1, 1e-6, 1, 1]))
    assert float(skewed) < float(uniform) - 20
    assert call(evaluate, evaluate.EvaluateConfig, run) == 0
    plain = table_rows(capsys.readouterr().out)
    for word, prior, expected in (("uniform", "uniform", uniform), ("given", file, skewed)):
        assert call(evaluate, evaluate.EvaluateConfig, run, "--prior", prior) == 0
        out = capsys.readouterr().out
        rows = table_rows(out)
        assert f"prior   {prior}: scores as if" in out
        assert list(rows) == [f"{name}, prior {word}" for name in plain]
        assert rows[f"CoOp, prior {word}"]["acc base"] == expected
        if word == "uniform":  # zero-shot CLIP and the new half imply it already
            name = "CLIP zero-shot"
            assert list(rows[f"{name}, prior uniform"].values())[1:] == [*plain[name].values()][1:]
            assert rows["CoOp, prior uniform"]["acc new"] == plain["CoOp"]["acc new"]
    assert {each.name: each.read_bytes() for each in run.iterdir() if each.is_file()} == before


def test_scores_on_other_data_lie_apart_by_prior(run, capsys):
    """The run's own data set as another one: every name is known, half of them trained."""
    flags = ("--data", "digits", "--prior", "uniform")
    message = "prior uniform: 'five' was not trained, and training made the shares"
    assert call(evaluate, evaluate.EvaluateConfig, run, *flags) == 2
    assert message in capsys.readouterr().err
    balanced = run.parent / "la"
    assert train.main(settings(balanced, loss="la")) == 0
    for some in (flags[:2], flags):
        assert call(evaluate, evaluate.EvaluateConfig, balanced, *some) == 0
    plain = json.loads((balanced / "on_digits" / RESULT).read_text())
    apart = json.loads((balanced / "on_digits_prior_uniform" / RESULT).read_text())
    assert [row["name"] for row in apart] == [f"{row['name']}, prior uniform" for row in plain]
    assert [row["acc_base"] for row in apart] == [row["acc_base"] for row in plain]
    out = ("--out", balanced / "on_digits")
    assert call(evaluate, evaluate.EvaluateConfig, balanced, *flags, *out) == 2
    assert "template and prior" in capsys.readouterr().err


@pytest.mark.parametrize("prior", ["uniform", "train", "given"])
def test_classify_corrects_probabilities(run, scans, prior):
    """p(c) exp(shift_c), renormalised; float32 logits up to 100 have errors of 1e-5."""
    classifier = Classifier.load(run, device="cpu")
    experiment, _ = load_run(run)
    names = classifier.trained_names
    given = dict(zip(names, (5, 1, 1, 1, 2), strict=True))
    counts = experiment.benchmark.counts.tolist()
    shares = {"uniform": [1] * 5, "train": counts, "given": list(given.values())}[prior]
    shift = np.log(np.array(shares) / sum(shares)) - log_q(experiment)
    wanted = given if prior == "given" else prior
    plain = classifier.classify(scans, top=5)
    changed = classifier.classify(scans, top=5, prior=wanted)
    for before, after in zip(plain, changed, strict=True):
        odds = {
            name: probability * math.exp(shift[names.index(name)])
            for name, probability in zip(before.names, before.probabilities, strict=True)
        }
        total = sum(odds.values())
        for name, probability in zip(after.names, after.probabilities, strict=True):
            assert probability == pytest.approx(odds[name] / total, rel=1e-3, abs=1e-6)
    assert plain[0].probabilities != changed[0].probabilities


def test_classify_refuses_priors(run, scans):
    classifier = Classifier.load(run, device="cpu")
    for prior, expected in (
        ("test", "prior 'test': expected uniform, train or a share of each class"),
        ({"zero": 1}, "prior: lacks class 'one'"),
    ):
        with pytest.raises(InputError, match=expected):
            classifier.classify(scans, prior=prior)
    with pytest.raises(InputError, match="prior uniform: 'yak' was not trained"):
        classifier.classify(scans, [*classifier.trained_names, "yak"], prior="uniform")


def test_predict_says_which_prior(run, scans, tmp_path, capsys):
    file = tmp_path / "prior.json"
    file.write_text(json.dumps(given := {"zero": 3, "one": 1}))
    flags = ("--classes", "zero,one", "--json", "-")
    contents = {}
    for prior in ("none", "train", file):
        assert call(predict, predict.PredictConfig, run, *scans, *flags, "--prior", prior) == 0
        said = capsys.readouterr()
        contents[prior] = json.loads(said.out)
        assert (f"prior   {prior}" in said.err) == (prior != "none")
    assert [contents[each].get("prior") for each in contents] == [None, "train", given]
    classifier = Classifier.load(run, device="cpu")
    for answer, expected in zip(
        contents[file]["pictures"],
        classifier.classify(scans, ["zero", "one"], prior=given),
        strict=True,
    ):
        got = [(each["class"], each["probability"]) for each in answer["predictions"]]
        assert got == list(zip(expected.names, expected.probabilities, strict=True))
