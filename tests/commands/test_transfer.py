"""``evaluate RUN --data NAME``: trained on one data set, tested on another."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lamp_fast import cli, evaluate
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.data.loading import evaluation_batches
from lamp_fast.data.settings import DataConfig
from lamp_fast.data.sources import load_source
from lamp_fast.data.templates import IMAGENET_7
from lamp_fast.errors import InputError
from lamp_fast.evaluate import EvaluateConfig
from lamp_fast.files import write_json
from lamp_fast.methods.base import frozen_image_features
from lamp_fast.methods.text import plain_text_features
from lamp_fast.methods.zeroshot import ZeroShot
from lamp_fast.runs.config import default_config
from lamp_fast.runs.experiment import assemble, load_run, load_run_on
from lamp_fast.runs.folder import CONFIG, LEARNED
from lamp_fast.runs.transfer import transfer_rows
from lamp_fast.tensors import load_tensors, save_tensors

pytestmark = pytest.mark.filterwarnings("ignore:--data", "ignore:.*never seen in the tiny")


def draw(file, seed):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The files of a run that b_new makes another method; the pictures it saw are gone."""
    folder = tmp_path_factory.mktemp("transfer")
    pictures = folder / "pictures"
    for seed in range(24):
        part = "train" if seed % 3 else "test"
        draw(pictures / part / "abcd"[seed % 4] / f"{seed}.png", seed)
    config = default_config({})
    data = DataConfig(data="folder", root=pictures, split="base-new")
    machine = replace(config.machine, threads=1)
    clip = ClipConfig("tiny")
    experiment = assemble(replace(config, data=data, machine=machine, clip=clip))
    torch.manual_seed(0)
    for name, each in experiment.method.state_dict().items():
        if name.endswith(("_pool", "shared")):
            each.normal_(std=0.5)
    experiment.method.new_image_balance.bias[:, ::2] = 10
    write_json(folder / CONFIG, experiment.record())
    save_tensors(
        folder / LEARNED,
        experiment.method.state_dict(),
        {"seconds": 1.5, "epochs": 1, "adaptation": {"passes": 1}},
    )
    shutil.rmtree(pictures)
    return folder


@pytest.fixture
def target(tmp_path):
    """Four wnids, more classes than the run trained, and three pictures of noise each."""
    miniatures.write_names(tmp_path / "imagenet-rendition")
    for seed, wnid in enumerate([*miniatures.CLASSNAMES] * 3):
        images = tmp_path / "imagenet-rendition" / "imagenet-r"
        draw(images / wnid / f"{seed}.png", 100 + seed)
    return DataConfig(data="imagenet_r", root=tmp_path)


def test_scores_are_those_of_the_trained_bias_over_the_targets_classes(run, target):
    experiment, facts = load_run_on(run, target)
    method = experiment.method
    learned, _ = load_tensors(run / LEARNED)
    assert all(torch.equal(each, learned[name]) for name, each in method.state_dict().items())
    rows = transfer_rows(experiment, facts["seconds"])
    assert [row.name for row in rows] == ["CLIP zero-shot on imagenet_r", "LAMP on imagenet_r"]
    source = load_source("imagenet_r", target.root)
    [(images, labels, _)] = evaluation_batches(source.test, experiment.test_transform, 100)

    def logits(method, adapted=False):
        names = ["tench", "great white shark", "missile", "missile"]
        return method.logits(images, method.prepare(names, "a photo of a {}."), adapted)

    for row, scored in zip(rows, (ZeroShot(experiment.clip), method), strict=True):
        confusion = np.zeros((4, 4), int)
        np.add.at(confusion, (labels.numpy(), logits(scored).argmax(1).numpy()), 1)
        assert (row.base.confusion == confusion).all()
        assert row.new is None
    values = rows[1].row(experiment.benchmark)
    assert values["acc_base"] == np.trace(confusion) / 12
    assert values["acc_new"] is values["hm_a"] is values["head"] is None
    before = logits(method)
    # What was scored would have been other than this.
    assert not torch.allclose(logits(method, adapted=True), before, atol=1e-3)


