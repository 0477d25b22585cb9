"""Features of pictures: what the towers give, computed once, kept by what decides about them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lamp_fast.clip import features
from lamp_fast.clip.features import FeatureReader
from lamp_fast.clip.towers import ClipIdentity
from lamp_fast.data.feature_cache import FeatureCache
from lamp_fast.data.pictures import Pictures, check_pictures
from lamp_fast.data.transforms import (
    HostTransform,
    MinimalistCrop,
    evaluation_transform,
    five_crop_transform,
    training_transform,
)


@pytest.fixture
def clip(small_clip):
    built = small_clip()
    built.identity = ClipIdentity(
        "small", "drawn", "quick_gelu", "f" * 64, True, built.preprocessing
    )
    return built


@pytest.fixture
def pictures(tmp_path):
    """Five files, of which the last is the first again."""
    generator = np.random.default_rng(0)
    names = []
    for number in range(4):
        noise = generator.integers(0, 256, (20 + 3 * number, 31, 3), dtype=np.uint8)
        names.append(f"{number}.png")
        Image.fromarray(noise).save(tmp_path / names[-1])
    (tmp_path / "again.png").write_bytes((tmp_path / "0.png").read_bytes())
    return check_pictures(Pictures([*names, "again.png"], [0] * 5, root=tmp_path))[0]


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "cache", 10**7)


@pytest.fixture
def count(monkeypatch):
    """How many pictures the tower has seen."""
    seen, plain = [], features.unprojected_features
    monkeypatch.setattr(
        features, "unprojected_features", lambda c, x: seen.append(len(x)) or plain(c, x)
    )
    return lambda: sum(seen)


def test_they_are_open_clips_own_before_its_projection(clip, pictures):
    transform = evaluation_transform(clip.preprocessing)
    got = FeatureReader(clip, batch=2).read(pictures, transform)
    images = torch.stack([transform(pictures.load(i)) for i in range(5)]).double()
    expected = clip.model.encode_image(images)
    # Float64 in another order of some hundred terms of order 1.
    torch.testing.assert_close(clip.vision.project(got), expected, rtol=1e-9, atol=1e-9)
    assert got.shape == (5, clip.vision.width)


def test_a_second_reader_gets_the_same_bits_and_computes_nothing(clip, pictures, cache, count):
    transform = evaluation_transform(clip.preprocessing)
    first = FeatureReader(clip, cache, batch=3).read(pictures, transform)
    assert count() == 4  # equal files are one picture
    again = FeatureReader(clip, FeatureCache(cache.folder.parent, 10**7)).read(
        pictures.select([4, 2, 0]), transform
    )
    assert count() == 4
    assert torch.equal(again, first[[4, 2, 0]])
    assert torch.equal(first[0], first[4])


def test_only_what_is_missing_is_computed(clip, pictures, cache, count):
    transform = evaluation_transform(clip.preprocessing)
    reader = FeatureReader(clip, cache)
    some = reader.read(pictures.select([1, 2]), transform)
    every = reader.read(pictures, transform)
    assert count() == 4
    assert torch.equal(every[1:3], some)


def test_damage_is_computed_again(clip, pictures, cache, count):
    transform = evaluation_transform(clip.preprocessing)
    first = FeatureReader(clip, cache).read(pictures, transform)
    for file in cache.folder.glob("??/*"):
        file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(FeatureReader(clip, cache).read(pictures, transform), first)
    assert count() == 8


@pytest.mark.parametrize(
    "other", ["weights", "activation", "preprocessing", "transform", "downscale", "dtype", "host"]
)
def test_whatever_decides_about_features_has_its_own(clip, pictures, cache, count, other):
    transform = evaluation_transform(clip.preprocessing)
    FeatureReader(clip, cache).read(pictures, transform)
    assert count() == 4
    identity = clip.identity
    if other == "weights":
        clip.identity = replace(identity, fingerprint="e" * 64)
    elif other == "activation":
        clip.identity = replace(identity, activation="gelu")
    elif other == "preprocessing":
        looks = replace(clip.preprocessing, mean=(0.5, 0.5, 0.5))
        clip.identity, transform = (
            replace(identity, preprocessing=looks),
            evaluation_transform(looks),
        )
    elif other == "transform":
        transform = five_crop_transform(clip.preprocessing)
    elif other == "downscale":
        pictures = replace(pictures, downscale=18)
    elif other == "dtype":
        clip.float()
    elif other == "host":
        transform = type("PackTransform", (HostTransform,), {})(
            transform.preprocessing, transform.views
        )
    FeatureReader(clip, cache).read(pictures, transform)
    assert count() > 4


def test_a_clip_of_which_nothing_is_known_is_not_kept(clip, pictures, cache, count):
    clip.identity = None
    for _ in range(2):
        FeatureReader(clip, cache).read(pictures, evaluation_transform(clip.preprocessing))
    assert count() == 8


def test_views_depend_on_seed_view_and_content_alone(clip, pictures, cache):
    random = training_transform(clip.preprocessing)
    reader = FeatureReader(clip)
    views = reader.read_views(pictures, random, seed=1, views=3)
    assert views.shape == (5, 3, clip.vision.width)
    order = [3, 0, 2]
    torch.testing.assert_close(
        reader.read_views(pictures.select(order), random, seed=1, views=2),
        views[order, :2],
        rtol=1e-9,
        atol=1e-9,
    )
    assert not torch.allclose(views[:, 0], views[:, 1])
    assert not torch.allclose(reader.read_views(pictures, random, seed=2, views=1), views[:, :1])
    kept = FeatureReader(clip, cache).read_views(pictures, random, seed=1, views=3)
    assert torch.equal(FeatureReader(clip, cache).read_views(pictures, random, 1, 3), kept)


def test_a_transform_of_epochs_shows_epoch_e_in_view_e(clip, pictures):
    growing = HostTransform(clip.preprocessing, MinimalistCrop(epochs=3))
    reader = FeatureReader(clip)
    views = reader.read_views(pictures, growing, seed=1, views=3)
    # In the last epoch the largest square is shown, wherever a draw puts it along the longer side.
    square = pictures.select([0])
    last = HostTransform(clip.preprocessing, MinimalistCrop(epochs=1, least_area=1.0))
    assert views.shape[1] == 3
    assert not torch.allclose(views[:1, 0], reader.read_views(square, last, seed=1, views=1)[:, 0])


def test_pictures_in_memory_are_known_by_content_and_shape(clip, cache, count):
    flat = np.arange(16 * 32 * 3, dtype=np.uint8)
    transform = evaluation_transform(clip.preprocessing)
    for shape in ((1, 16, 32, 3), (1, 32, 16, 3), (1, 16, 32, 3)):
        some = Pictures(["memory"], [0], arrays=flat.reshape(shape))
        FeatureReader(clip, cache).read(some, transform)
    assert count() == 2
