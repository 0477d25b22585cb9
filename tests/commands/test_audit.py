"""``python -m lamp_fast.data --audit`` and ``--exclude``, with errors planted among digits."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

from lamp_fast import cli, train
from lamp_fast.data import __main__ as command
from lamp_fast.data.settings import DataConfig
from lamp_fast.errors import InputError
from lamp_fast.files import write_csv
from lamp_fast.runs import config as settings
from lamp_fast.runs.experiment import find_source, load_run

A_CLASS = 16
ODD_NAME = "<b>&.png"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Digits in folders, one wrong label in twenty, a resized copy; the report of an audit."""
    root = tmp_path_factory.mktemp("audit") / "pictures"
    source = find_source(DataConfig())
    rng, wrong = np.random.default_rng(0), set()
    for part, each in (("train", A_CLASS), ("test", 3)):
        pictures = getattr(source, part)
        for label in range(10):
            for row in np.flatnonzero(pictures.labels == label)[:each]:
                odd = part == "train" and rng.random() < 0.05
                given = (label + int(rng.integers(1, 10))) % 10 if odd else label
                path = f"{part}/{source.classnames[given]}/{row}.png"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                # Of 8 x 8 pixels a smaller copy would not show the same digit.
                image = Image.fromarray(pictures.arrays[row]).resize((64, 64))
                image.save(root / path)
                wrong |= {path} if odd else set()
    image.resize((48, 48)).save(root / "train/nine" / ODD_NAME)
    report = root.parent / "report"
    flags = ["--audit", "--out", str(report), str(root), "--clip", "tiny", "--shown", "3"]
    settings = cli.parse(command.DescribeConfig, flags)
    with pytest.warns(UserWarning, match="tiny"):
        assert command.main(settings) == 0
    with open(report / "audit.csv", newline="") as stream:
        return root, report, wrong, list(csv.DictReader(stream))


def test_planted_labels_are_found_better_than_by_chance(planted):
    _, _, wrong, rows = planted
    found = [row["path"] for row in rows if (row["kind"], row["part"]) == ("label", "train")]
    total, hits = 10 * A_CLASS + 1, len(wrong & set(found))
    # As many pictures drawn blindly would hold this many wrong ones, four standard deviations
    # (of the hypergeometric, below the binomial's) above the mean.
    chance = len(found) * len(wrong) / total
    assert hits > chance + 4 * math.sqrt(chance)
    assert len(wrong) > 5


def test_the_copy_is_found_and_the_page_escapes_its_name(planted):
    _, report, _, rows = planted
    leaks = [row for row in rows if row["kind"] == "leak"]
    assert f"train/nine/{ODD_NAME}" in [row["path"] for row in leaks]
    page = (report / "audit.html").read_text()
    assert "<b>" not in page
    kinds = {row["kind"] for row in rows}
    assert (
        0 < page.count("data:image/jpeg;base64,") <= 3 * (2 + 2 * len(kinds & {"leak", "conflict"}))
    )


def test_a_run_leaves_out_what_the_table_names_and_stays_itself(planted, tmp_path):
    root, _, _, rows = planted
    gone = {row["path"] for row in rows if row["part"] == "train"}
    excluded = tmp_path / "excluded.csv"
    write_csv(excluded, ("path", "part"), [(path, "train") for path in sorted(gone)])
    flags = ["--method", "zeroshot", "--data", "folder", "--root", str(root), "--clip", "tiny"]
    argv = [*flags, "--exclude", str(excluded), "--out", str(tmp_path / "run")]
    config = settings.parse_flags(argv, settings.default_config(settings.choosing_flags(argv)))
    assert train.main(config) == 0
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert set(record["data"]["excluded"]["train"]) == gone
    excluded.unlink()  # the run keeps what it said
    experiment, _ = load_run(tmp_path / "run")
    benchmark = experiment.benchmark
    left = {*benchmark.train.names, *benchmark.val.names}
    assert not gone & left
    assert len(left) == 10 * A_CLASS + 1 - len(gone)
    assert f"excluded pictures: {len(gone)} train" in benchmark.notes


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", "path\nnowhere.png\n", "row 1: 'nowhere.png' is none of the pictures"),
        ("a.csv", "path,part\n{train},test\n", "is none of the test pictures"),
        ("a.csv", "path,part\n{train},both\n", "part 'both': expected one of train, val, test"),
        ("a.csv", "file\nx\n", "expected one column 'path'"),
        ("a.txt", "{train}\nx\n", "line 2: 'x' is none"),
        ("a.txt", "{class}", "without a training picture"),
        ("a.json", "{}", "expected a .csv"),
        ("a.csv", None, "cannot be read"),
    ],
)
def test_what_cannot_be_left_out_is_refused(planted, tmp_path, name, content, complaint):
    root, file = planted[0], tmp_path / name
    of_class = sorted(str(each.relative_to(root)) for each in (root / "train/two").iterdir())
    if content is not None:
        content = content.replace("{train}", of_class[0]).replace("{class}", "\n".join(of_class))
        file.write_text(content)
    with pytest.raises(InputError, match=r"--exclude .*") as caught:
        find_source(DataConfig(data="folder", root=root, exclude=file))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--audit"], "--out: missing"),
        (["--audit", "--out", "new", "--json"], "--json"),
        (["--audit", "--out", "new", "--shots", "4"], "--shots 4"),
        (["--folds", "3"], "--folds 3: expected --audit"),
        (["--clip", "tiny"], "--clip tiny: expected --audit"),
        (["--audit", "--out", "new", "--folds", "1"], "--folds 1"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        command.main(cli.parse(command.DescribeConfig, flags))
    assert complaint in str(caught.value)
    assert not list(tmp_path.iterdir())