@pytest.mark.parametrize("template", [None, "a drawing of a {}."])
def test_lfa_scores_a_target_of_its_own_names_with_the_average(tmp_path, template):
    """ImageNet-V2 has ImageNet's names; its prompts are LFA's eight, but for a user's own."""
    miniatures.imagenet(tmp_path)
    miniatures.imagenetv2(tmp_path)
    config = default_config({"method": "lfa", "data": "imagenet", "split": "all"})
    data = DataConfig(data="imagenet", root=tmp_path, split="all")
    machine = replace(config.machine, threads=1)
    clip = ClipConfig("tiny")
    experiment = assemble(replace(config, data=data, machine=machine, clip=clip))
    method = experiment.method
    with torch.no_grad():
        method.weight.copy_(-method.ema)  # the most likely class becomes the least likely one
    folder = tmp_path / "run"
    write_json(folder / CONFIG, experiment.record())
    facts = {"seconds": 1.5, "epochs": 1, "adaptation": None}
    save_tensors(folder / LEARNED, method.state_dict(), facts)
    target = DataConfig(data="imagenetv2", root=tmp_path, template=template)
    experiment, _ = load_run_on(folder, target)
    _, row = transfer_rows(experiment, 1.5)
    benchmark, clip = experiment.benchmark, experiment.clip
    assert set(benchmark.base_names) == set(miniatures.BY_WNID)
    [(images, labels, _)] = evaluation_batches(benchmark.test_base, experiment.test_transform, 100)
    features = frozen_image_features(clip, images)
    texts = [
        F.normalize(plain_text_features(clip, benchmark.base_names, each), dim=-1)
        for each in ((template,) if template else IMAGENET_7)
    ]
    scores = features @ sum(texts).T
    confusion = np.zeros((4, 4), int)
    np.add.at(confusion, (labels.numpy(), scores.argmax(1).numpy()), 1)
    assert (row.base.confusion == confusion).all()


def test_the_runs_own_table_needs_its_own_pictures(run):
    with pytest.raises(InputError, match="pictures: does not exist"):
        load_run(run)


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.run(EvaluateConfig, evaluate.main, list(map(str, arguments)))
    output = capsys.readouterr()
    return stop.value.code, output.out, output.err


@pytest.fixture
def quiet_cli(monkeypatch):
    monkeypatch.setattr(cli, "_quieten", lambda: None)


@pytest.mark.usefixtures("quiet_cli")
def test_the_command(run, target, capsys):
    before = {each: each.stat().st_mtime_ns for each in run.iterdir() if each.is_file()}
    template = "a drawing of a {}."
    code, out, err = call(
        capsys, run, "--data", "ImageNetR", "--root", target.root, "--template", template
    )
    assert code == 0, err
    assert 'data    imagenet_r: 4 classes, "a drawing of a {}.", tested only' in out
    assert "data    12 test pictures" in out
    header, *rows = (line for line in out.splitlines() if line.startswith("|"))
    assert "accuracy" in header
    assert "HM" not in header
    assert [row.split("|")[1].strip() for row in rows[1:]] == [
        "CLIP zero-shot on imagenet_r",
        "LAMP on imagenet_r",
    ]
    folder = run / "on_imagenet_r"
    assert {each: each.stat().st_mtime_ns for each in before} == before
    assert {each.name for each in folder.iterdir()} == {
        "confusion_base.csv",
        "per_class.csv",
        "result.json",
        "table.md",
        "target.json",
    }
    assert (folder / "table.md").read_text() in out
    scored = json.loads((folder / "target.json").read_text())
    assert (scored["data"], scored["template"]) == ("imagenet_r", template)
    arguments = (run, "--data", "imagenet_r", "--root", target.root)
    assert call(capsys, *arguments, "--template", template)[0] == 0
    # Scores with another prompt do not take the place of these.
    written = {each: each.read_bytes() for each in folder.iterdir()}
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert f"--out {folder}: holds something else" in err
    assert {each: each.read_bytes() for each in folder.iterdir()} == written
    elsewhere = run.parent / "elsewhere"
    assert call(capsys, *arguments, "--out", elsewhere)[0] == 0
    rows = json.loads((elsewhere / "result.json").read_text())
    experiment, facts = load_run_on(run, target)
    expected = [
        row.row(experiment.benchmark) for row in transfer_rows(experiment, facts["seconds"])
    ]
    assert rows == json.loads(json.dumps(expected))


