"""From one's own folders through every command: what is listed, scored, told, and how."""

import csv
import io
import json
import os
import stat
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from lamp_fast import cli, evaluate, predict, train
from lamp_fast.classifier import Classifier
from lamp_fast.data import __main__ as describe
from lamp_fast.data.decoded import DecodedCache
from lamp_fast.errors import InputError, printable
from lamp_fast.files import write_csv

# What a folder may be called and a terminal must not see.
CLASSES = ("ant\x1b]0;title\x07", "bee\nline", "=1+1")
COMMANDS = {
    "train": (train.read_flags, train.main),
    "evaluate": (partial(cli.parse, evaluate.EvaluateConfig), evaluate.main),
    "predict": (partial(cli.parse, predict.PredictConfig), predict.main),
    "data": (partial(cli.parse, describe.DescribeConfig), describe.main),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*never seen in the tiny", "ignore:Glyph")


def draw(root, *names, count=4):
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            seed = [number, *name.encode()]
            pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def call(capsys, command, *arguments):
    """Exit code, output and error; neither may hold what could steer a terminal."""
    read, main = COMMANDS[command]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_quieten", lambda: None)
        with pytest.raises(SystemExit) as stop:
            cli.run_read(read, main, [str(each) for each in arguments])
    output = capsys.readouterr()
    for text in (output.out, output.err):
        assert all(line.isprintable() for line in text.split("\n"))
    return stop.value.code, output.out, output.err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on three classes of odd names, moved into the folder of its pictures."""
    root = draw(tmp_path_factory.mktemp("own") / "pictures", *CLASSES, count=6)
    arguments = {"data": "folder", "root": root, "epochs": 1, "warmup_epochs": 0, "threads": 1}
    Classifier.train(**arguments, clip="tiny", out=root.parent / "first")
    (root / "runs").mkdir()
    return (root.parent / "first").rename(root / "runs" / "first")


def test_training_tells_what_it_drew_and_what_it_left_out(run, tmp_path, capsys):
    root = run.parents[1]
    (root / CLASSES[0] / "photo.heic").touch()
    arguments = ("--data", "folder", "--root", root, "--epochs", 1, "--warmup-epochs", 0)
    arguments += ("--clip", "tiny")
    code, out, err = call(capsys, "train", *arguments, "--out", tmp_path / "second")
    assert code == 0, err
    lines = out.splitlines()
    assert "data    val and test drawn here from train, alike in every run" in lines
    assert "data    left out: folders of runs: 1 ('runs/first')" in lines
    [line] = [each for each in lines if ".heic files" in each]
    assert r"ant\x1b]0;title\x07/photo.heic" in line
    with open(tmp_path / "second" / "per_class.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    # In files names are what they are, formulas of spreadsheets too.
    assert {row["class"] for row in rows} == set(CLASSES)
    code, out, _ = call(capsys, "data", root)
    assert code == 0
    assert "note       left out: folders of runs: 1 ('runs/first')" in out.splitlines()
    assert r"bee\nline" in out


def scored(folder):
    with open(folder / "per_class.csv", newline="") as stream:
        return {row["class"]: int(row["test_pictures"]) for row in csv.DictReader(stream)}


@pytest.mark.parametrize(
    ("folders", "count", "expected"),
    [
        (CLASSES, 4, [4, 4, 4]),
        (CLASSES, 1, [1, 1, 1]),
        ([f"test/{name}" for name in CLASSES], 3, [3, 3, 3]),
        ([*(f"train/{name}" for name in CLASSES), f"val/{CLASSES[1]}"], 2, [0, 2, 0]),
    ],
)
def test_evaluating_scores_every_labelled_picture(run, tmp_path, capsys, folders, count, expected):
    root = draw(tmp_path / "new", *folders, count=count)
    arguments = (run, "--data", "folder", "--root", root, "--out", tmp_path / "out")
    code, out, err = call(capsys, "evaluate", *arguments)
    assert code == 0, err
    found = scored(tmp_path / "out")
    assert [found[name] for name in CLASSES] == expected
    told = "data    all pictures are the test set, for there is no test part"
    assert (told in out.splitlines()) == ("/" not in folders[0])


def test_evaluating_a_table_of_test_rows(run, tmp_path, capsys):
    draw(tmp_path, "ant", "bee")
    rows = [f"{name}/{number}.png,{name},test" for name in ("ant", "bee") for number in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,split", *rows]))
    arguments = (run, "--data", "table", "--table", tmp_path / "t.csv", "--out", tmp_path / "out")
    code, _, err = call(capsys, "evaluate", *arguments)
    assert code == 0, err
    assert scored(tmp_path / "out") == {"ant": 4, "bee": 4}


def files_of(out):
    return [line.partition(": ")[0] for line in out.splitlines()]


def test_predictions_are_listed_as_training_lists(run, tmp_path, capsys):
    new = draw(tmp_path / "new", "deep", ".hidden", "@eaDir", count=1)
    os.rename(new / "deep" / "0.png", new / "deep" / "photo.jfif")
    (new / "linked").symlink_to(draw(tmp_path / "elsewhere", "more", count=2) / "more")
    code, out, err = call(capsys, "predict", run, new)
    assert code == 0
    expected = ["deep/photo.jfif", "linked/0.png", "linked/1.png"]
    assert files_of(out) == [str(new / each) for each in expected]
    assert "left out: hidden folders: 1 ('.hidden')" in err
    assert "left out: folders that systems make: 1 ('@eaDir')" in err
    # What somebody may have wanted to be classified is no success.
    (new / "photo.HEIC").touch()
    code, out, err = call(capsys, "predict", run, new)
    assert code == 1
    assert len(files_of(out)) == 3
    assert "left out: .heic files, a format that is not read: 1 ('photo.HEIC')" in err
    code, _, _ = call(capsys, "predict", run, new, "--json", tmp_path / "answers.json")
    told = json.loads((tmp_path / "answers.json").read_text())["left_out"]
    assert told == [line for line in err.splitlines() if line.startswith("left out")]


def test_a_folder_that_may_not_be_read_is_told(run, tmp_path, capsys, monkeypatch):
    """Simulated, because the permissions of files do not stop root."""
    new, scandir = draw(tmp_path / "new", "open", "shut"), os.scandir

    def refuse_shut(folder="."):
        if os.path.basename(folder) == "shut":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse_shut)
    code, out, err = call(capsys, "predict", run, new)
    assert code == 1
    assert len(files_of(out)) == 4
    assert "left out: folders that cannot be read: 1 ('shut')" in err


def test_a_list_of_paths_that_never_ends(run, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.csv")
    code, _, err = call(capsys, "predict", run, tmp_path / "pipe.csv")
    assert code == 2
    assert err == f"error: {tmp_path / 'pipe.csv'}: cannot be read (not a regular file)\n"


def test_names_of_files_reach_programs_as_they_are_and_people_escaped(
    run, tmp_path, capsys, monkeypatch
):
    odd = draw(tmp_path, "new", count=1) / "new" / "\x1b[2J\n@x.png"
    os.rename(tmp_path / "new" / "0.png", odd)
    code, out, _ = call(capsys, "predict", run, odd)
    assert code == 0
    assert r"\x1b[2J\n@x.png" in out
    (tmp_path / "new" / "bad\x1b.png").touch()
    assert r"bad\x1b.png" in call(capsys, "predict", run, tmp_path / "new")[2]
    assert call(capsys, "predict", run, odd, "--csv", tmp_path / "a.csv")[0] == 0
    with open(tmp_path / "a.csv", newline="") as stream:
        assert {row["file"] for row in csv.DictReader(stream)} == {str(odd)}
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert r"\x1b[2J\n@x.png" in call(capsys, "predict", run, odd, "--csv", "-")[1]


@pytest.mark.parametrize("code", [*range(0x20), 0x7F, 0x85, 0x9B, 0x202E, 0x2028, 0x200B, 0xDCFF])
def test_no_character_steers_a_terminal(code):
    shown = printable(f"a{chr(code)}z")
    assert shown.isprintable()
    assert shown.isascii()
    assert len(shown) > 3
    # Readable back, as Python writes it.
    assert eval(f"'{shown}'") == f"a{chr(code)}z"


@pytest.mark.parametrize("text", ["", "great auk", "犬 café", 'it\'s 5\\6 "x"'])
def test_other_text_stays_as_it_is(text):
    assert printable(text) == text


def failing(error):
    def main(_):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InputError("--root a\x1b[31m: no"), (2, "error: --root a\\x1b[31m: no\n")),
        (OSError(28, "No space", "a\x07\nb"), (1, "error: a\\x07\\nb: No space\n")),
        (KeyboardInterrupt("stopped a\x9b"), (130, "\nstopped a\\x9b\n")),
    ],
)
def test_errors_are_escaped(error, expected, capsys):
    with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
        cli.run(predict.PredictConfig, failing(error), ["run", "x.png"])
    assert (stop.value.code, capsys.readouterr().err) == expected


def test_warnings_are_escaped(capsys):
    def main(_):
        warnings.warn("class 'a\x1b[31m'", stacklevel=1)

    with warnings.catch_warnings(), pytest.raises(SystemExit):
        cli.run(predict.PredictConfig, main, ["run", "x.png"])
    assert "warning: class 'a\\x1b[31m'\n" in capsys.readouterr().err


def test_a_stream_without_the_letters(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    cli.say("犬\x1b", "b", stream=stream)
    assert stream.buffer.getvalue() == b"\\u72ac\\x1b\nb\n"


def test_csv_cells_are_not_changed_for_spreadsheets(tmp_path):
    """A documented choice: names are the same in every file."""
    names = ["=1+1", "+a", "-b", "@c", "\td"]
    write_csv(tmp_path / "t.csv", ["name"], [[name] for name in names])
    with open(tmp_path / "t.csv", newline="") as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == names


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_kept_pictures_follow_the_umask(tmp_path, umask):
    """A group that shares the folder can read what one of it has decoded."""
    before = os.umask(umask)
    try:
        cache = DecodedCache(tmp_path / "cache", 10**6)
        cache.write(bytes(32), torch.zeros(4, 4, 3, dtype=torch.uint8))
    finally:
        os.umask(before)
    files = [each for each in cache.folder.rglob("*") if each.is_file()]
    assert len(files) >= 2
    assert {stat.S_IMODE(each.stat().st_mode) for each in files} == {0o666 & ~umask}
