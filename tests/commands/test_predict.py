"""The command that classifies files: what it takes, writes, skips and refuses."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lamp_fast import cli, predict
from lamp_fast.classifier import Classifier
from lamp_fast.data.sources import load_source
from lamp_fast.runs.folder import LEARNED


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict") / "run"
    Classifier.train(epochs=1, warmup_epochs=0, shots=4, out=folder)
    return folder


@pytest.fixture(scope="module")
def classifier(run):
    return Classifier.load(run, device="cpu")


@pytest.fixture
def pictures(tmp_path):
    """Five scans: two in the folder, two below it, one that a folder does not count."""
    scans = load_source("digits", None).test
    place = tmp_path / "pictures"
    (place / "below" / "further").mkdir(parents=True)
    (place / ".hidden").mkdir()
    names = ["b.png", "a.jpg", "below/c.PNG", "below/further/d.webp", ".hidden/e.png"]
    for index, name in enumerate(names):
        file = place / name
        Image.fromarray(scans.arrays[index]).resize((32, 32)).save(file)
    (place / "notes.txt").write_text("no picture")
    return place


def call(*arguments):
    """The command's exit code, through its own entry."""
    with pytest.raises(SystemExit) as stop:
        cli.run(predict.PredictConfig, predict.main, [str(each) for each in arguments])
    return stop.value.code


def rows_of(text):
    return list(csv.DictReader(text.splitlines()))


def assert_same(rows, files, answers):
    """Rows of the CSV against what the Python object says of the same files."""
    expected = [
        (str(file), str(rank), name, trained)
        for file, answer in zip(files, answers, strict=True)
        for rank, (name, trained) in enumerate(zip(answer.names, answer.trained, strict=True), 1)
    ]
    got = [(row["file"], row["rank"], row["class"], row["trained"] == "true") for row in rows]
    assert got == expected
    probabilities = [value for answer in answers for value in answer.probabilities]
    # Six digits are written.
    assert [float(row["probability"]) for row in rows] == pytest.approx(probabilities, rel=1e-5)


def test_as_a_user_calls_it(run, pictures):
    answer = subprocess.run(
        [sys.executable, "-m", "lamp_fast.predict", str(run), str(pictures), "--top", "2"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = answer.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        str(pictures / name) for name in ("a.jpg", "b.png", "below/c.PNG", "below/further/d.webp")
    ]
    assert all(line.count("%") == 2 for line in lines)
    assert "classes 5 trained, 0 not" in answer.stderr
    assert "bias    trained" in answer.stderr


def test_folders_files_and_tables_in_the_order_given(run, classifier, pictures, capsys):
    table = pictures / "below" / "list.csv"
    table.write_text("label,path\nx,c.PNG\ny,../b.png\n", encoding="utf-8-sig")
    sources = (pictures / "b.png", pictures / "below", table)
    assert call(run, *sources, "--csv", "-", "--top", "3", "--batch", "2") == 0
    files = [
        pictures / "b.png",
        pictures / "below" / "c.PNG",
        pictures / "below" / "further" / "d.webp",
        pictures / "below" / "c.PNG",
        pictures / "below" / ".." / "b.png",
    ]
    assert_same(rows_of(capsys.readouterr().out), files, classifier.classify(files, top=3, batch=2))


def test_csv_and_json_files_hold_the_same(run, classifier, pictures, tmp_path, capsys):
    table, document = tmp_path / "answers.csv", tmp_path / "answers.json"
    assert call(run, pictures, "--csv", table, "--json", document, "--add", "zebra, yak") == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert "classes 5 trained, 2 not (zebra, yak)" in output.err
    content = json.loads(document.read_text())
    names = [*classifier.trained_names, "zebra", "yak"]
    assert content["classes"] == [
        {"name": name, "trained": name in classifier.trained_names} for name in names
    ]
    assert (content["bias"], content["unreadable"]) == ("trained", [])
    files = sorted(each for each in pictures.rglob("*.*") if each.name[0] in "abcd")
    assert_same(rows_of(table.read_text()), files, classifier.classify(files, names))
    flat = [
        (each["file"], answer["class"], answer["probability"])
        for each in content["pictures"]
        for answer in each["predictions"]
    ]
    assert [(file, name) for file, name, _ in flat] == [
        (row["file"], row["class"]) for row in rows_of(table.read_text())
    ]
    assert sum(value for *_, value in flat) <= len(files) + 1e-6
    assert sorted(each.name for each in tmp_path.iterdir() if each != pictures) == [
        "answers.csv",
        "answers.json",
    ]


def test_json_on_standard_output_is_json_alone(run, pictures, capsys):
    assert call(run, pictures / "b.png", "--json", "-") == 0
    (picture,) = json.loads(capsys.readouterr().out)["pictures"]
    assert picture["file"] == str(pictures / "b.png")


@pytest.mark.parametrize(
    ("flags", "expected", "bias"),
    [
        ([], "base", "trained"),
        (["--classes", "trained"], "base", "trained"),
        (["--classes", "all"], "base new", "trained"),
        (["--classes", "all", "--add", "zebra"], "base new zebra", "trained"),
        (["--classes", "five,six,seven,eight,nine"], "new", "adapted"),
        (["--classes", "five,six"], ["five", "six"], "trained"),
        (["--classes", '"ice, dry",zebra'], ["ice, dry", "zebra"], "trained"),
    ],
)
def test_which_classes(flags, expected, bias, run, classifier, pictures, capsys):
    if isinstance(expected, str):
        parts = {"base": classifier.trained_names, "new": classifier.new_names}
        expected = [name for part in expected.split() for name in parts.get(part, (part,))]
    assert call(run, pictures / "b.png", *flags, "--json", "-", "--top", "99") == 0
    content = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in content["classes"]] == expected
    assert content["bias"] == bias
    (answers,) = [each["predictions"] for each in content["pictures"]]
    assert sorted(each["class"] for each in answers) == sorted(expected)
    assert sum(each["probability"] for each in answers) == pytest.approx(1, abs=1e-5)


