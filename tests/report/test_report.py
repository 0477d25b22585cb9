"""The page about a run, and TensorBoard events where they are asked for."""

import csv
import html
import html.parser
import json
import re
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import gmean, hmean

from lamp_fast import train
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.data.settings import DataConfig
from lamp_fast.errors import InputError
from lamp_fast.files import write_csv
from lamp_fast.report.__main__ import ReportConfig, main
from lamp_fast.report.page import build_page
from lamp_fast.runs.config import TrainConfig, apply_preset, default_config
from lamp_fast.runs.experiment import load_run
from lamp_fast.runs.tensorboard import EventWriter

# Without the optional library the page is tested all the same.
EVENTS = find_spec("tensorboard") is not None
BEFORE = Path(__file__).parents[1] / "before"
EVIL = '<script>alert("x")</script> & $\\frac$'


class Page(html.parser.HTMLParser):
    """What a browser would make of the markup: elements, attributes, text; and its balance."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def one_epoch(out, **changes):
    config = apply_preset(TrainConfig(out=out), "tiny")
    return replace(
        config,
        optim=replace(config.optim, epochs=1),
        own=replace(config.own, adapt_passes=1),
        machine=replace(config.machine, threads=1),
        **changes,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    assert train.main(one_epoch(folder, tensorboard=EVENTS)) == 0
    return folder


@pytest.fixture(scope="module")
def page(run):
    return Page(build_page(run))


def test_the_page_loads_nothing_and_runs_no_script(page):
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "action"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, (name, value[:80])
        assert not any(name.startswith("on") for name in attributes)
    (policy,) = (each for each in page.all("meta") if "http-equiv" in each)
    assert policy["content"].startswith("default-src 'none'")


def test_every_id_is_there_once(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    # Groups of a figure such as "axes_1" name nothing that is referred to.
    referred = {each for each in ids if re.fullmatch(r"[a-z]?[0-9a-f]{10}", each)}
    assert referred
    assert all(ids.count(each) == 1 for each in referred)


def test_the_page_shows_what_the_run_folder_holds(page, run):
    for row in json.loads((run / "result.json").read_text()):
        assert row["name"] in page.text
        for key in ("acc_base", "acc_new", "hm_a", "hm_m", "tail"):
            assert f"{100 * row[key]:.2f}" in page.text
    with open(run / "confusion_new.csv", newline="") as stream:
        for name, *counts in list(csv.reader(stream))[1:]:
            shown = " ".join(each for each in counts if each != "0")
            assert f"{name} {shown}" in page.text
    assert len(page.all("svg")) == 3
    record = json.loads((run / "config.json").read_text())
    assert record["clip"]["fingerprint"][:16] in page.text
    assert record["version"] in page.text


def test_retrieved_prompts_are_the_methods_own(page, run):
    experiment, _ = load_run(run)
    pictures = experiment.benchmark.test_base
    index = int(np.argmax(pictures.labels == 2))
    image = experiment.test_transform(pictures.load(index))[None]
    routes = experiment.method.routes(image)
    row = page.text.split("Nearest prompts of a picture")[1].split("two ")[1].split("three ")[0]
    entries = [int(each) for each in re.findall(r"#(\d+)", row)]
    expected = [set(layer[0].tolist()) for layer in routes]
    assert [set(entries[at : at + 2]) for at in range(0, len(entries), 2)] == expected
    cosines = [float(each) for each in re.findall(r"-?\d\.\d{3}", row)]
    assert len(cosines) == len(entries)
    assert all(-1 <= each <= 1 for each in cosines)


def test_examples_are_marked_by_their_class(run):
    """Every answer that the page shows is in the confusion matrix; the wrong ones come first."""
    seen = {}
    for half in ("base", "new"):
        with open(run / f"confusion_{half}.csv", newline="") as stream:
            (_, *names), *lines = csv.reader(stream)
        for true, *counts in lines:
            seen |= {(true, name): int(each) for name, each in zip(names, counts, strict=True)}
    section = build_page(run).split("Test pictures, right and wrong")[1].split("<section>")[0]
    titles, wrong = [], 0
    for part in section.split("<h3>")[1:]:
        title = part.split("</h3>")[0]
        titles.append(title)
        said = re.findall(r'<span class="(\w+)">(\S) (LAMP|zero-shot): (.*?)</span>', part)
        assert said
        for colour, mark, who, answer in said:
            assert (colour == "right") == (mark == "✓") == (answer == title)
            assert who != "LAMP" or seen[title, answer]
        ours = [colour == "right" for colour, _, who, _ in said if who == "LAMP"]
        assert ours == sorted(ours)
        wrong += ours.count(False)
    assert wrong
    assert len(titles) == 10
    shares = [
        seen[name, name] / sum(n for (t, _), n in seen.items() if t == name) for name in titles
    ]
    assert shares == sorted(shares)


def test_the_same_run_gives_the_same_page(run):
    assert build_page(run) == build_page(run)


def test_without_the_data_the_page_says_so(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    record = json.loads((copy / "config.json").read_text())
    record["settings"]["data"] |= {"data": "folder", "root": str(tmp_path / "gone")}
    (copy / "config.json").write_text(json.dumps(record))
    page = Page(build_page(copy))
    assert "No pictures here" in page.text
    assert "does not exist" in page.text
    assert len(page.all("svg")) == 3
    assert not page.all("img")


def test_class_names_are_text_and_nothing_else(tmp_path):
    """A user's class names and template reach the page escaped, wherever they appear."""
    root = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for index in range(10):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    (root / "classes.json").write_text(json.dumps({"a": EVIL, "b": "<b>bold</b>"}))
    out = tmp_path / "run"
    data = DataConfig(data="folder", root=root, template="<i>{}</i>")
    assert train.main(one_epoch(out, data=data, clip=ClipConfig("tiny"))) == 0
    page = Page(build_page(out))
    assert "tiny CLIP has only seen drawn digits" in page.text
    assert not page.all("script")
    assert not page.all("b")
    assert '<script>alert("x")</script>' in page.text
    assert "<i>{}</i>" in page.text


