"""``python -m lamp_fast.data``: what it finds, against data sets made to have it."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image

from lamp_fast import cli
from lamp_fast.data import __main__ as command
from lamp_fast.data.describe import describe, to_text
from lamp_fast.data.names import odd_names
from lamp_fast.data.settings import DataConfig
from lamp_fast.runs.experiment import load_data


def save_noise(file, seed):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def root(tmp_path):
    """Five classes with parts of their own, every file different."""
    root = tmp_path / "pictures"
    seed = 0
    for part, counts in (
        ("train", (12, 6, 3, 3, 2)),
        ("val", (2, 0, 1, 1, 1)),
        ("test", (3, 3, 3, 3, 3)),
    ):
        for name, count in zip(("ant", "big_cat", "cup", "dog", "elk"), counts, strict=True):
            for number in range(count):
                seed += 1
                save_noise(root / part / name / f"{number}.png", seed)
    return root


def described(root, **data):
    settings = DataConfig(**({"data": "folder", "root": root} | data))
    return describe(*load_data(settings, seed=1), progress=False)


def test_counts_and_groups(root):
    found = described(root)
    assert (found.data, found.split, found.imb, found.cap) == ("folder", "all", 1, None)
    rows = [
        (each.name, each.training, each.train, each.val, each.test, each.group)
        for each in found.classes
    ]
    assert rows == [
        ("ant", 12, 12, 2, 3, "head"),  # ceil(0.2 * 5) = 1 class is the head
        ("big cat", 6, 6, 0, 3, "tail"),
        ("cup", 3, 3, 1, 3, "tail"),
        ("dog", 3, 3, 1, 3, "tail"),
        ("elk", 2, 2, 1, 3, "tail"),
    ]
    assert found.imbalance == 6
    assert found.unreadable == found.copies == found.odd_names == found.drawn == ()
    text = to_text(found)
    assert "26 train, 5 val, 15 test" in text
    assert "12 to 2 a class, imbalance ratio 6" in text
    assert "1 head class of 12, 4 tail classes of 6 to 2 pictures" in text
    assert "no unreadable picture, no duplicate" in text
    bars = {line.split()[0]: line.count("█") for line in text.splitlines() if "█" in line}
    assert bars == {"ant": 30, "big": 15, "cup": 7, "dog": 7, "elk": 5}  # 30 n / 12, rounded down


def test_the_protocol_is_shown_as_training_draws_it(root):
    found = described(root, split="base-new", imb=4, cap=8)
    # Base: ant, big cat, cup; targets 8, 4, 2 of 8, 6, 3.
    assert [(each.training, each.train, each.group) for each in found.classes] == [
        (8, 12, "head"),
        (4, 6, "tail"),
        (2, 3, "tail"),
        (0, 3, "new"),
        (0, 2, "new"),
    ]
    text = to_text(found)
    assert "5 classes (3 base, 2 new)" in text
    assert "14 pictures (split base-new, cap 8, imb 4): 8 to 2 a class" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("ant "))
    assert row[:6] == ["ant", "8", "12", "2", "3", "head"]
    shots = described(root, shots=2)
    assert [each.group for each in shots.classes] == [None] * 5
    assert "2 shots" in to_text(shots)
    assert "every class is as large" in to_text(shots)


def test_unreadable_pictures(root):
    broken = [root / "train" / "ant" / "3.png", root / "test" / "elk" / "0.png"]
    for file in broken:
        file.write_bytes(file.read_bytes()[:50])
    for number in range(2):
        (root / "train" / "elk" / f"{number}.png").write_text("no picture")
    found = described(root)
    assert len(found.unreadable) == 4
    assert [
        str(file) in line for file, line in zip(broken, found.unreadable[::3], strict=True)
    ] == [
        True,
        True,
    ]
    assert [found.classes[0].training, found.classes[4].training] == [11, 0]
    assert found.classes[4].test == 2
    assert found.imbalance is None
    text = to_text(found)
    assert "4 pictures cannot be read" in text
    assert "1 class left without a readable training picture" in text


def test_copies(root):
    """The same bytes again: in test, under another name, in the same class."""
    shutil.copy(root / "train" / "ant" / "0.png", root / "test" / "ant" / "leak.png")
    shutil.copy(root / "train" / "cup" / "0.png", root / "train" / "dog" / "conflict.png")
    for number in range(2):
        shutil.copy(root / "val" / "elk" / "0.png", root / "val" / "elk" / f"again{number}.png")
    found = described(root)
    assert [(each.leak, each.conflict, len(each.files)) for each in found.copies] == [
        (True, False, 2),
        (False, True, 2),
        (False, False, 3),
    ]
    assert found.copies[0].files == (
        ("train", "ant", "train/ant/0.png"),
        ("test", "ant", "test/ant/leak.png"),
    )
    text = to_text(found)
    for line in (
        "1 picture in train and test, a leak (same bytes)",
        "  train 'train/ant/0.png' = test 'test/ant/leak.png'",
        "1 picture under two class names (same bytes)",
        "  train 'train/cup/0.png' (cup) = train 'train/dog/conflict.png' (dog)",
        "1 picture more than once (same bytes)",
    ):
        assert line in text.splitlines()


def test_many_classes_and_problems_are_cut_short(tmp_path):
    for label in range(60):
        for number in range(4):
            save_noise(tmp_path / f"class {label:02}" / f"{number}.png", seed=number)
    text = to_text(described(tmp_path))
    assert "... 20 more, --json has them all" in text
    # Four sets of 60 copies, all of them leaks: a few files of each are named.
    assert "4 pictures in train and test, a leak" in text
    assert "55 more" in text
    assert max(map(len, text.splitlines())) < 250


ODD = {
    "axolotl": "'axolotl' in 4 tokens: ax o lot l",
    "n01440764": "no word",
    "737-800": "no word",
    "3": "no word",
    "жук": "unknown characters: ж к",
    "Straße": "unknown characters: ß",
    "caf\ufffd": "unknown characters: U+FFFD",
    "bell\a": "unknown characters: U+0007",
    "\udcffile": "unknown characters: U+DCFF",
    "very " * 80: "a prompt of 87 tokens, CLIP reads 77",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_names(name):
    (found,) = odd_names(["cat", name], "a photo of a {}.")
    assert found.name == name
    assert ODD[name] in found.reason


@pytest.mark.parametrize(
    "name", ["cat", "red fox", "2012 BMW M3 Coupe", "café", "stop sign", "T-shirt", "black & white"]
)
def test_ordinary_names(name):
    assert odd_names([name], "a photo of a {}.") == []


def test_names_that_no_text_tells_apart():
    found = odd_names(["Ant", "bee", "ant", "ANT "], "{}")
    assert [(each.name, each.reason) for each in found] == [
        ("ant", "the same tokens as 'Ant'"),
        ("ANT ", "the same tokens as 'Ant'"),
    ]


def test_the_rule_spares_almost_all_of_imagenet():
    assert len(odd_names(IMAGENET_CLASSNAMES, "a photo of a {}.")) == 13


def rename_elk(root, name):
    (root / "train" / "elk").rename(root / "train" / name)
    for part in ("val", "test"):
        shutil.rmtree(root / part / "elk")


def test_the_command(root, tmp_path):
    """As a person calls it, on a name that tries to steer the terminal and matplotlib."""
    rename_elk(root, "elk\x1b[31m $a$ 犬")
    out = tmp_path / "chart.png"
    answer = subprocess.run(
        [sys.executable, "-m", "lamp_fast.data", str(root), "--out", str(out)],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert answer.returncode == 0, answer.stderr
    assert "\x1b" not in answer.stdout
    assert "elk\\x1b[31m $a$ 犬" in answer.stdout
    assert "█" * 30 in answer.stdout
    with Image.open(out) as chart:
        assert min(chart.size) > 200


@pytest.mark.parametrize("kind", ["folder", "table", "list"])
def test_a_chart_never_takes_the_place_of_what_it_describes(root, tmp_path, capsys, kind):
    picture, chart = root / "train" / "ant" / "0.png", tmp_path / "chart.png"
    table = tmp_path / "list.csv"
    rows = [f"{file},{file.parent.name}\n" for file in sorted((root / "train").rglob("*.png"))]
    table.write_text("path,label\n" + "".join(rows))
    read = {"folder": picture, "table": table, "list": table}[kind]
    chart.symlink_to(read)
    before = read.read_bytes()
    words = {"folder": [root], "table": ["--table", table], "list": ["--test", table]}[kind]
    code, _, err = call(capsys, *map(str, [*words, "--out", chart]))
    assert code == 2
    assert err.startswith(f"error: --out {chart}: is read as {read}, expected another file")
    assert read.read_bytes() == before


def test_a_terminal_without_blocks(root, monkeypatch):
    rename_elk(root, "elk 犬")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert command.main(command.DescribeConfig(folder=root)) == 0
    terminal.flush()
    text = terminal.buffer.getvalue().decode("ascii")
    assert "#" * 30 in text
    assert r"elk \u72ac" in text


def call(capsys, *arguments):
    """The command in this process, which is quicker: exit code, output, error."""
    with pytest.raises(SystemExit) as stop:
        cli.run(command.DescribeConfig, command.main, list(map(str, arguments)))
    output = capsys.readouterr()
    return stop.value.code, output.out, output.err


@pytest.fixture
def quiet_cli(monkeypatch):
    """cli.run changes how warnings are shown, for good; pytest wants its own way back."""
    monkeypatch.setattr(cli, "_quieten", lambda: None)


@pytest.mark.usefixtures("quiet_cli")
def test_json(root, capsys):
    shutil.copy(root / "train" / "ant" / "0.png", root / "test" / "ant" / "leak.png")
    code, out, _ = call(capsys, root, "--json")
    assert code == 0
    values = json.loads(out)
    assert values["classes"][1] == {
        "name": "big cat",
        "training": 6,
        "train": 6,
        "val": 0,
        "test": 3,
        "group": "tail",
    }
    assert values["copies"][0]["leak"] is True
    assert values["copies"][0]["files"][1] == ["test", "ant", "test/ant/leak.png"]


@pytest.mark.usefixtures("quiet_cli")
def test_the_same_pictures_by_folder_table_and_name(root, tmp_path, capsys):
    rows = [
        f"{file.relative_to(root)},{file.parent.name},{file.parents[1].name}"
        for file in sorted(root.rglob("*.png"))
    ]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,label,split", *rows]))
    names = sorted({row.split(",")[1] for row in rows})
    lists = []
    for part in {row.split(",")[2] for row in rows}:
        of_part = [row.split(",") for row in rows if row.endswith(f",{part}")]
        lines = [f"{path} {names.index(name)}" for path, name, _ in of_part]
        (tmp_path / f"{part}.txt").write_text("\n".join(lines))
        lists += [f"--{part}", tmp_path / f"{part}.txt"]
    classes = []
    for arguments in (
        [root],
        ["--data", "folder", "--root", root],
        ["--table", table, "--root", root],
        [root, "--table", table],
        [root, *lists],
        ["--data", "list", *lists, "--root", root],
    ):
        code, out, err = call(capsys, *arguments, "--json")
        assert code == 0, err
        classes.append(json.loads(out)["classes"])
    assert classes == [classes[0]] * 6
    code, out, _ = call(capsys)
    assert code == 0
    assert out.startswith("data       digits: 10 classes (5 base, 5 new)")


@pytest.mark.usefixtures("quiet_cli")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ROOT", "--root", "elsewhere"], "--root elsewhere: expected one root"),
        (["nowhere"], "--root "),
        (["ROOT", "--data", "flowers"], "--data flowers: expected one of digits"),
        (["ROOT", "--table", "ROOT/none.csv"], "--table "),
        (["ROOT", "--split", "half"], "--split half: expected all or base-new"),
        (["ROOT", "--imb", "0"], "--imb 0.0: expected at least 1"),
        (["ROOT", "--template", "a photo"], "--template 'a photo': expected {} once"),
        (["ROOT", "--out", "chart.jpg"], "--out chart.jpg: expected the name of a .png file"),
        (["ROOT", "--out", "none/chart.png"], "--out none/chart.png: expected a file in a folder"),
    ],
)
def test_refusals(root, tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(capsys, *(each.replace("ROOT", str(root)) for each in arguments))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {expected}")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
