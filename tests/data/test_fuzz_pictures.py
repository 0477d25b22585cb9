"""A thousand damaged files and some bombs: each a picture or an error, in bounded time and memory.

The files are read in a process of their own, so that a decoder's crash fails a test and not pytest.
"""

import io
import json
import resource
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lamp_fast.data.pictures import MAX_PIXELS, Pictures, check_pictures
from lamp_fast.errors import InputError

EACH = 84  # damaged copies of each of twelve files: 1,008
SECONDS_EACH = 2
# One picture of MAX_PIXELS is 1.4 GB with the copy that decoding takes, and 0.5 GB as a tensor.
MAX_MEMORY = 2 * 2**30


def photo(width=72, height=50):
    coarse = np.random.default_rng(1).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def originals():
    rgba = photo().convert("RGBA")
    rgba.putalpha(photo().convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray(np.asarray(photo().convert("L")).astype("<u2") * 257)
    return {
        "baseline.jpg": saved(photo(), "JPEG"),
        "progressive.jpg": saved(photo(), "JPEG", progressive=True),
        "cmyk.jpg": saved(photo().convert("CMYK"), "JPEG"),
        "exif.jpg": saved(photo(), "JPEG", exif=exif),
        "rgb.png": saved(photo(), "PNG"),
        "palette.png": saved(photo().quantize(40), "PNG", transparency=3),
        "rgba.png": saved(rgba, "PNG"),
        "grey16.png": saved(grey16, "PNG"),
        "lossy.webp": saved(photo(), "WEBP"),
        "lossless.webp": saved(photo(), "WEBP", lossless=True),
        "rgba.webp": saved(rgba, "WEBP", exif=exif),
        "animated.webp": saved(photo(), "WEBP", save_all=True, append_images=[rgba, photo()]),
    }


def damage(content, random):
    """One of seven kinds of damage, most likely near the headers."""
    damaged = bytearray(content)
    near = max(int(len(content) * random.random() ** 3), 1)
    length = int(random.integers(1, 40))
    kind = random.integers(7)
    if kind == 0:
        return content[:near]
    if kind == 1:
        for place in random.integers(0, len(content), length):
            damaged[place] ^= 1 << int(random.integers(8))
    elif kind == 2:
        damaged[near : near + length] = random.bytes(length)
    elif kind == 3:
        del damaged[near : near + length]
    elif kind == 4:
        damaged[near:near] = content[:near][-length:]
    elif kind == 5:
        damaged[near : near + 4] = random.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
    else:
        # Sizes are 16 or 32 bits: a header that promises much.
        damaged[near : near + 2] = b"\xff\xff"
    return bytes(damaged)


def with_right_checksums(content):
    """A PNG whose chunks are what their checksums say, so that damage reaches the decoder."""
    repaired, position = bytearray(content), 8
    while position + 12 <= len(repaired):
        end = position + 8 + int.from_bytes(repaired[position : position + 4], "big")
        if end + 4 > len(repaired):
            break
        repaired[end : end + 4] = zlib.crc32(repaired[position + 4 : end]).to_bytes(4, "big")
        position = end + 4
    return bytes(repaired)


def bombs():
    """Small files of every format whose headers promise hundreds of megapixels."""
    side = 30_000
    jpeg = bytearray(saved(photo(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    png = bytearray(saved(photo(), "PNG"))
    png[16:24] = struct.pack(">II", side, side)
    gif = bytearray(saved(photo(), "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    bmp = bytearray(saved(photo(), "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    tiff = bytearray(saved(photo(), "TIFF"))
    for tag in (256, 257):  # width and height
        entry = tiff.index(struct.pack("<H", tag), 8)
        tiff[entry : entry + 12] = struct.pack("<HHII", tag, 4, 1, side)
    webp = bytearray(originals()["animated.webp"])
    webp[24:30] = (16_382).to_bytes(3, "little") * 2  # the format's largest canvas
    return {
        "bomb.jpg": bytes(jpeg),
        "bomb.png": with_right_checksums(png),
        "bomb.gif": bytes(gif),
        "bomb.bmp": bytes(bmp),
        "bomb.ppm": b"P6\n%d %d\n255\n" % (side, side),
        "bomb.tif": bytes(tiff),
        "bomb.webp": bytes(webp),
    }


def read_bombs(folder):
    """The message of each bomb, by loading and by the first look."""
    messages = []
    for name, content in bombs().items():
        (folder / name).write_bytes(content)
        pictures = Pictures((name,), [0], root=folder)
        for read in (lambda each: each.load(0), check_pictures):
            try:
                read(pictures)
                messages.append(f"{name} was read")
            except InputError as error:
                messages.append(str(error))
    return messages


def read_damaged(name, folder):
    """Read every damaged copy of a file; what came of each, and how long it took."""
    content = originals()[name]
    pictures = Pictures((name,), [0], root=folder)
    outcomes = []
    for seed in range(EACH):
        damaged = damage(content, np.random.default_rng([seed, *name.encode()]))
        if name.endswith(".png") and seed % 2:
            damaged = with_right_checksums(damaged)
        (folder / name).write_bytes(damaged)
        started = time.perf_counter()
        try:
            picture = pictures.load(0)
            assert picture.dtype == torch.uint8
            assert picture.shape[0] == 3
            assert 0 < picture.shape[1] * picture.shape[2] <= MAX_PIXELS
            loads = True
        except InputError:
            loads = False
        checks = not check_pictures(pictures, skip_unreadable=True, progress=False)[1]
        outcomes.append((seed, loads, checks, time.perf_counter() - started))
    return outcomes


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What a process of its own reported of every file before it ended, and how it ended."""
    answer = subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__, str(tmp_path_factory.mktemp("fuzz"))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    return {line["name"]: line for line in lines}, answer


def test_the_process_lives(report):
    lines, answer = report
    assert answer.returncode == 0, f"after {list(lines)}: {answer.stderr[-2000:]}"
    assert sum(len(lines[name]["outcomes"]) for name in originals()) > 1000


def test_bombs_are_refused_before_they_take_memory(report):
    line = report[0]["bombs"]
    assert len(line["outcomes"]) == 14
    for message in line["outcomes"]:
        assert "refused as a decompression bomb" in message
    assert line["memory"] < 50 * 2**20  # the smallest of them would take 800 MB


@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp"])
def test_some_damage_is_survived(report, extension):
    names = [name for name in originals() if name.endswith(extension)]
    verdicts = [loads for name in names for _, loads, _, _ in report[0][name]["outcomes"]]
    assert 5 < sum(verdicts) < len(verdicts)


@pytest.mark.parametrize("name", originals())
def test_damaged_files(report, name):
    line = report[0][name]
    outcomes = line["outcomes"]
    assert max(seconds for *_, seconds in outcomes) < SECONDS_EACH
    assert line["memory"] < MAX_MEMORY
    # What training's first look lets pass must load later.
    assert not [seed for seed, loads, checks, _ in outcomes if loads != checks]


def main(folder):
    """Print a JSON line for the bombs and for each file: outcomes, and the growth in bytes."""
    warnings.simplefilter("ignore")
    check_pictures(Pictures((), [], root=folder))  # threads and bars are none of a picture's growth
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("bombs", *originals()):
        outcomes = read_bombs(folder) if name == "bombs" else read_damaged(name, folder)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        line = {"name": name, "outcomes": outcomes, "memory": grown * 1024}  # it counts KiB
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
