"""View settings: crops, filters, five views and the minimalist schedule, on host and device."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from lamp_fast import Classifier, evaluate, predict, train
from lamp_fast.data.loading import training_batches
from lamp_fast.data.pictures import Pictures
from lamp_fast.data.resample import PackTransform, join, resample
from lamp_fast.data.settings import ViewConfig
from lamp_fast.data.transforms import (
    CentreCrop,
    FiveCrops,
    HostTransform,
    MinimalistCrop,
    Preprocessing,
    RandomCrop,
)
from lamp_fast.data.views import testing_views, training_views
from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.runs.experiment import assemble, load_run
from lamp_fast.runs.folder import CONFIG, LEARNED
from lamp_fast.runs.scorer import class_scores
from lamp_fast.runs.scoring import evaluate_rows
from lamp_fast.runs.trainer import Trainer
from lamp_fast.tensors import load_tensors

CPU = torch.device("cpu")
SIZE = 28
# Plain and thin shapes, height and width.
SHAPES = [(90, 120), (20, 30), (1, 200), (300, 1), (1, 1), (64, 65), (5, 700), (31, 28)]


def noise(height, width):
    generator = torch.Generator().manual_seed(1000 * height + width)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def stacked(crops):
    return torch.stack(crops) if isinstance(crops, tuple) else crops


def normalised(preprocessing, *transforms):
    """torchvision's own pipeline behind these."""
    return v2.Compose(
        [
            *transforms,
            stacked,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )


@pytest.mark.parametrize("shape", [(90, 120), (20, 30), (64, 65), (31, 28), (9, 200)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", [SIZE, 32, 31, 60])
def test_test_views_are_torchvisions(shape, interpolation, resize):
    """To the bit."""
    preprocessing, picture = Preprocessing(SIZE, interpolation=interpolation), noise(*shape)
    mode = InterpolationMode(interpolation)
    scale = v2.Resize(resize, mode, antialias=True)
    for views, crop in ((CentreCrop, v2.CenterCrop), (FiveCrops, v2.FiveCrop)):
        got = HostTransform(preprocessing, views(resize))(picture)
        assert torch.equal(got, normalised(preprocessing, scale, crop(SIZE))(picture))
    squash = replace(preprocessing, resize_mode="squash")
    both = v2.Resize((resize, resize), mode, antialias=True)
    got = HostTransform(squash, CentreCrop(resize))(picture)
    assert torch.equal(got, normalised(squash, both, v2.CenterCrop(SIZE))(picture))


@pytest.mark.parametrize("flip", [True, False])
def test_random_crops_draw_what_torchvision_does(flip):
    preprocessing = Preprocessing(SIZE, interpolation="bilinear")
    crop = v2.RandomResizedCrop(SIZE, (0.5, 1.0), interpolation=InterpolationMode.BILINEAR)
    mirror = [v2.RandomHorizontalFlip()] if flip else []
    oracle = normalised(preprocessing, crop, *mirror)
    ours = HostTransform(preprocessing, RandomCrop(0.5, flip))
    for seed in range(6):
        for shape in SHAPES:
            results = []
            for transform in (ours, oracle):
                torch.manual_seed(seed)
                results.append((transform(noise(*shape)), torch.rand(1)))
            assert torch.equal(results[0][0], results[1][0])
            assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "views",
    [FiveCrops(31), FiveCrops(), CentreCrop(32), RandomCrop(0.5), MinimalistCrop(4, epoch=1)],
    ids=lambda views: type(views).__name__,
)
def test_the_device_shows_the_hosts_views(views, interpolation):
    """Both round to 8 bits after each of two passes, and torchvision's weights have fewer bits: a
    sum near a tie may round either way, by a step. Scaled by a half or by four, every eighth
    sum is a tie, so the mean is within 2/8 of a step. Another view is tens of steps away.
    """
    preprocessing = Preprocessing(SIZE, interpolation=interpolation)
    pictures = [noise(*shape) for shape in SHAPES]
    results = []
    for transform in (HostTransform(preprocessing, views), PackTransform(preprocessing, views)):
        torch.manual_seed(0)
        results.append([transform(picture) for picture in pictures])
    expected, got = torch.stack(results[0]), resample(join(results[1]), CPU, torch.float32)
    assert got.shape == expected.shape
    steps = (got - expected).abs() * 255 * torch.tensor(preprocessing.std)[:, None, None]
    assert steps.mean(dim=(-3, -2, -1)).max() < 0.25


def test_five_views_travel_once():
    picture = noise(100, 130)
    one, five = (
        PackTransform(Preprocessing(SIZE), views)(picture) for views in (CentreCrop(), FiveCrops())
    )
    assert torch.equal(one.pixels, five.pixels)
    assert len(five.views) == 5


def test_the_minimalist_schedule():
    """s_t as published, and a where there is one epoch."""
    for epochs, least in ((5, 0.08), (2, 0.3), (20, 0.08)):
        for e in range(epochs):
            s = 1 - math.sqrt(1 - (e / (epochs - 1)) ** 2)
            expected = s * (1.0 - least) + least
            # A handful of roundings of numbers up to 1.
            got = MinimalistCrop(epochs, least).for_epoch(e).share
            assert got == pytest.approx(expected, abs=1e-14)
    assert MinimalistCrop(1).for_epoch(0).share == 0.08
    assert MinimalistCrop(3).for_epoch(2).share == 1.0


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (33, 33), (1, 1), (1, 90)])
@pytest.mark.parametrize("epoch", [0, 2, 4])
def test_minimalist_squares(shape, epoch):
    """Side = round(sqrt(share H W)), share uniform between s and 1 capped by short^2 / (H W)."""
    height, width = shape
    views = MinimalistCrop(5).for_epoch(epoch)
    capped = min(views.share, min(shape) ** 2 / (height * width))
    largest = min(shape)
    smallest = max(1, round(math.sqrt(capped * height * width)))
    sides, corners = set(), set()
    for seed in range(200):
        torch.manual_seed(seed)
        (view,) = views(noise(*shape), Preprocessing(SIZE))
        top, left, tall, wide = view.crop
        assert tall == wide
        assert smallest <= tall <= largest
        assert 0 <= top <= height - tall
        assert 0 <= left <= width - wide
        assert not view.flip
        assert view.scaled == (SIZE, SIZE)
        torch.manual_seed(seed)
        share = torch.empty(1).uniform_(capped, largest**2 / (height * width)).item()
        assert tall == max(1, round(math.sqrt(share * height * width)))
        sides.add(tall)
        corners.add((top, left))
    if min(shape) > 1 and epoch < 4:
        assert len(sides) > 5
        assert len(corners) > 20