@pytest.mark.usefixtures("quiet_cli")
def test_any_data_set_is_a_target(run, tmp_path, capsys):
    """Of a training data set the test part counts, all classes together."""
    rows = [["path", "label", "split"]]
    for seed, label in enumerate("ab" * 4):
        draw(tmp_path / f"{seed}.png", seed)
        rows.append([f"{seed}.png", label, "test" if seed < 4 else "train"])
    table = tmp_path / "table.csv"
    table.write_text("\n".join(map(",".join, rows)))
    code, out, err = call(capsys, run, "--data", "table", "--table", table)
    assert code == 0, err
    assert 'data    table: 2 classes, "a photo of a {}.", tested only' in out
    assert "data    4 test pictures" in out
    assert "LAMP on table" in out


@pytest.mark.usefixtures("quiet_cli")
def test_a_list_is_scored_as_a_table_of_the_same_pictures(run, tmp_path, capsys):
    names, scored = ["ant", "bee", "cat"], {}
    rows, lines = ["path,label,split"], []
    for seed in sorted(range(9), key=lambda seed: seed % 3):  # as the table's pictures are hashed
        path = f"{names[seed % 3]}/{seed}.png"
        draw(tmp_path / path, seed)
        rows.append(f"{path},{names[seed % 3]},test")
        lines.append(f"{path} {seed % 3}")
    for name, content in (("table.csv", rows), ("test.txt", lines), ("names.txt", names)):
        (tmp_path / name).write_text("\n".join(content) + "\n")
    for kind, flags in (
        ("table", ["--table", tmp_path / "table.csv"]),
        ("list", ["--test", tmp_path / "test.txt"]),
        ("named", ["--test", tmp_path / "test.txt", "--names", tmp_path / "names.txt"]),
    ):
        out = run.parent / f"scores-{kind}"
        data = "list" if kind == "named" else kind
        code, text, err = call(capsys, run, "--data", data, *flags, "--out", out)
        assert code == 0, err
        assert f"data    {data}: 3 classes" in text
        scored[kind] = (
            (out / "confusion_base.csv").read_text(),
            json.loads((out / "target.json").read_text())["sha256"],
        )
    assert scored["list"] == scored["named"] == scored["table"]
    code, _, err = call(capsys, run, "--data", "list", "--train", tmp_path / "test.txt")
    assert (code, err) == (2, "error: --test: missing; --data list needs a text file of pictures\n")


@pytest.mark.usefixtures("quiet_cli")
def test_unreadable_pictures_of_the_target(run, target, capsys):
    damaged = next((target.root / "imagenet-rendition").rglob("*.png"))
    damaged.write_bytes(b"")
    arguments = (run, "--data", "imagenet_r", "--root", target.root)
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert str(damaged) in err
    code, out, _ = call(capsys, *arguments, "--skip-unreadable", "--out", target.root / "scores")
    assert code == 0
    assert "data    11 test pictures" in out
    assert "data    skipped 1 unreadable" in out


@pytest.mark.usefixtures("quiet_cli")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--root", "x"], f"--root {Path('x').absolute()}: does not exist"),
        (["--out", "x"], "--out x: expected --data with it"),
        (["--template", "{}"], "--template {}: expected --data with it"),
        (["--level", "genus"], "--level genus: expected --data with it"),
        (
            ["--data", "digits", "--test", "x"],
            "--test x: expected --data list or webdataset with it",
        ),
        (["--data", "imagenet_z", "--root", "x"], "--data imagenet_z: expected one of"),
        (["--label-column", "kind"], "--label-column kind: expected --data with it"),
        (["--data", "imagenet_a"], "--root: missing; --data imagenet_a needs"),
        (["--data", "imagenet_a", "--root", "x"], "--root "),
        (["--data", "digits", "--template", "no name"], "--template 'no name': expected {} once"),
    ],
)
def test_refusals(run, capsys, arguments, expected):
    code, out, err = call(capsys, run, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {expected}")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("quiet_cli")
def test_a_run_that_has_not_finished(run, tmp_path, target, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "learned.safetensors").rename(copy / "checkpoint.safetensors")
    code, _, err = call(capsys, copy, "--data", "imagenet_r", "--root", target.root)
    assert code == 2
    assert "training has not finished" in err
    record = json.loads((run / "config.json").read_text())
    record["clip"]["fingerprint"] = "0" * 64
    shutil.copy(run / "learned.safetensors", copy)
    (copy / "config.json").write_text(json.dumps(record))
    code, _, err = call(capsys, copy, "--data", "imagenet_r", "--root", target.root)
    assert code == 2
    assert "the CLIP weights are not those of the run" in err
