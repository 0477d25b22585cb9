"""Answers with what a run has fitted on validation pictures: predict, evaluate, the report."""

import csv
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lamp_fast import evaluate, predict, train
from lamp_fast.answers.asked import Asked
from lamp_fast.answers.calibration import fit_temperature
from lamp_fast.classifier import Classifier
from lamp_fast.data.sources import load_source
from lamp_fast.errors import InputError
from lamp_fast.files import read_json
from lamp_fast.methods.text import zero_shot_texts
from lamp_fast.report import page as page_module
from lamp_fast.runs import growing
from lamp_fast.runs.answering import Situation, decide
from lamp_fast.runs.experiment import load_run
from lamp_fast.runs.fitted import fit, read_fitted
from lamp_fast.runs.folder import ANSWERS, RELIABILITY, VALIDATION
from lamp_fast.runs.reliability import read_reliability
from lamp_fast.runs.saved import load
from lamp_fast.tensors import load_tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of a method whose texts are learned: five classes of 8 to 1 pictures, 20 of validation."""
    out = tmp_path_factory.mktemp("answers") / "run"
    words = "--shots 8 --imb 8 --batch 4 --threads 1 --epochs 2 --warmup-epochs 0 --method coop"
    flags = [*words.split(), "--validation", "on", "--out", str(out)]
    assert train.main(train.read_flags(flags)) == 0
    return out


@pytest.fixture(scope="module")
def classifier(run):
    return Classifier.load(run, device="cpu")


@pytest.fixture(scope="module")
def scans():
    """Forty, of trained and other digits."""
    return load_source("digits", None).test.arrays[:40]


@pytest.fixture
def folder(tmp_path, scans):
    place = tmp_path / "pictures"
    place.mkdir()
    for number, scan in enumerate(scans[:11]):
        Image.fromarray(scan).save(place / f"{number:02}.png")
    return place


def logits_of(classifier, scans, names):
    """Scores as the method gives them, one picture after the other."""
    classes = classifier.method.prepare(names, classifier.template, classifier.origin)
    images = [classifier._transform(torch.tensor(scan).permute(2, 0, 1))[None] for scan in scans]
    return torch.cat([classifier.method.logits(each, classes) for each in images]).double()


def whole(prediction, names):
    """Probabilities in the order of the names."""
    by_name = dict(zip(prediction.names, prediction.probabilities, strict=True))
    return [by_name[name] for name in names]


def test_what_is_kept_is_fitted_on_the_validation_scores(run):
    held, _ = load_tensors(run / VALIDATION)
    fitted = load(run).fitted
    logits, labels = held["logits"].double(), held["labels"]
    assert fitted.labels == tuple(labels.tolist())
    assert (fitted.seed, fitted.selected, fitted.tte) == (1, False, False)
    # 8, 4, 2, 1, 1 pictures: the head is the one largest class of five.
    assert fitted.tail == (1, 2, 3, 4)
    temperature = fit_temperature(logits, labels).value
    assert fitted.temperature == temperature
    likely = (logits / temperature).softmax(1)
    right = likely[torch.arange(len(labels)), labels]
    # z / T in place of z (1 / T): two roundings of numbers up to 100.
    assert fitted.probability == pytest.approx(likely.amax(1).tolist(), rel=1e-12)
    assert fitted.nonconformity == pytest.approx((1 - right).tolist(), abs=1e-12)
    assert fitted.energy == pytest.approx(logits.logsumexp(1).tolist(), rel=1e-14)
    scale = load_run(run)[0].clip.logit_scale
    assert fitted.cosine == pytest.approx((logits.amax(1) / float(scale)).tolist(), rel=1e-14)


def test_probabilities_are_calibrated_and_answers_stay(classifier, scans):
    names, scale = classifier.trained_names, 1 / classifier.fitted.temperature
    plain = Classifier(classifier.method, classifier.config, classifier.record, classifier.facts)
    before, after = (each.classify(scans, top=9) for each in (plain, classifier))
    assert [each.names for each in before] == [each.names for each in after]
    expected = (scale * logits_of(classifier, scans, names)).softmax(1)
    for one, other, row in zip(before, after, expected, strict=True):
        assert (one.calibrated, other.calibrated) == (False, True)
        assert one.raw_probabilities == one.probabilities == other.raw_probabilities
        # A float32 logit of up to 100 errs by 1e-4 through ten layers, a probability by half that.
        assert whole(other, names) == pytest.approx(row.tolist(), abs=1e-4)
        assert other.prediction_set is other.score is None


@torch.no_grad()
def test_added_names_have_the_scale_of_their_distances(classifier, scans):
    names = (*classifier.trained_names, "seven", "nine")
    clip, method = classifier.method.clip, classifier.method
    tuned, plain = (
        [(x.double() / x.double().norm(dim=1, keepdim=True)).tolist() for x in both]
        for both in (
            [method.text_features(method.prepare(some, classifier.template))
             for some in (names, classifier.trained_names)],
            [zero_shot_texts(clip, some, classifier.template)
             for some in (names, classifier.trained_names)],
        )
    )  # fmt: skip

    def nearness(features, index):
        gaps = sorted(math.dist(features[0][index], other) for other in features[1])
        return math.exp(-sum(gaps[:5]) / 5)

    scale = torch.full((7,), 1 / classifier.fitted.temperature).double()
    for index in (5, 6):
        scale[index] *= nearness(tuned, index) / nearness(plain, index)
    logits = logits_of(classifier, scans, names)
    best = logits.argmax(1)
    assert 5 in best.tolist()
    assert best.min() < 5
    expected = (scale[best][:, None] * logits).softmax(1)
    for row, found in zip(expected, classifier.classify(scans, names, top=7), strict=True):
        assert found.calibrated
        assert whole(found, names) == pytest.approx(row.tolist(), abs=1e-4)


def test_none_of_these_and_sets(classifier, scans):
    fitted = classifier.fitted
    found = classifier.classify(scans, reject="10%", reject_by="energy", coverage=0.9)
    # Of 20 + 1 exchangeable pictures 10% are two, and 90% are 19.
    least, limit = sorted(fitted.energy)[1], sorted(fitted.nonconformity)[18]
    logits = logits_of(classifier, scans, classifier.trained_names)
    scores = logits.logsumexp(1).tolist()
    assert [each.score for each in found] == pytest.approx(scores, abs=1e-3)
    assert [each.rejected for each in found] == [each.score < least for each in found]
    assert {each.rejected for each in found} == {True, False}
    for each in found:
        kept = [name for name, likely in zip(each.names, each.probabilities, strict=True)
                if 1 - likely <= limit]  # fmt: skip
        assert each.prediction_set == tuple(kept)
    assert max(len(each.prediction_set) for each in found) > 1
    given = classifier.classify(scans, classifier.trained_names[::-1], coverage=0.9)
    sets = [set(each.prediction_set) for each in found]
    assert [set(each.prediction_set) for each in given] == sets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reject": "4%"}, "reject 4%: takes at least 24 validation pictures, there are 20"),
        ({"coverage": 0.96}, "coverage 0.96: takes at least 24 validation pictures, there are 20"),
        ({"reject": "0%"}, "reject 0%: expected a rate"),
        ({"reject": "much"}, "reject much: expected a rate"),
        ({"reject": math.nan}, "reject nan: expected a rate"),
        ({"reject_by": "cosine"}, "reject_by cosine: expected reject with it"),
        ({"reject": 1, "reject_by": "luck"}, "reject_by 'luck': expected one of probability, cos"),
        ({"coverage": 1.0}, "coverage 1.0: expected more than 0 and less than 1"),
        ({"coverage": 0.9, "prior": "uniform"}, "coverage 0.9: fitted without a prior"),
        ({"reject": "9%", "classes": ["zero", "one"]}, "reject 9%, not a score: fitted over the"),
        ({"coverage": 0.9, "classes": ["zero", "yak"]}, "coverage 0.9: fitted over the trained"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_served_is_one_line(classifier, scans, options, message):
    with pytest.raises(InputError) as refused:
        classifier.classify(scans, **options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_run_without_validation_pictures_takes_scores_alone(classifier, scans):
    plain = Classifier(classifier.method, classifier.config, classifier.record, classifier.facts)
    for options in ({"reject": "10%"}, {"coverage": 0.9}):
        with pytest.raises(InputError, match="the run has no validation pictures to fit it on"):
            plain.classify(scans, **options)
    found = plain.classify(scans, ["zero", "one", "three"], reject=0.8, prior="uniform")
    assert {each.rejected for each in found} == {True, False}
    assert all(each.rejected == (each.probabilities[0] < 0.8) for each in found)


def test_other_scores_than_those_that_were_fitted_are_not_calibrated(classifier, scans):
    views = replace(classifier.config.views, tte=True)
    config = replace(classifier.config, views=views)
    told = classifier.record, classifier.facts, None, classifier.fitted
    crops = Classifier(classifier.method, config, *told)
    assert not crops.classify(scans[:2])[0].calibrated
    assert not classifier.classify(scans[:2], prior="uniform")[0].calibrated
    with pytest.raises(InputError, match=r"coverage 0\.9: fitted with one view of each picture"):
        crops.classify(scans, coverage=0.9)


def test_without_a_temperature_or_a_class_matrix():
    """All validation pictures are right; then a method whose text hangs on the picture."""
    labels = torch.arange(12) % 3
    state = {"w": torch.ones(2)}
    known = {"cosine_scale": 10.0, "head": None, "state": state, "seed": 1}
    sure = fit(20 * torch.eye(3)[labels], labels, **known, selected=False, tte=False)
    assert sure.temperature is None
    assert sure.tail == ()
    about = Situation(
        (True, False, True), False, None, False, 10.0, None, lambda: "text hangs on it"
    )
    decided = decide(Asked(), sure, about)
    assert decided.rules.scale is None
    assert "all 12 validation pictures are right" in decided.lines[0]
    wrong = torch.where(torch.arange(12) < 3, (labels + 1) % 3, labels)
    some = fit(torch.eye(3)[wrong].double(), labels, **known, selected=True, tte=False)
    decided = decide(Asked(), some, about)
    assert decided.rules.scale[::2].tolist() == [1 / some.temperature] * 2
    answered = decided.rules.answer(torch.eye(3))
    assert answered.calibrated.tolist() == [True, False, True]
    assert "a little optimistic" in decided.lines[0]
    assert "(text hangs on it)" in decided.lines[1]


def call(run, *sources, **words):
    return predict.PredictConfig(run, sources, batch=4, top=2, **words)


def test_files_say_what_the_object_says(run, classifier, folder, tmp_path, capsys):
    files = {kind: tmp_path / f"answers.{kind}" for kind in ("csv", "json")}
    asked = {"reject": "30%", "coverage": 0.9}
    assert predict.main(call(run, folder, **asked, **files)) == 0
    told = capsys.readouterr().err
    expected = classifier.classify(sorted(folder.iterdir()), top=2, batch=4, **asked)
    document = json.loads(files["json"].read_text())
    temperature = classifier.fitted.temperature
    assert document["calibration"]["temperature"] == temperature
    assert f"answers temperature {temperature:.3f}" in told
    assert document["reject"]["by"] == "probability"
    assert document["coverage"]["validation"].keys() == {"all", "head", "tail"}
    assert "sets    90%: of 20 validation pictures they hold the right name of all 95.0%" in told
    assert document["pictures"] == [
        {
            "file": str(file),
            "calibrated": True,
            "score": each.score,
            "rejected": each.rejected,
            "set": list(each.prediction_set),
            "predictions": [
                {"class": name, "probability": likely, "raw": raw, "trained": True}
                for name, likely, raw in zip(
                    each.names, each.probabilities, each.raw_probabilities, strict=True
                )
            ],
        }
        for file, each in zip(sorted(folder.iterdir()), expected, strict=True)
    ]
    with open(files["csv"], newline="") as stream:
        rows = list(csv.DictReader(stream))
    flat = [(each, rank) for each in expected for rank in range(2)]
    assert [row["rejected"] == "true" for row in rows] == [each.rejected for each, _ in flat]
    assert [json.loads(row["set"]) for row in rows] == [list(e.prediction_set) for e, _ in flat]
    assert [row["class"] for row in rows] == [each.names[rank] for each, rank in flat]
    assert {row["calibrated"] for row in rows} == {"true"}
    # Six digits are written.
    raw = [each.raw_probabilities[rank] for each, rank in flat]
    assert [float(row["raw"]) for row in rows] == pytest.approx(raw, rel=1e-5)
    assert predict.main(call(run, folder, **asked)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["none of these" in line for line in lines] == [each.rejected for each in expected]


def test_a_stopped_call_goes_on_with_the_same_options_alone(
    run, folder, tmp_path, monkeypatch, capsys
):
    whole, part = tmp_path / "whole.csv", tmp_path / "part.csv"
    asked = {"reject": "10%", "reject_by": "cosine", "coverage": 0.9}
    predict.main(call(run, folder, csv=whole, **asked))
    write, left = growing.GrowingFiles.write, [7]

    def stop(files, texts):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        write(files, texts)

    with monkeypatch.context() as patch:
        patch.setattr(growing.GrowingFiles, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            predict.main(call(run, folder, csv=part, **asked))
    for name, other in (("reject", "20%"), ("reject_by", "energy"), ("coverage", 0.8)):
        with pytest.raises(InputError, match=f"was begun with --{name.replace('_', '-')}"):
            predict.main(call(run, folder, csv=part, **{**asked, name: other}))
    capsys.readouterr()
    predict.main(call(run, folder, csv=part, **asked))
    assert "goes on after 4 pictures" in capsys.readouterr().err
    assert part.read_bytes() == whole.read_bytes()


def test_a_saved_classifier_keeps_it_and_other_weights_have_none(
    run, classifier, scans, tmp_path, capsys
):
    saved = tmp_path / "saved"
    classifier.save_pretrained(saved)
    again = Classifier.load(saved, device="cpu")
    asked = {"reject": "10%", "coverage": 0.9}
    assert again.classify(scans, **asked) == classifier.classify(scans, **asked)
    copy = shutil.copytree(run, tmp_path / "copy")
    values = read_json(copy / ANSWERS)
    state = load(run).tensors
    for name, wrong, message in (
        ("weights", "0" * 64, "fitted for other weights"),
        ("labels", values["labels"][1:], "as many scores as labels"),
        ("labels", [5] * 20, "a class that is not in 0..4"),
        ("temperature", -1.0, "temperature -1.0"),
        ("temperature", None, "neither a temperature"),
        ("energy", ["x"] * 20, "energy"),
    ):
        (copy / ANSWERS).write_text(json.dumps({**values, name: wrong}))
        with pytest.raises(InputError, match=message):
            read_fitted(copy / ANSWERS, state, 5)
    # Saved over by one without, nothing of it stays.
    told = classifier.record, classifier.facts
    Classifier(classifier.method, classifier.config, *told).save_pretrained(saved)
    assert not (saved / ANSWERS).exists()


def test_the_test_pictures_judge_it(run, capsys):
    """Calibration error, coverage and risk, by plain loops over scores of one large batch."""
    experiment, _ = load_run(run)
    fitted, benchmark = experiment.fitted, experiment.benchmark
    evaluate.main(evaluate.EvaluateConfig(run))
    told, found = capsys.readouterr().out, read_reliability(run / RELIABILITY)
    classes = experiment.method.prepare(benchmark.base_names, benchmark.template)
    pictures = benchmark.test_base
    images = [experiment.test_transform(pictures.load(each)) for each in range(len(pictures))]
    logits = experiment.method.logits(torch.stack(images), classes).double().numpy()
    labels = pictures.labels
    right = logits.argmax(1) == labels
    likely = {}
    for calibrated, temperature in ((False, 1), (True, fitted.temperature)):
        powers = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
        likely[calibrated] = powers / powers.sum(1, keepdims=True)
    sets = 1 - likely[True] <= sorted(fitted.nonconformity)[18]  # 19 of 20 + 1
    held = sets[np.arange(len(labels)), labels]
    for group in found.groups:
        some = {"all": labels >= 0, "head": labels == 0, "tail": labels > 0}[group.name]
        errors = []
        for each in likely.values():
            sure, error = each.max(1)[some], 0.0
            for low in range(15):
                inside = (low / 15 < sure) & (sure <= (low + 1) / 15)
                error += abs((right[some][inside] - sure[inside]).sum()) / some.sum()
            errors.append(error)
        # float32 logits of other batches differ by 1e-5 or so, and so do probabilities; here no
        # picture lies as near to an edge.
        assert [group.ece, group.ece_calibrated] == pytest.approx(errors, abs=1e-4)
        assert group.covered == pytest.approx(held[some].mean())
        assert group.set_size == pytest.approx(sets[some].sum(1).mean())
        assert f"{100 * group.ece_calibrated:.2f}" in told
        assert f"{100 * group.covered:.2f}" in told
    order = np.argsort(-likely[True].max(1), kind="stable")
    risk = (~right[order]).cumsum() / np.arange(1, len(order) + 1)
    assert found.curves[0].by == "probability"
    assert found.curves[0].aurc == pytest.approx(risk.mean(), abs=1e-3)  # a swap of neighbours
    assert f"AURC): probability {100 * found.curves[0].aurc:.2f}" in told


def test_what_is_not_judged_says_why(run, capsys):
    evaluate.main(evaluate.EvaluateConfig(run, prior="uniform"))
    told = capsys.readouterr().out
    assert "answers not judged: fitted without a prior" in told
    assert "AURC" not in told
    evaluate.main(evaluate.EvaluateConfig(run, coverage=0.99))
    told = capsys.readouterr().out
    assert "no sets of 99%: takes at least 99 validation pictures, there are 20" in told
    with pytest.raises(InputError, match=r"--coverage 1\.5: expected less than 1"):
        evaluate.main(evaluate.EvaluateConfig(run, coverage=1.5))


def test_the_report_draws_it(run, tmp_path, monkeypatch):
    def gone(run):
        raise InputError("the pictures are not needed for it")

    monkeypatch.setattr(page_module, "load_run", gone)
    page = page_module.build_page(run)
    found = read_reliability(run / RELIABILITY)
    for group in found.groups:
        assert f"{100 * group.ece:.2f}" in page
        assert f"{100 * group.covered:.2f}" in page
    for curve in found.curves:
        assert f"by {curve.by} {100 * curve.aurc:.2f} %" in page
    assert 'aria-label="Reliability diagram' in page
    assert 'aria-label="Risk-coverage curves' in page
    copy = tmp_path / RELIABILITY
    values = read_json(run / RELIABILITY)
    values["groups"][0]["ece"] = 2.0
    copy.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"a figure that is not in 0\.\.1"):
        read_reliability(copy)