def test_the_epoch_reaches_the_transform_whatever_loads():
    """In the last epoch a square picture is shown whole; workers and the order change nothing."""
    arrays = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)
    pictures = Pictures([str(n) for n in range(6)], [0] * 6, arrays=arrays)
    preprocessing = Preprocessing(12)
    whole = HostTransform(preprocessing, CentreCrop())

    def epochs(order, workers, kind=HostTransform):
        transform = kind(preprocessing, MinimalistCrop(3))
        batches = training_batches(pictures, transform, 6, seed=3, workers=workers)
        found = {}
        for epoch in order:
            images, _, index = next(batches.epoch(epoch))
            found[epoch] = images[index.argsort()] if kind is HostTransform else images.views[:, 0]
        return found

    alone, parallel = epochs((0, 1, 2), 0), epochs((2, 1, 0), 1)
    for epoch in range(3):
        assert torch.equal(alone[epoch], parallel[epoch])
    shown = torch.stack([whole(pictures.load(n)) for n in range(6)])
    assert torch.equal(alone[2], shown)
    assert not torch.equal(alone[0], alone[1])
    packed = epochs((0, 1, 2), 0, PackTransform)
    assert (packed[2] == 20).all()
    assert (packed[0] < 20).any()


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [
        ({}, 224, CentreCrop()),
        ({"test_resize": 256}, 224, CentreCrop(256)),
        ({"test_resize": "8/7"}, 224, CentreCrop(256)),
        ({"test_resize": "8/7"}, 336, CentreCrop(384)),
        ({"tte": True}, 224, FiveCrops(248)),
        ({"tte": True, "test_resize": "8/7"}, 336, FiveCrops(372)),
    ],
)
def test_test_views_by_size(settings, size, expected):
    views = ViewConfig(**settings)
    validate(views)
    assert testing_views(views, size) == expected


