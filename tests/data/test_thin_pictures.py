"""Pictures of extreme shapes: what little of them a network sees is all that is scaled."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from lamp_fast.data.resample import PackTransform, resample
from lamp_fast.data.transforms import (
    THIN,
    CentreCrop,
    Preprocessing,
    evaluation_transform,
    five_crop_transform,
    middle,
)

SIZE = 16
PREPROCESSING = Preprocessing(size=SIZE)
# Height and width of files of some hundred bytes; the last two are the longest that are read.
THIN_SHAPES = [(1, 60_000), (60_000, 1), (3, 5_001), (1, 8_900_001), (8_900_000, 1)]


def noise(height, width):
    generator = torch.Generator().manual_seed(height + width)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def stacked(crops):
    return torch.stack(crops) if isinstance(crops, tuple) else crops


def torchvisions(size=SIZE, crops=v2.CenterCrop):
    """The pipeline of the peers, of the whole picture."""
    return v2.Compose(
        [
            v2.Resize(size, InterpolationMode.BICUBIC, antialias=True),
            crops(size),
            stacked,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(PREPROCESSING.mean, PREPROCESSING.std),
        ]
    )


@pytest.fixture
def scaled(monkeypatch):
    """Shapes that torchvision was asked to scale to."""
    shapes, resize = [], v2.functional.resize

    def remembered(picture, *arguments, **options):
        result = resize(picture, *arguments, **options)
        shapes.append(tuple(result.shape))
        return result

    monkeypatch.setattr(v2.functional, "resize", remembered)
    return shapes


@pytest.mark.parametrize(
    "shape", [(20, 30), (301, 97), (SIZE, SIZE), (1, 1), (1, THIN), (THIN * 3, 3), (7, 7 * THIN)]
)
def test_other_pictures_keep_torchvisions_bits(shape):
    picture = noise(*shape)
    assert torch.equal(evaluation_transform(PREPROCESSING)(picture), torchvisions()(picture))
    five = five_crop_transform(PREPROCESSING)
    assert torch.equal(five(picture), torchvisions(crops=v2.FiveCrop)(picture))
    assert CentreCrop()(picture, PREPROCESSING)[0].crop == (0, 0, *shape)


@pytest.mark.parametrize("shape", THIN_SHAPES)
@pytest.mark.parametrize("build", [evaluation_transform, five_crop_transform])
def test_no_more_is_scaled_than_the_middle(shape, build, scaled):
    """A whole one would become SIZE x 142,400,016 pixels."""
    picture = torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, *shape)
    found = build(PREPROCESSING)(picture)
    assert found.shape[-3:] == (3, SIZE, SIZE)
    # One pixel more than THIN shorter sides, of a shorter side of 1.
    assert max(height * width for _, height, width in scaled) <= (THIN + 1) * SIZE * SIZE


@pytest.mark.parametrize("shape", THIN_SHAPES)
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_no_more_travels_to_a_device_than_the_middle(shape, resize_mode):
    picture = torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, *shape)
    preprocessing = Preprocessing(size=SIZE, resize_mode=resize_mode)
    packed = PackTransform(preprocessing, CentreCrop())(picture)
    shorter = min(shape)
    # Whole strips of 64 pixels, in each of three channels, for every column.
    longest = max(THIN * shorter + 1, SIZE)
    assert packed.pixels.numel() <= 3 * longest * 64 * -(-longest // 64)


@pytest.mark.parametrize("shape", [(4, 160), (160, 4), (2, 1000), (SIZE, 40 * SIZE)])
def test_the_middle_is_what_torchvision_shows(shape):
    """Where the factor is a power of two, both place the same pixels: every bit is alike."""
    picture = noise(*shape)
    assert torch.equal(evaluation_transform(PREPROCESSING)(picture), torchvisions()(picture))
    five = five_crop_transform(PREPROCESSING)
    assert torch.equal(five(picture), torchvisions(crops=v2.FiveCrop)(picture))


@pytest.mark.parametrize("shape", [(3, 401), (401, 3), (5, 1000), (21, 2000)])
def test_the_middle_is_in_its_place(shape):
    """Of a ramp, whose values say where they are from.

    torchvision cuts the scaled side to whole pixels and rounds the corner, we do both for a shorter
    side: together a shift of less than two scaled pixels, each of ``shorter / SIZE`` pixels. Two
    steps more for rounding to 8 bits after each pass, on either side.
    """
    long, short = max(shape), min(shape)
    ramp = torch.arange(long).sub(long // 2).mul(4).add(128).clamp(0, 255).to(torch.uint8)
    picture = (ramp if shape[1] == long else ramp[:, None]).expand(3, *shape)
    got, expected = (
        255 * each(picture) * torch.tensor(PREPROCESSING.std)[:, None, None]
        for each in (evaluation_transform(PREPROCESSING), torchvisions())
    )
    assert (got - expected).abs().max() <= 4 * 2 * short / SIZE + 2
    assert got.std() > 0


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("shape", [(3, 401), (2000, 21), (1, 5000)])
def test_device_and_host_see_the_same(shape, resize_mode):
    """Within the rounding that tests/data/test_resample.py derives."""
    preprocessing = Preprocessing(size=SIZE, resize_mode=resize_mode)
    picture = noise(*shape)
    packed = PackTransform(preprocessing, CentreCrop())(picture)
    got = resample(packed, torch.device("cpu"), torch.float32)[0]
    expected = evaluation_transform(preprocessing)(picture)
    steps = (got - expected).abs() * 255 * torch.tensor(preprocessing.std)[:, None, None]
    assert steps.mean() < 0.05


def test_the_middle_stays_in_the_middle():
    for height, width in [(1, 33), (1, 34), (2, 67), (101, 3), (100, 3)]:
        top, left, tall, wide = middle(height, width)
        assert 2 * top + tall == height
        assert 2 * left + wide == width
        assert max(tall, wide) - THIN * min(tall, wide) in (0, 1)
