"""Answers and scores at levels above the classes: genus, family."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lamp_fast import evaluate, predict
from lamp_fast.classifier import Classifier
from lamp_fast.data.hierarchy import Hierarchy, saved_hierarchy
from lamp_fast.data.settings import DataConfig
from lamp_fast.data.sources.hierarchy import read_hierarchy
from lamp_fast.errors import InputError
from lamp_fast.fields import to_json
from lamp_fast.runs import figures
from lamp_fast.runs.experiment import find_source, load_run
from lamp_fast.runs.levels import level_accuracies, predict_levels, roll_up

ROWS = ("class,genus,family", "red_fox,Vulpes,Canidae", "dog,Canis,Canidae", "cat,Felis,Felidae")
TREE = Hierarchy(
    ("genus", "family"),
    {
        "red fox": ("Vulpes", "Canidae"),
        "dog": ("Canis", "Canidae"),
        "cat": ("Felis", "Felidae"),
    },
)
NAMES = ("cat", "red fox", "dog")


def test_a_parents_probability_is_the_sum_of_its_classes():
    """So its answer may not be the likeliest class's parent."""
    logits = torch.tensor([[0.40, 0.35, 0.25], [0.6, 0.3, 0.1]], dtype=torch.float64).log()
    levels = tuple(TREE.every_level(NAMES))
    assert [each.names for each in levels] == [
        ("Felis", "Vulpes", "Canis"),
        ("Felidae", "Canidae"),
    ]
    rolled = roll_up(logits.softmax(1), levels[1])
    # A sum of two float64 in another order.
    torch.testing.assert_close(
        rolled, torch.tensor([[0.4, 0.6], [0.6, 0.4]], dtype=torch.float64), rtol=1e-12, atol=0
    )
    predicted = predict_levels(logits, levels)
    assert predicted.tolist() == [[0, 0, 1], [0, 0, 0]]
    found = level_accuracies(levels, np.array([2, 0]), predicted[:, 1:].numpy())
    assert found == {"genus": 0.5, "family": 1.0}


def test_a_file_of_levels(tmp_path):
    file = tmp_path / "tree.csv"
    file.write_text("\n".join([*ROWS, ROWS[1]]))
    assert read_hierarchy(file) == TREE
    assert read_hierarchy(file, ("family",)).level("family", NAMES).names == ("Felidae", "Canidae")
    assert saved_hierarchy(json.loads(json.dumps(to_json(TREE))), "here") == TREE
    with pytest.raises(InputError, match="--level order: expected one of genus, family"):
        TREE.level("order", NAMES)
    with pytest.raises(InputError, match="--level genus: class 'yak' and 1 more is not in"):
        TREE.level("genus", ("cat", "yak", "ox"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["species,genus", "cat,Felis"], "expected one column 'class'"),
        (["class", "cat"], "expected columns of levels beside 'class'"),
        (["class,genus", "cat,"], "row 1: genus is empty"),
        (["class,genus", "cat"], "row 1: genus is empty"),
        ([*ROWS, "cat,Lynx,Felidae"], "row 4: class 'cat' is of genus 'Lynx', but of 'Felis'"),
        ([*ROWS, "wolf,Canis,Lupidae"], "row 4: genus 'Canis' is of family 'Lupidae', but of"),
        (["class,genus"], "has no rows"),
    ],
)
def test_files_of_no_levels(rows, message, tmp_path):
    file = tmp_path / "tree.csv"
    file.write_text("\n".join(rows))
    with pytest.raises(InputError, match=message) as caught:
        read_hierarchy(file)
    assert str(caught.value).startswith(f"--hierarchy {file}")


@pytest.mark.parametrize(
    "values", [1, {"levels": [], "parents": {}}, {"levels": ["a"], "parents": {"x": []}}]
)
def test_a_damaged_hierarchy_of_a_run(values):
    with pytest.raises(InputError, match="here: expected levels"):
        saved_hierarchy(values, "here")