def test_training_views():
    for augment, croppable, expected in (
        ("auto", True, RandomCrop(0.5, False)),
        ("auto", False, CentreCrop(32)),
        ("standard", False, RandomCrop(0.5, False)),
        ("minimalist", False, MinimalistCrop(7, 0.5)),
        ("none", True, CentreCrop(32)),
    ):
        views = ViewConfig(augment, crop_area=0.5, flip=False, test_resize=32, tte=True)
        assert training_views(views, 28, 7, croppable=croppable) == expected
    assert training_views(ViewConfig(), 28, 7, croppable=True) == RandomCrop()


@pytest.mark.parametrize("word", ["7/8", "8/0", "17/1", "large", "8/7/6", "-3", "0/0"])
def test_a_size_that_is_none_is_refused(word):
    config = train.read_flags(["--test-resize", word])
    with pytest.raises(InputError, match=f"--test-resize {word}: expected pixels, a ratio"):
        assemble(config)


def test_sizes_and_areas_beyond_bounds_are_refused():
    for flags, message in (
        (["--test-resize", "20"], "--test-resize 20: expected 32, which the CLIP takes, to 512"),
        (["--test-resize", "513"], "--test-resize 513: expected 32, which the CLIP takes, to 512"),
        (["--test-resize", "0"], "--test-resize 0: expected at least 1"),
        (["--crop-area", "0"], "--crop-area 0.0: expected more than 0"),
        (["--crop-area", "1.5"], "--crop-area 1.5: expected at most 1"),
    ):
        with pytest.raises(InputError, match=message):
            assemble(train.read_flags(flags))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two classes of six pictures of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(6):
            pixels = generator.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


WORDS = ["--method", "coop", "--clip", "tiny", "--epochs", "2", "--batch", "3", "--threads", "1"]


def flags(root, out, *more):
    words = [*WORDS, "--data", "folder", "--root", str(root), "--out", str(out), *more]
    return train.read_flags(words)


def test_a_run_remembers_its_views(root, tmp_path):
    """Test-time ensembles through training's table, evaluation, prediction and the classifier."""
    out = tmp_path / "run"
    words = ["--tte", "--interpolation", "bilinear", "--augment", "minimalist"]
    assert train.main(flags(root, out, *words)) == 0
    saved = json.loads((out / CONFIG).read_text())["settings"]["views"]
    assert (saved["tte"], saved["interpolation"], saved["augment"]) == (
        True,
        "bilinear",
        "minimalist",
    )
    experiment, facts = load_run(out)
    assert any(line.startswith("views   augment=minimalist") for line in experiment.describe())
    rows = evaluate_rows(experiment, facts["seconds"], False)
    table = [row.row(experiment.benchmark) for row in rows]
    trained = json.loads((out / "result.json").read_text())
    assert trained[1].pop("selection")["of"] > 0  # told where it was made
    assert json.loads(json.dumps(table)) == trained

    # Literally: torchvision's five crops, one by one, each a picture of its own.
    size = experiment.clip.preprocessing.size
    scale = v2.Resize(size + round(24 * size / 224), InterpolationMode.BILINEAR, antialias=True)
    transform = normalised(experiment.clip.preprocessing, scale, v2.FiveCrop(size))
    method, test = experiment.method, experiment.benchmark.test_base
    names, template = experiment.benchmark.base_names, experiment.benchmark.template
    classes = method.prepare(names, template)
    crops = torch.stack([transform(test.load(index)) for index in range(len(test))])
    every = [method.logits(crops[:, number], classes) for number in range(5)]
    expected = torch.stack(every).mean(0)
    # Five numbers of order 100 added up in another order, in float32.
    torch.testing.assert_close(class_scores(method, crops, classes), expected, atol=1e-4, rtol=0)
    # As the table was scored, from features of five views.
    assert method.reads_features
    features = experiment.reader.read(test, experiment.test_transform)
    assert features.shape[1] == 5
    torch.testing.assert_close(class_scores(method, features, classes), expected, atol=1e-4, rtol=0)
    once = experiment.with_tte(False)
    (only,) = once.test_transform.views(test.load(0), experiment.clip.preprocessing)
    assert min(only.scaled) == size
    assert once.reader.read(test, once.test_transform).ndim == 2

    classifier = Classifier.load(out)
    files = [test.root / name for name in test.names]
    answers = classifier.classify(files, top=2)
    probabilities = expected.softmax(1)
    for answer, row in zip(answers, probabilities, strict=True):
        by_name = dict(zip(answer.names, answer.probabilities, strict=True))
        # The logits' 1e-4 move a probability by at most half of that.
        assert [by_name[name] for name in names] == pytest.approx(row.tolist(), abs=1e-4)
    once = Classifier.load(out, tte=False).classify(files, top=2)
    assert any(a.probabilities != b.probabilities for a, b in zip(answers, once, strict=True))


