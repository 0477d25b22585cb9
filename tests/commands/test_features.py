"""``python -m lamp_fast.features``: what it writes, what it refuses, what it does not do twice."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lamp_fast import cli
from lamp_fast.clip import features
from lamp_fast.clip.load import load_clip
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.data.settings import DataConfig
from lamp_fast.data.transforms import evaluation_transform
from lamp_fast.errors import InputError
from lamp_fast.features import __main__ as command
from lamp_fast.features.__main__ import FeaturesConfig, main

TINY = ClipConfig("tiny")


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(3)
    for name in ("cat/a.png", "cat/b.png", "dog/c.jpg"):
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pictures"


def read(out):
    with open(out / "pictures.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return (
        load_file(out / "features.safetensors"),
        rows,
        json.loads((out / "features.json").read_text()),
    )


def test_a_folder_gives_clips_own_features_row_by_row(folder, tmp_path):
    assert main(FeaturesConfig(out=tmp_path / "out", clip=TINY, sources=(folder,))) == 0
    tensors, rows, about = read(tmp_path / "out")
    clip = load_clip("tiny")
    assert [row["path"] for row in rows] == sorted(str(each) for each in folder.glob("*/*"))
    assert about["clip"]["fingerprint"] == clip.identity.fingerprint
    transform = evaluation_transform(clip.preprocessing)
    images = [torch.from_numpy(np.array(Image.open(row["path"]))) for row in rows]
    images = torch.stack([transform(each.permute(2, 0, 1)) for each in images])
    # Float32 in another order, through four blocks.
    expected = clip.model.encode_image(images)
    torch.testing.assert_close(tensors["projected"], expected, rtol=1e-4, atol=1e-4)
    assert list(tensors["unprojected"].shape) == about["shapes"]["unprojected"]


def test_a_data_set_comes_with_parts_and_labels(tmp_path):
    main(FeaturesConfig(out=tmp_path / "out", data=DataConfig(data="digits")))
    tensors, rows, _ = read(tmp_path / "out")
    assert len(rows) == len(tensors["projected"]) == 1797
    assert {row["part"] for row in rows} == {"train", "val", "test"}
    assert {(row["label"], row["class"]) for row in rows} >= {("0", "zero"), ("9", "nine")}


def test_crops_are_views_and_what_was_computed_is_not_computed_again(folder, tmp_path, monkeypatch):
    main(FeaturesConfig(out=tmp_path / "one", clip=TINY, sources=(folder,), crops=3))

    def never(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(features, "unprojected_features", never)
    main(FeaturesConfig(out=tmp_path / "two", clip=TINY, sources=(folder,), crops=3))
    one, two = (read(tmp_path / each)[0] for each in ("one", "two"))
    assert one["unprojected"].shape[:2] == (3, 3)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_unreadable_pictures_are_reported_and_left_out(folder, tmp_path, capsys):
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    assert main(FeaturesConfig(out=tmp_path / "out", clip=TINY, sources=(folder,))) == 1
    assert len(read(tmp_path / "out")[1]) == 3
    assert "broken.png" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["filled", "both", "empty", "crops", "missing"])
def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, case):
    out = tmp_path / "out"
    config = {
        "filled": FeaturesConfig(out=folder, clip=TINY, sources=(folder,)),
        "both": FeaturesConfig(
            out=out, clip=TINY, sources=(folder,), data=DataConfig(data="folder", root=folder)
        ),
        "empty": FeaturesConfig(out=out, clip=TINY, sources=(tmp_path / "empty",)),
        "crops": FeaturesConfig(out=out, clip=TINY, sources=(folder,), crops=-1),
        "missing": FeaturesConfig(out=out, clip=TINY, sources=(tmp_path / "nothing.png",)),
    }[case]
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        main(config)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.run(FeaturesConfig, main, ["--help"], prog="features", description=command.__doc__)
    assert "--crops" in capsys.readouterr().out