def test_many_classes_become_one_picture(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    names = [f"class {index}" for index in range(60)]
    with open(copy / "confusion_base.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["", *names])
        writer.writerows([name, *([3] * 60)] for name in names)
    page = Page(build_page(copy))
    (matrix,) = (each for each in page.all("img") if each.get("class") == "matrix")
    assert matrix["alt"] == "confusion matrix of 60 classes"


@pytest.fixture(scope="module")
def undivided(tmp_path_factory):
    """Zero-shot CLIP on every class together, of 6 to 60 training pictures."""
    config = default_config({"method": "zeroshot", "data": "digits", "split": "all"})
    out = tmp_path_factory.mktemp("report") / "undivided"
    data = replace(config.data, split="all", cap=60, imb=10.0)
    machine = replace(config.machine, threads=1)
    assert train.main(replace(config, out=out, data=data, machine=machine)) == 0
    return out


def by_class_lines(page):
    """Title and value of every figure that gives each class the same weight."""
    section = page.split("every class with the same weight")[1].split("</table>")[0]
    lines = re.findall(r'<td class="name">(.*?)</td><td>(.*?)</td>', section)
    return {html.unescape(title): value for title, value in lines}


def test_groups_of_classes_by_size(undivided):
    """What the page says of groups follows from the accuracies in per_class.csv."""
    with open(undivided / "per_class.csv", newline="") as stream:
        classes = [
            (row["class"], int(row["training_pictures"]), float(row["accuracy: CLIP zero-shot"]))
            for row in csv.DictReader(stream)
        ]
    medium = [accuracy for _, count, accuracy in classes if count >= 20]
    few = [accuracy for _, count, accuracy in classes if count < 20]
    worst = min(classes, key=lambda each: each[2])
    every = [accuracy for *_, accuracy in classes]
    lines = by_class_lines(build_page(undivided))
    assert [title.split(",")[0] for title in lines] == [
        *("medium (20..100)", "few (< 20)", "balanced accuracy", "worst class"),
        *("geometric mean", "harmonic mean"),
    ]
    assert f"few (< 20), classes: {len(few)}" in lines
    values = list(lines.values())
    assert values.pop(3) == f"{worst[0]}: {100 * worst[2]:.2f}"
    expected = [np.mean(medium), np.mean(few), np.mean(every), gmean(every), hmean(every)]
    # The file has six digits behind the point, the page two of a percentage.
    assert [float(each) for each in values] == pytest.approx(
        [100 * each for each in expected], abs=0.005 + 1e-3
    )


def test_both_halves_have_a_worst_class(page, run):
    rows = json.loads((run / "result.json").read_text())
    lines = by_class_lines(build_page(run))
    for half in ("base", "new"):
        shown = f"{rows[0][f'worst_class_{half}']}: {100 * rows[0][f'worst_{half}']:.2f}"
        assert lines[f"worst class, {half} classes"] == shown


@pytest.mark.parametrize("name", ["run", "undivided"])
def test_a_run_of_before_has_a_page(name, request, tmp_path):
    """0.2.0 wrote neither figures of class size nor the column in per_class.csv."""
    copy = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(name), copy)
    rows = json.loads((copy / "result.json").read_text())
    known = set(json.loads((BEFORE / "lamp" / "result.json").read_text())[0])
    old = [{key: value for key, value in row.items() if key in known} for row in rows]
    (copy / "result.json").write_text(json.dumps(old))
    with open(copy / "per_class.csv", newline="") as stream:
        lines = [[*line[:5], *line[6:]] for line in csv.reader(stream)]
    write_csv(copy / "per_class.csv", lines[0], lines[1:])
    page = Page(build_page(copy))
    assert "every class with the same weight" not in page.text
    assert f"{100 * rows[0]['acc_base']:.2f}" in page.text
    assert lines[1][1] in page.text


@pytest.mark.parametrize("file", ["result.json", "metrics.jsonl", "per_class.csv"])
def test_a_damaged_file_is_named(run, tmp_path, file):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / file).write_bytes((copy / file).read_bytes()[:-3] + b"{")
    with pytest.raises(InputError, match=file):
        build_page(copy)