def draw(root):
    generator = np.random.default_rng(0)
    for name in NAMES:
        folder = root / name.replace(" ", "_")
        folder.mkdir(parents=True)
        for number in range(8):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures, a run on them that was told their families, and the file, which is gone."""
    place = tmp_path_factory.mktemp("levels")
    file = place / "tree.csv"
    file.write_text("\n".join(ROWS))
    flags = {"data": "folder", "root": draw(place / "pictures"), "method": "zeroshot"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plot_per_class", lambda *_: None)
        flags |= {"hierarchy": file, "levels": ["genus", "family"]}
        Classifier.train(**flags, clip="tiny", out=place / "run")
    file.rename(place / "moved.csv")
    return place


def test_a_run_is_scored_at_its_levels(place, capsys):
    [row] = json.loads((place / "run" / "result.json").read_text())
    experiment, _ = load_run(place / "run")
    pictures = experiment.benchmark.test_base
    names = experiment.benchmark.base_names
    answers = Classifier.load(place / "run").classify(
        [pictures.name(i) for i in range(len(pictures))]
    )
    for level, parents in (("genus", 0), ("family", 1)):
        right = []
        for answer, label in zip(answers, pictures.labels.tolist(), strict=True):
            total = {}
            for name, probability in zip(answer.names, answer.raw_probabilities, strict=True):
                parent = TREE.parents[name][parents]
                total[parent] = total.get(parent, 0) + probability
            true = TREE.parents[names[label]][parents]
            right.append(max(total, key=total.get) == true)
        assert row["levels"][level] == {"acc_base": np.mean(right), "acc_new": None}
    assert "accuracy, family" in (place / "run" / "table.md").read_text()
    assert evaluate.main(evaluate.EvaluateConfig(place / "run")) == 0
    shown = f"{100 * row['levels']['family']['acc_base']:.2f}"
    lines = capsys.readouterr().out.splitlines()
    [header] = (number for number, line in enumerate(lines) if "accuracy, family" in line)
    assert shown in lines[header + 2]


def test_answers_at_a_level_say_so(place, tmp_path, capsys):
    files = tuple(sorted((place / "pictures").glob("*/0.png")))
    classifier = Classifier.load(place / "run")
    classes = classifier.classify(files)
    families = classifier.classify(files, level="family")
    for of_class, of_family in zip(classes, families, strict=True):
        assert (of_class.level, of_family.level) == ("class", "family")
        found = dict(zip(of_class.names, of_class.probabilities, strict=True))
        told = dict(zip(of_family.names, of_family.probabilities, strict=True))
        # Two float32 are added once more.
        expected = pytest.approx(found["red fox"] + found["dog"], rel=1e-6)
        assert told == {"Felidae": found["cat"], "Canidae": expected}
        assert of_family.trained == (True, True)
    out = {kind: tmp_path / f"answers.{kind}" for kind in ("csv", "json")}
    config = predict.PredictConfig(place / "run", files, level="family", **out)
    assert predict.main(config) == 0
    with open(out["csv"], newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0])[:5] == ["file", "rank", "family", "probability", "trained"]
    document = json.loads(out["json"].read_text())
    assert document["level"] == "family"
    assert document["pictures"][0]["predictions"][0]["family"] == families[0].names[0]
    assert "level   family: probabilities are sums over classes" in capsys.readouterr().err
    with pytest.raises(InputError, match="--level order: expected one of genus, family"):
        predict.main(predict.PredictConfig(place / "run", files, level="order"))
    with pytest.raises(InputError, match="--level genus: class 'yak' is not in the hierarchy"):
        classifier.classify(files, ("cat", "yak"), level="genus")


def test_levels_that_come_later(place, tmp_path):
    files = sorted((place / "pictures").glob("*/0.png"))
    record = json.loads((place / "run" / "config.json").read_text())
    del record["data"]["hierarchy"]
    before = Classifier.load(place / "run")
    plain = Classifier(before.method, before.config, record, before.facts)
    with pytest.raises(InputError, match=r"--level genus: the run knows no level.*--hierarchy"):
        plain.classify(files, level="genus")
    before.save_pretrained(tmp_path / "saved")
    saved = Classifier.from_pretrained(tmp_path / "saved")
    assert saved.classify(files, level="genus") == before.classify(files, level="genus")
    later = Classifier.load(place / "run", hierarchy=place / "moved.csv")
    assert later.classify(files, level="genus") == before.classify(files, level="genus")


def test_a_table_holds_its_own_levels(place, tmp_path):
    rows = ["path,label,genus,family"]
    for line in ROWS[1:]:
        name, *above = line.split(",")
        rows += [",".join([f"{name}/{number}.png", name, *above]) for number in range(8)]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(rows))
    data = DataConfig(
        data="table", table=table, root=place / "pictures", levels=("genus", "family")
    )
    assert find_source(data).hierarchy == TREE
    assert (
        find_source(DataConfig(data="table", table=table, root=place / "pictures")).hierarchy
        is None
    )
    short = tmp_path / "short.csv"
    short.write_text("\n".join(ROWS[:-1]))
    data = DataConfig(data="folder", root=place / "pictures", hierarchy=short)
    with pytest.raises(InputError, match=f"--hierarchy {short}: class 'cat' is not in"):
        find_source(data)
    with pytest.raises(InputError, match="--levels genus: expected --hierarchy or --table"):
        DataConfig(data="folder", levels=("genus",)).check_together()