def test_a_saved_run_of_another_size_is_refused(root, tmp_path):
    """Whoever loads it, before a picture is scaled to what its settings say."""
    out = tmp_path / "run"
    assert train.main(flags(root, out)) == 0
    record = json.loads((out / CONFIG).read_text())
    record["settings"]["views"]["test_resize"] = 60_000
    (out / CONFIG).write_text(json.dumps(record))
    for load in (load_run, Classifier.load):
        with pytest.raises(InputError, match="--test-resize 60000: expected 32"):
            load(out)


def test_commands_may_ask_for_an_ensemble_or_for_none(root, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(flags(root, out)) == 0
    asked = {}
    for word in ("as-trained", "on", "off"):
        file = tmp_path / f"{word}.json"
        config = predict.PredictConfig(out, (root / "cat",), json=file, tte=word)
        assert predict.main(config) == 0
        asked[word] = json.loads(file.read_text())["pictures"]
        capsys.readouterr()
        assert evaluate.main(evaluate.EvaluateConfig(out, tte=word)) == 0
        assert ("views   tte=True" in capsys.readouterr().out) == (word == "on")
    assert asked["as-trained"] == asked["off"] != asked["on"]
    assert evaluate.main(evaluate.EvaluateConfig(out, data="folder", root=root, tte="on")) == 0
    assert json.loads((out / "on_folder" / "target.json").read_text())["tte"] is True


def test_ensembles_of_the_devices_transforms(root, tmp_path):
    """Packed on the host and resampled by the device's part, they score as the host's."""
    scores = []
    for place in ("host", "device"):
        config = flags(root, tmp_path / place, "--tte", "--transforms", place)
        experiment = assemble(config)
        rows = evaluate_rows(experiment, 0.0, False)
        scores.append([row.base.confusion.sum() for row in rows])
        images = []
        batches = training_batches(
            experiment.benchmark.test_base, experiment.test_transform, 4, seed=0
        )
        for batch in experiment.move_batches(batches):
            images.append(batch[0])
        assert images[0].shape[1:3] == (5, 3)
    assert scores[0] == scores[1]


def test_a_minimalist_run_resumes_to_the_bit(root, tmp_path, monkeypatch):
    """The epoch that goes on shows what it would have shown."""
    words = ["--augment", "minimalist", "--epochs", "3"]
    assert train.main(flags(root, tmp_path / "whole", *words)) == 0
    epoch = Trainer._epoch

    def stop(trainer, number):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(trainer, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train.main(flags(root, tmp_path / "stopped", *words))
    assert train.main(flags(root, tmp_path / "stopped", *words, "--resume")) == 0
    one, other = (load_tensors(tmp_path / name / LEARNED)[0] for name in ("whole", "stopped"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(InputError, match="--resume --augment none: the run in "):
        train.main(flags(root, tmp_path / "stopped", "--augment", "none", "--resume"))
