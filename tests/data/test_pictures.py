"""Pictures of every kind load as what they show; damaged ones are named."""

import hashlib
import io
import os
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as peers

from lamp_fast.data import pictures as pictures_module
from lamp_fast.data.pictures import MAX_PIXELS, Pictures, check_pictures
from lamp_fast.data.transforms import Preprocessing, evaluation_transform, training_transform
from lamp_fast.errors import InputError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def pictures_in(folder, *names, labels=None):
    return Pictures(names, labels or [0] * len(names), root=folder)


def photo(width=40, height=30, seed=0):
    """A smooth coloured picture, which compresses without much loss."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def one_colour(mode, colour):
    return Image.new(mode, (12, 8), colour)


def palette(transparent=None):
    image = Image.new("P", (12, 8), 1)
    image.putpalette([*RED, *GREEN, *BLUE])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def grey16(value, dtype="<u2"):
    return Image.fromarray(np.full((8, 12), value, dtype=dtype))


ONE_COLOUR = {
    "grey.png": (one_colour("L", 77), (77, 77, 77)),
    "grey.jpg": (one_colour("L", 77), (77, 77, 77)),
    "one_bit.png": (one_colour("1", 1), WHITE),
    "rgb.jpg": (one_colour("RGB", (200, 30, 60)), (200, 30, 60)),
    "rgb.webp": (one_colour("RGB", (200, 30, 60)), (200, 30, 60)),
    "rgb.ppm": (one_colour("RGB", (200, 30, 60)), (200, 30, 60)),
    "rgb.bmp": (one_colour("RGB", (200, 30, 60)), (200, 30, 60)),
    "ycbcr.jpg": (one_colour("YCbCr", (128, 128, 128)), (128, 128, 128)),
    "cmyk.jpg": (one_colour("CMYK", (0, 255, 255, 0)), RED),
    "cmyk.tif": (one_colour("CMYK", (255, 0, 255, 0)), GREEN),
    "palette.png": (palette(), GREEN),
    "palette.gif": (palette(), GREEN),
    "palette_shown.png": (palette(bytes([0, 255, 255])), GREEN),
    "palette_hidden.png": (palette(bytes([255, 0, 255])), WHITE),
    "palette_index_hidden.png": (palette(1), WHITE),
    "palette_hidden.gif": (palette(1), WHITE),
    "rgba.png": (one_colour("RGBA", (10, 20, 30, 255)), (10, 20, 30)),
    "rgba_hidden.png": (one_colour("RGBA", (10, 20, 30, 0)), WHITE),
    "rgba_half.png": (one_colour("RGBA", (0, 0, 0, 51)), (204, 204, 204)),
    "la.png": (one_colour("LA", (90, 255)), (90, 90, 90)),
    "la_hidden.png": (one_colour("LA", (90, 0)), WHITE),
    "grey16.png": (grey16(32768), (128, 128, 128)),
    "grey16_dark.png": (grey16(300), (1, 1, 1)),  # 300 / 257; clipping would give 255
    "grey16_white.png": (grey16(65535), WHITE),
    "grey16.tif": (grey16(32768), (128, 128, 128)),
    "grey16_big_endian.tif": (grey16(32768, ">u2"), (128, 128, 128)),
    "grey16.pgm": (grey16(32768), (128, 128, 128)),
}


@pytest.mark.parametrize("name", ONE_COLOUR)
def test_kinds_of_pictures(tmp_path, name):
    image, expected = ONE_COLOUR[name]
    image.save(tmp_path / name)
    pictures = pictures_in(tmp_path, name)
    loaded = pictures.load(0)
    assert loaded.dtype == torch.uint8
    assert loaded.shape == (3, 8, 12)
    # Lossy formats may move a flat colour by a step or two.
    tolerance = 3 if name.endswith((".jpg", ".webp")) else 0
    wanted = torch.tensor(expected, dtype=torch.int16).view(3, 1, 1)
    assert (loaded.to(torch.int16) - wanted).abs().max() <= tolerance
    assert check_pictures(pictures)[0].names == pictures.names


def test_rgb_with_a_transparent_colour(tmp_path):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    image.save(tmp_path / "key.png", transparency=BLUE)
    assert pictures_in(tmp_path, "key.png").load(0)[:, 0].T.tolist() == [list(RED), list(WHITE)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_exif_orientation(tmp_path, orientation, extension):
    """A file whose pixels lie as its tag says shows the upright picture."""
    upright = photo()
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"turned.{extension}"
    stored.save(
        file, exif=exif, **({"quality": 95, "subsampling": 0} if extension == "jpg" else {})
    )
    loaded = pictures_in(tmp_path, file.name).load(0).permute(1, 2, 0).numpy()
    difference = np.abs(loaded.astype(int) - np.asarray(upright, dtype=int))
    assert loaded.shape == (30, 40, 3)
    assert difference.max() <= (12 if extension == "jpg" else 0)


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    photo().save(tmp_path / "odd.jpg", exif=b"Exif\0\0not a TIFF header at all")
    pictures = pictures_in(tmp_path, "odd.jpg")
    assert pictures.load(0).shape == (3, 30, 40)
    check_pictures(pictures)


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def check_refusal(pictures, name, reason):
    with pytest.raises(InputError) as error:
        pictures.load(0)
    assert name in one_line(error)
    assert reason in one_line(error)
    with pytest.raises(InputError) as error:
        check_pictures(pictures, progress=False)
    assert name in one_line(error)
    assert reason in one_line(error)
    assert "--skip-unreadable" in one_line(error)


@pytest.mark.parametrize(
    "name", ["cut.jpg", "cut.png", "cut.bmp", "cut.tif", "cut.ppm", "cut.webp"]
)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_files(tmp_path, name, share):
    photo(200, 150).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    check_refusal(pictures_in(tmp_path, name), name, "cannot be read as a picture")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_the_quick_check_finds_what_loading_would(tmp_path, options):
    """A JPEG cut anywhere: checked at an eighth of its size, loaded whole, the same verdict."""
    noise = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", **options)
    content = buffer.getvalue()
    verdicts = []
    for length in [
        *range(2, len(content), len(content) // 40),
        *range(len(content) - 8, len(content)),
    ]:
        (tmp_path / "cut.jpg").write_bytes(content[:length])
        pictures = pictures_in(tmp_path, "cut.jpg")
        try:
            pictures.load(0)
            loads = True
        except InputError:
            loads = False
        unreadable = check_pictures(pictures, skip_unreadable=True, progress=False)[1]
        assert bool(unreadable) != loads, length
        verdicts.append(loads)
    assert verdicts.count(False) > 30


def test_missing_empty_and_foreign_files(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no picture\n")
    (tmp_path / "folder.jpg").mkdir()
    # PIL would run Ghostscript on this one.
    photo().save(tmp_path / "postscript.jpg", format="EPS")
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    for name, reason in (
        ("none.jpg", "No such file"),
        ("empty.jpg", "not a JPEG"),
        ("text.jpg", "not a JPEG"),
        ("folder.jpg", "Is a directory"),
        ("postscript.jpg", "not a JPEG"),
        ("float.tif", "floating-point"),
        ("two\nlines.jpg", "No such file"),
    ):
        check_refusal(pictures_in(tmp_path, name), repr(name)[1:-1], reason)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [MAX_PIXELS // 9000 + 1, 30_000])
def test_decompression_bombs(tmp_path, side):
    """A picture of one colour: a few kilobytes that stand for hundreds of megabytes."""
    height = 9000 if side < 30_000 else side  # just above our limit, and above PIL's own
    Image.new("1", (side, height)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 2**18
    check_refusal(pictures_in(tmp_path, "bomb.png"), "bomb.png", f"more than {MAX_PIXELS:,} pixels")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_largest_picture_is_no_bomb(tmp_path):
    Image.new("1", (MAX_PIXELS // 9000, 9000)).save(tmp_path / "large.png")
    check_pictures(pictures_in(tmp_path, "large.png"))


def test_files_that_never_end_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    check_refusal(pictures_in(tmp_path, "pipe.png"), "pipe.png", "not a regular file")
    monkeypatch.setattr(pictures_module, "MAX_BYTES", 9999)
    with open(tmp_path / "long.png", "wb") as stream:
        stream.truncate(10_000)
    check_refusal(pictures_in(tmp_path, "long.png"), "long.png", "10,000 bytes, expected at most")


def test_check_names_the_first_unreadable_picture(tmp_path):
    names = [f"{index:03}.png" for index in range(300)]
    for name in names:
        photo(8, 8).save(tmp_path / name)
    for index in (290, 60, 61, 299):
        (tmp_path / names[index]).write_bytes(b"damaged")
    pictures = pictures_in(tmp_path, *names, labels=list(range(300)))
    for _ in range(3):
        with pytest.raises(InputError, match=r"060\.png"):
            check_pictures(pictures, progress=False)
    readable, unreadable, digest = check_pictures(pictures, skip_unreadable=True, progress=False)
    expected = [index for index in range(300) if index not in (290, 60, 61, 299)]
    assert readable.labels.tolist() == expected
    assert unreadable == tuple(str(tmp_path / names[index]) for index in (60, 61, 290, 299))
    assert digest == check_pictures(readable, progress=False)[2]


def test_hash_is_of_names_labels_bytes_and_order(tmp_path):
    for index in range(3):
        photo(8, 8, seed=index).save(tmp_path / f"{index}.png")
    (tmp_path / "copy").mkdir()
    for index in range(3):
        (tmp_path / "copy" / f"{index}.png").write_bytes((tmp_path / f"{index}.png").read_bytes())

    def digest(pictures):
        return check_pictures(pictures, progress=False)[2]

    names = ("0.png", "1.png", "2.png")
    same = digest(Pictures(names, [0, 1, 2], root=tmp_path))
    assert re.fullmatch("[0-9a-f]{64}", same)
    # Where the data set lies does not matter.
    assert digest(Pictures(names, [0, 1, 2], root=tmp_path / "copy")) == same
    others = [
        Pictures(names, [0, 1, 1], root=tmp_path),
        Pictures(names, [0, 1, 2], root=tmp_path).select([0, 2, 1]),
        Pictures(names[:2], [0, 1], root=tmp_path),
    ]
    hashes = {same, *map(digest, others)}
    (tmp_path / "0.png").rename(tmp_path / "3.png")
    hashes.add(digest(Pictures(("3.png", *names[1:]), [0, 1, 2], root=tmp_path)))
    photo(8, 8, seed=9).save(tmp_path / "copy" / "1.png")
    hashes.add(digest(Pictures(names, [0, 1, 2], root=tmp_path / "copy")))
    assert len(hashes) == 6


def test_digests_are_computed_once(tmp_path):
    (tmp_path / "a").write_bytes(b"any bytes")
    files = Pictures(names=("a",), labels=[0], root=tmp_path)
    arrays = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    memory = Pictures(names=("a",), labels=[0], arrays=arrays)
    for pictures, content in ((files, b"any bytes"), (memory, arrays.tobytes() + b"(2, 4, 3)")):
        found = pictures.content_digests()
        assert found.tobytes() == hashlib.sha256(content).digest()
        assert pictures.content_digests() is found
        assert pickle.loads(pickle.dumps(pictures)).content_digests().tolist() == found.tolist()


def test_pictures_in_memory():
    arrays = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    pictures = Pictures(("a", "b", "c", "d"), [3, 1, 3, 2], arrays=arrays)
    assert len(pictures) == 4
    assert torch.equal(pictures.load(2).permute(1, 2, 0), torch.from_numpy(arrays[2]))
    some = pictures.select([2, 1]).relabel({3: 0, 1: 1})
    assert (some.names, some.labels.tolist()) == (("c", "b"), [0, 1])
    assert torch.equal(some.load(0), pictures.load(2))
    assert some.name(0) == "c"
    with pytest.raises(KeyError):
        pictures.relabel({3: 0, 1: 1})
    first = check_pictures(pictures)[2]
    arrays[0, 0, 0, 0] ^= 1
    assert check_pictures(pictures)[2] != first
    empty = pictures.select([])
    assert len(empty) == 0
    assert check_pictures(empty)[2] == hashlib.sha256().hexdigest()


@pytest.mark.parametrize(
    "arguments",
    [
        {"names": ("a",), "labels": [0]},
        {"names": ("a",), "labels": [0, 1], "root": "."},
        {"names": ("a",), "labels": [0], "arrays": np.zeros((2, 1, 1, 3), np.uint8)},
    ],
)
def test_pictures_that_do_not_fit_together(arguments):
    with pytest.raises(ValueError, match=r"either root or arrays|differ in length"):
        Pictures(**arguments)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize(("width", "height"), [(301, 200), (123, 457), (32, 32), (20, 17)])
def test_evaluation_transform_is_the_peers(tmp_path, width, height, resize_mode):
    """Against PIL's own resizing, as the peers' loaders call it.

    Both round to uint8 after each of two passes: they may differ by one step.
    """
    image = photo(width, height)
    image.save(tmp_path / "photo.png")
    preprocessing = Preprocessing(32, resize_mode=resize_mode)
    bicubic = peers.InterpolationMode.BICUBIC
    size = (32, 32) if resize_mode == "squash" else 32
    reference = peers.Compose(
        [
            peers.Resize(size, bicubic),
            peers.CenterCrop(32),
            peers.ToTensor(),
            peers.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    got = evaluation_transform(preprocessing)(pictures_in(tmp_path, "photo.png").load(0))
    assert got.dtype == torch.float32
    step = 1 / (255 * torch.tensor(preprocessing.std).view(3, 1, 1))
    assert ((got - reference(image)).abs() <= 1.01 * step).all()


def test_training_transform_draws_from_the_global_generator():
    transform = training_transform(Preprocessing(16))
    picture = torch.arange(3 * 40 * 30, dtype=torch.int32).to(torch.uint8).view(3, 40, 30)
    before = picture.clone()
    outcomes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outcomes.append(transform(picture))
    assert outcomes[0].shape == (3, 16, 16)
    assert outcomes[0].dtype == torch.float32
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])
    assert torch.equal(picture, before)