def test_the_command_writes_one_file(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(ReportConfig(run, out)) == 0
    assert out.read_text().startswith("<!doctype html>")
    assert str(out) in capsys.readouterr().out
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(InputError, match=r"--out .*: is a folder"):
        main(ReportConfig(run, tmp_path))
    with pytest.raises(InputError, match=r"config\.json"):
        main(ReportConfig(tmp_path / "nowhere"))


def test_tensorboard_events_hold_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [
        {"epoch": epoch, "loss": 1.0 / epoch, "layers": [3, 5], "load_std": [0.25, 0.5 * epoch]}
        for epoch in (1, 2, 3)
    ]
    first = EventWriter(tmp_path, 0)
    for line in lines[:2]:
        first.add(line)
    # A run that is resumed after epoch 1 writes epoch 2 again.
    second = EventWriter(tmp_path, 1)
    for line in lines[1:]:
        second.add(line | {"loss": line["loss"] + 1})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [each.step for each in events.Scalars("loss")] == [1, 2, 3]
    got = [each.value for each in events.Scalars("loss")]
    assert got == pytest.approx([1.0, 1.5, 4 / 3], rel=1e-6)
    got = [each.value for each in events.Scalars("load_std/layer 5")]
    assert got == pytest.approx([0.5, 1.0, 1.5])


def test_training_writes_events_when_asked(run):
    """That it does not otherwise is for the tests of what a run leaves."""
    pytest.importorskip("tensorboard")
    assert list((run / "tensorboard").iterdir())


def test_tensorboard_missing_is_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"--tensorboard: .*lamp_fast\[tensorboard\]"):
        train.main(one_epoch(out, tensorboard=True))
    assert not out.exists()
