"""Values, sizes and annotations at the edge of what a picture file may hold."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from lamp_fast.data import pictures as module
from lamp_fast.data.pictures import Pictures, check_pictures, decode
from lamp_fast.errors import InputError


def read(file):
    return Pictures((file.name,), [0], root=file.parent).load(0)


def refused(file):
    """Why, alike when it is checked and when it is loaded."""
    pictures = Pictures((file.name,), [0], root=file.parent)
    messages = []
    for attempt in (lambda: pictures.load(0), lambda: check_pictures(pictures, progress=False)):
        with pytest.raises(InputError) as error:
            attempt()
        messages.append(str(error.value))
    assert messages[1].startswith(messages[0])
    return messages[0]


def write_tiff(file, values):
    """One strip of greyscale, written by the format's own book: PIL writes few kinds."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    entries = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, values.dtype.itemsize * 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, values.nbytes),
        (339, 3, kind),
    ]
    packed = b"".join(
        struct.pack(f"{order}HHI{'H2x' if size == 3 else 'I'}", tag, size, 1, value)
        for tag, size, value in entries
    )
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + values.nbytes)
    directory = struct.pack(f"{order}H", len(entries)) + packed + bytes(4)
    file.write_bytes(start + values.tobytes() + directory)


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<u4", "<i2", ">i2", "i1", "<f4"])
def test_numbers_without_an_agreed_range_are_refused(tmp_path, dtype):
    """Clipped to 8 or 16 bits they would be black or white, and trained on."""
    file = tmp_path / "values.tif"
    write_tiff(file, np.arange(12).reshape(3, 4).astype(dtype))
    assert "no agreed range" in refused(file)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
def test_unsigned_greyscale_is_scaled(tmp_path, dtype):
    """The same writer, so that the refusals above are of the numbers and not of the file."""
    file = tmp_path / "values.tif"
    most = np.iinfo(dtype).max
    write_tiff(file, np.array([[0, most], [most // 3, most]]).astype(dtype))
    assert read(file)[0].tolist() == [[0, 255], [85, 255]]


def with_chunk(png, kind, data):
    """A PNG with one more chunk, after its header."""
    chunk = struct.pack(">I", len(data)) + kind + data
    chunk += zlib.crc32(kind + data).to_bytes(4, "big")
    return png[:33] + chunk + png[33:]


def png(image, **options):
    content = io.BytesIO()
    image.save(content, "PNG", **options)
    return content.getvalue()


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"zTXt", b"history\0\0" + zlib.compress(bytes(2**21))),
        (b"iTXt", b"history\0\1\0\0\0" + zlib.compress(b"a" * 2**21)),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(2**21))),
        (b"tEXt", b"history\0" + b"a" * (PngImagePlugin.MAX_TEXT_MEMORY + 1)),
    ],
)
def test_a_png_keeps_its_pixels_whatever_is_written_beside_them(tmp_path, kind, data):
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    content = with_chunk(png(Image.fromarray(noise)), kind, data)
    with pytest.raises(ValueError, match=r"too large|[Tt]oo much memory"):
        Image.open(io.BytesIO(content)).load()
    file = tmp_path / "annotated.png"
    file.write_bytes(content)
    assert read(file).permute(1, 2, 0).tolist() == noise.tolist()
    check_pictures(Pictures((file.name,), [0], root=tmp_path), progress=False)
    # Damage to the pixels themselves is still found.
    file.write_bytes(content[:-30])
    refused(file)


def test_a_short_text_still_says_which_way_up(tmp_path):
    image = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    content = png(image, pnginfo=text)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert expected.size == (2, 3)
    assert decode(content).tobytes() == expected.tobytes()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_photograph_of_108_megapixels(tmp_path):
    file = tmp_path / "phone.jpg"
    Image.new("RGB", (12_000, 9_000), (10, 200, 30)).save(file)
    picture = Pictures((file.name,), [0], root=tmp_path, downscale=90).load(0)
    assert picture.shape == (3, 90, 120)
    check_pictures(Pictures((file.name,), [0], root=tmp_path), progress=False)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16", "1", "CMYK"])
def test_bands_of_a_large_picture_are_those_of_the_whole(monkeypatch, mode):
    values = np.random.default_rng(1).integers(0, 2**16, (30, 7), dtype=np.uint16)
    image = Image.fromarray(values)
    if mode != "I;16":
        shape = (30, 7, len(Image.new(mode, (1, 1)).getbands()))
        pixels = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
        made = {"1": "L", "P": "L"}.get(mode, mode)
        image = Image.frombytes(made, (7, 30), pixels.tobytes()).convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    content = io.BytesIO()
    image.save(content, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
    whole = decode(content.getvalue())
    bands, convert = [], module._band_to_rgb
    monkeypatch.setattr(module, "_BAND_PIXELS", 7 * 4 + 3)
    monkeypatch.setattr(
        module, "_band_to_rgb", lambda band: bands.append(band.height) or convert(band)
    )
    assert decode(content.getvalue()).tobytes() == whole.tobytes()
    assert bands == [4] * 7 + [2]


def test_greyscale_of_16_bits_that_pil_opened(tmp_path):
    """PIL reads a 16-bit PGM into 32-bit integers; its own range is still known."""
    from lamp_fast.data.handed_over import read_taken, take

    values = np.array([[0, 65535, 32768]], dtype=np.uint16)
    (tmp_path / "grey.pgm").write_bytes(b"P5 3 1 65535\n" + values.astype(">u2").tobytes())
    with Image.open(tmp_path / "grey.pgm") as opened:
        picture = read_taken(0, take(0, opened))
        assert torch.equal(picture[0], torch.tensor([[0, 255, 128]], dtype=torch.uint8))
    with pytest.raises(InputError, match="no agreed range"):
        read_taken(0, take(0, Image.fromarray(values.astype(np.int32))))