def test_unreadable_pictures_are_told_and_left_out(run, pictures, tmp_path, capsys):
    whole = (pictures / "b.png").read_bytes()
    (pictures / "bb.png").write_bytes(whole[: len(whole) // 2])
    listed = tmp_path / "list.csv"
    listed.write_text("picture\npictures/b.png\npictures/missing.png\n")
    document = tmp_path / "answers.json"
    code = call(run, pictures, listed, "--path-column", "picture", "--json", document)
    assert code == 1
    errors = capsys.readouterr().err
    content = json.loads(document.read_text())
    assert len(content["pictures"]) == 5
    broken, missing = pictures / "bb.png", tmp_path / "pictures" / "missing.png"
    assert [each["file"] for each in content["unreadable"]] == [str(broken), str(missing)]
    for file in (broken, missing):
        assert sum(str(file) in line for line in errors.splitlines()) == 1
    assert "skipped 2 of 7 pictures" in errors
    assert call(run, broken) == 1


def test_the_training_data_and_the_saved_layout(run, pictures, tmp_path, capsys):
    """From a folder that save_pretrained wrote, the same lines."""
    Classifier.load(run).save_pretrained(tmp_path / "saved")
    outputs = []
    for folder in (run, tmp_path / "saved"):
        assert call(folder, pictures) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0]


def test_a_name_that_is_no_text(run, pictures, capsys):
    odd = pictures / "below" / "od\udcff\nd.png"
    shutil.copy(pictures / "b.png", odd)
    assert call(run, odd) == 0
    assert "od\\xff" in capsys.readouterr().out
    assert call(run, odd, "--csv", pictures / "answers.csv") == 0
    (first, *_) = rows_of_file(pictures / "answers.csv")
    assert "od\\xff" in first["file"]


def rows_of_file(file):
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


BAD_CALLS = [
    (["RUN"], "missing, expected at least one picture"),
    (["nowhere", "PICTURE"], "nowhere"),
    (["RUN", "nothing.png"], "nothing.png: does not exist"),
    (["RUN", "empty"], "empty: holds no pictures"),
    (["RUN", "PICTURE", "--top", "0"], "top 0: expected at least 1"),
    (["RUN", "PICTURE", "--top", "many"], "--top"),
    (["RUN", "PICTURE", "--batch", "0"], "batch 0: expected at least 1"),
    (["RUN", "PICTURE", "--classes", "zebra"], "at least 2 class names"),
    (["RUN", "PICTURE", "--classes", "a,,b"], "--classes 'a,,b': expected NAME,NAME"),
    (["RUN", "PICTURE", "--add", ""], "--add ''"),
    (["RUN", "PICTURE", "--add", "zero"], "'zero' is named 2 times"),
    (["RUN", "PICTURE", "--csv", "."], "--csv .: is a folder"),
    (["RUN", "PICTURE", "--json", "nowhere/x.json"], "--json nowhere/x.json: expected a file"),
    (["RUN", "PICTURE", "--json", "x", "--csv", "x"], "--json x: --csv writes there too"),
    (["RUN", "PICTURE", "--device", "abacus"], "--device abacus"),
    (["RUN", "PICTURE", "--pretrained", "w.pt"], "--pretrained w.pt"),
    (["RUN", "no_column.csv"], "--path-column path: expected such a column"),
    (["RUN", "no_rows.csv"], "no_rows.csv: has no rows"),
    (["RUN", "no_path.csv"], "no_path.csv: row 2 has no path"),
    (["RUN", "binary.csv"], "binary.csv: not a UTF-8 .csv file"),
    (["RUN", "PICTURE", "--nonsense"], "--nonsense"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_CALLS, ids=lambda value: " ".join(value)[:40]
)
def test_bad_usage_costs_one_line_and_nothing_is_written(
    arguments, message, run, pictures, tmp_path, monkeypatch, capsys
):
    place = tmp_path / "here"
    (place / "empty").mkdir(parents=True)
    (place / "no_column.csv").write_text("file\nx.png\n")
    (place / "no_rows.csv").write_text("path\n")
    (place / "no_path.csv").write_text("path,x\na.png,1\n,2\n")
    (place / "binary.csv").write_bytes(np.arange(256, dtype=np.uint8).tobytes())
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    known = {"RUN": str(run), "PICTURE": str(pictures / "b.png")}
    assert call(*(known.get(each, each) for each in arguments)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(place.iterdir()) == before


def test_an_unfinished_run_says_how_to_finish_it(run, pictures, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / LEARNED).unlink()
    assert call(copy, pictures) == 2
    assert f"--out {copy} --resume goes on" in capsys.readouterr().err
