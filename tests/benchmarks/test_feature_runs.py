"""Runs over drawn features: that every method takes them, and what its seconds contain."""

import pytest
import torch

from benchmarks.measuring.feature_runs import (
    CLOSED,
    NOT_LISTED,
    TRAINED,
    FeatureRuns,
    Size,
    drawn_benchmark,
    shortened,
    train,
)
from lamp_fast.methods import METHODS

SIZE = Size(classes=5, most=12)


@pytest.fixture(scope="module")
def runs():
    return FeatureRuns(None, SIZE)


@pytest.mark.filterwarnings("ignore:.*tiny CLIP:UserWarning")
@pytest.mark.parametrize("name", [*CLOSED, *TRAINED])
def test_a_method_learns_from_drawn_features(runs, name):
    experiment = shortened(runs.experiment(name), epochs=2)
    method, training = experiment.method, experiment.benchmark.train
    assert train(experiment) > 0
    features = runs.reader.read(training, experiment.centre_transform)
    classes = method.prepare(experiment.benchmark.base_names, experiment.benchmark.template)
    scores = method.feature_logits(features, classes)
    assert scores.shape == (len(training), SIZE.classes)
    assert torch.isfinite(scores).all()
    if name == "linear-probe":  # reads the drawn centres themselves, not texts of a small CLIP
        assert (scores.argmax(1).numpy() == training.labels).mean() > 0.8


def test_every_method_over_features_is_measured():
    over_features = {name for name, kind in METHODS.items() if kind.load().reads_features}
    assert over_features == {*CLOSED, *TRAINED, *NOT_LISTED}


def test_a_picture_has_the_same_features_whenever_it_is_read(runs):
    pictures, transform = drawn_benchmark(SIZE).train, runs.experiment("tip").centre_transform
    views = runs.reader.read_views(pictures, transform, 1, 3)
    assert torch.equal(views[:, 2], runs.reader.read_view(pictures, transform, 1, 2))
    assert not torch.equal(views[:, 0], views[:, 1])
    centre = runs.reader.read(pictures, transform)
    assert torch.equal(centre, runs.reader.read(pictures, transform))
    assert views.shape == (len(pictures), 3, centre.shape[1])


def test_labels_are_a_long_tail():
    counts = drawn_benchmark(SIZE).counts
    # 12 * 10^(-k/4) for k = 0..4: 12, 6.75, 3.79, 2.13, 1.2.
    assert counts.tolist() == [12, 6, 3, 2, 1]
