"""Every method through training, resume, evaluation, prediction and saving, as LAMP goes."""

import importlib
import json
import re
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lamp_fast import evaluate, methods, train
from lamp_fast.classifier import Classifier
from lamp_fast.clip.settings import Trimming
from lamp_fast.data.settings import DataConfig
from lamp_fast.errors import InputError
from lamp_fast.fields import flag_of, validate
from lamp_fast.methods import METHODS
from lamp_fast.methods.base import Method
from lamp_fast.methods.settings.mma import MmaSettings
from lamp_fast.report.page import build_page
from lamp_fast.runs import config as settings
from lamp_fast.runs import figures
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.experiment import assemble, load_run
from lamp_fast.runs.folder import ANSWERS, LEARNED
from lamp_fast.runs.optimisation import build_optimiser, learning_rate
from lamp_fast.runs.saved import load
from lamp_fast.runs.scoring import evaluate_rows
from lamp_fast.runs.settings import OptimConfig
from lamp_fast.runs.trainer import Trainer
from lamp_fast.tensors import load_tensors

ROOT = Path(__file__).parents[2]
CLASSES = ("bread", "cheese", "ham", "salad")  # two base, two new
COMPARED = sorted(set(METHODS) - {"lamp", "zeroshot"})
# The others learn all that they learn before a first epoch, of which they have none.
STEPPED = {name for name, entry in METHODS.items() if entry.load().step is not Method.step}
# Tip-Adapter learns nothing: it keeps the training pictures' keys.
LEARNING = sorted(set(COMPARED) - {"tip"})
# What is kept beside what is learned.
BESIDE = ("ema", "visual", "counts", "c", "best_step", "labels", "strength", "average", "epoch")
SHORT = ("--epochs", "2", "--batch", "3", "--warmup-epochs", "0", "--threads", "1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of noise; of the first class more than of the second."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for part, counts in (("train", (5, 2, 2, 2)), ("test", (2, 2, 2, 2))):
        for name, count in zip(CLASSES, counts, strict=True):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(0, 256, (40, 32, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{number}.png")
    return root


def parse(method, pictures, out, *flags):
    arguments = ["--method", method, "--data", "folder", "--root", str(pictures)]
    arguments += ["--clip", "tiny", "--split", "base-new", "--out", str(out), *SHORT, *flags]
    return train.read_flags(arguments)


@pytest.fixture(scope="module", autouse=True)
def _no_drawings():
    """Other tests look at the drawings, which cost more than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_curves", "plot_per_class"):
            patch.setattr(figures, name, lambda *_: None)
        yield


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """The folder of a finished run, once a method."""
    folders = {}

    def of(method):
        if method not in folders:
            folder = tmp_path_factory.mktemp("runs") / method
            assert train.main(parse(method, pictures, folder)) == 0
            folders[method] = folder
        return folders[method]

    return of


def learned(folder):
    return load_tensors(folder / LEARNED)[0]


@pytest.mark.parametrize("method", LEARNING)
def test_a_run_changes_its_weights_and_saves_no_others(method, finished):
    folder = finished(method)
    saved = learned(folder)
    assert not any("model." in name or "visual." in name.split("visual.")[0] for name in saved)
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in history] == ([1, 2] if method in STEPPED else [])
    rows = json.loads((folder / "result.json").read_text())
    assert [row["name"] for row in rows] == ["CLIP zero-shot", METHODS[method].title]
    beside = {*BESIDE, *(("alpha", "beta") if method == "tip-f" else ())}
    parameters = sum(each.numel() for name, each in saved.items() if name not in beside)
    assert rows[1]["parameters"] == parameters
    fresh = Classifier.load(folder).method
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        run = load(folder)
        start = build_method(fresh.clip, run.record.settings, run.classes)
    begun = start.named_parameters() if method in STEPPED else start.named_buffers()
    moved = [
        name
        for name, each in begun
        if each.shape == saved[name].shape and not torch.equal(each, saved[name])
    ]
    assert moved


@pytest.mark.parametrize("method", sorted(set(COMPARED) - STEPPED))
def test_what_fits_before_the_first_epoch_has_none(method, finished):
    folder = finished(method)
    assert (folder / "metrics.jsonl").read_text() == ""
    _, facts = load_tensors(folder / LEARNED)
    assert facts["epochs"] == 0
    assert facts["seconds"] > 0
    rows = json.loads((folder / "result.json").read_text())
    assert [row["name"] for row in rows] == ["CLIP zero-shot", METHODS[method].title]


@pytest.mark.parametrize("method", COMPARED)
def test_a_stopped_run_goes_on_to_the_same_bits(method, finished, pictures, tmp_path, monkeypatch):
    config = parse(method, pictures, tmp_path / "run")
    epoch = Trainer._epoch

    def stop(trainer, number):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(trainer, number)

    def stop_at_the_end(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", stop)
        if method not in STEPPED:
            patch.setattr(METHODS[method].load(), "settle", stop_at_the_end)
        done = int(method in STEPPED)
        with pytest.raises(KeyboardInterrupt, match=f"stopped after epoch {done}"):
            train.main(config)
    resumed = parse(method, pictures, tmp_path / "run", "--resume")
    assert train.main(resumed) == 0
    expected, got = learned(finished(method)), learned(config.out)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.parametrize("method", COMPARED)
def test_evaluation_and_prediction_come_from_the_saved_files(method, finished, pictures):
    folder = finished(method)
    experiment, facts = load_run(folder)
    rows = evaluate_rows(experiment, facts["seconds"], False)
    table = [row.row(experiment.benchmark) for row in rows]
    trained = json.loads((folder / "result.json").read_text())
    # Which epoch was chosen is told where it was; evaluation has no part in it.
    assert all(row.pop("selection")["of"] == 2 for row in trained[1:] if "selection" in row)
    assert json.loads(json.dumps(table)) == trained

    classifier = Classifier.load(folder)
    files = sorted((pictures / "test").rglob("*.png"))
    wanted = (*CLASSES, "zebra")
    if METHODS[method].no_new_names is not None:
        with pytest.raises(InputError, match=re.escape(METHODS[method].no_new_names)):
            classifier.classify(files, wanted)
        assert rows[1].new is None
        wanted = CLASSES[1::-1]
    answers = classifier.classify(files, wanted, top=5)
    alone = classifier.classify(files[:1], wanted, top=5)[0]
    assert alone.names == answers[0].names
    assert alone.probabilities == pytest.approx(answers[0].probabilities, abs=1e-5)
    assert {answer.bias for answer in answers} == {"none"}
    assert [sorted(answer.names) for answer in answers] == [sorted(wanted)] * len(files)


@pytest.mark.parametrize("method", sorted(STEPPED & set(COMPARED)))
def test_saved_settings_say_what_ran(method, finished):
    config = settings.load_config(finished(method) / "config.json")
    preset = METHODS[method].presets.get(method)
    name = None if preset is None else method
    assert (config.method, config.preset, config.optim.epochs) == (method, name, 2)
    published = {} if preset is None else preset.optim
    assert config.optim.optimiser == published.get("optimiser", "adamw")
    # Cut to the six layers of the carried CLIP.
    if method in ("maple", "promptsrc"):
        assert config.own.depth == 6
    if method in ("mmrl", "mmrl++"):
        assert config.own.rep_layers == (3, 4, 5, 6)
    if method == "mma":
        assert config.own.adapter_layers == (5, 6)
    if method == "tcp":
        assert config.own.knowledge_layer == 5


def test_names_that_were_not_trained_are_refused_before_another_data_set_is_scored(
    finished, pictures, tmp_path
):
    """Of the trained ones alone another data set may be."""
    config = evaluate.EvaluateConfig(
        run=finished("linear-probe"), data="folder", root=pictures, out=tmp_path / "out"
    )
    with pytest.raises(InputError, match="classes: 'ham' was not trained: a linear probe has"):
        evaluate.main(config)
    assert not (tmp_path / "out").exists()
    for part in ("train", "test"):
        for name in CLASSES[:2]:
            shutil.copytree(pictures / part / name, tmp_path / "two" / part / name)
    assert evaluate.main(replace(config, root=tmp_path / "two")) == 0
    own = json.loads((finished("linear-probe") / "result.json").read_text())
    there = json.loads((tmp_path / "out" / "result.json").read_text())
    assert there[1]["acc_base"] == own[1]["acc_base"]


def test_the_page_of_a_run_without_scores_of_new_names(finished):
    """Every class has so few pictures that examples of all are shown, where there are answers."""
    page = build_page(finished("linear-probe"))
    assert "Linear probe" in page
    lines = (finished("linear-probe") / "per_class.csv").read_text().splitlines()
    assert [line.split(",")[-1] for line in lines if line.startswith("new")] == ["nan", "nan"]


def test_another_methods_state_is_refused(finished, tmp_path):
    shutil.copytree(finished("coop"), tmp_path / "run")
    shutil.copy(finished("mma") / LEARNED, tmp_path / "run" / LEARNED)
    (tmp_path / "run" / ANSWERS).unlink()  # which says whose weights it was fitted for
    with pytest.raises(InputError, match=r"learned\.safetensors: not the state of this model"):
        load_run(tmp_path / "run")


def test_logit_adjustment_reaches_every_method_that_takes_it(pictures, tmp_path):
    """Another loss from the first step on."""
    for method in ("coop", "tcp", "zs-lp", "clap", "prolip", "promptsrc", "mmrl", "mmrl++"):
        losses = []
        for flags in ((), ("--logit-adjustment",)):
            config = parse(method, pictures, tmp_path / f"{method}{len(flags)}", *flags)
            trainer = Trainer(assemble(config), config.out)
            losses.append(trainer._epoch(0)["step_loss"][0])
        assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--method coop", {"epochs": 200, "lr": 2e-3, "batch": 32, "optimiser": "sgd"}),
        ("--method coop --split all --shots 1", {"epochs": 50}),
        ("--method coop --split all --shots 4", {"epochs": 100}),
        ("--method coop --split all --shots 16", {"epochs": 200}),
        ("--method coop --data imagenet", {"epochs": 50}),
        ("--method tcp --data ImageNet", {"epochs": 25}),
        ("--method lfa --data OxfordPets", {"epochs": 10}),
        ("--method cocoop", {"epochs": 10, "batch": 1}),
        ("--method maple", {"epochs": 5, "lr": 3.5e-3, "batch": 4}),
        ("--method maple --split all", {"epochs": 5, "lr": 3.5e-3}),
        ("--method maple --split all --data imagenet", {"epochs": 2, "lr": 2.6e-3}),
        ("--method maple --split all --data imagenet --shots 16", {"epochs": 2, "lr": 2.6e-3}),
        ("--method maple --data imagenet", {"epochs": 5, "lr": 3.5e-3}),
        ("--method tcp", {"optimiser": "adam", "lr": 2e-3, "eps": 1e-3, "epochs": 50}),
        ("--method mma", {"warmup_epochs": 0, "lr": 1.5e-3, "batch": 16}),
        ("--method lfa --data caltech101", {"epochs": 40, "lr_end": 1e-7, "warmup_epochs": 0}),
        ("--method lfa --data folder", {"epochs": 200}),
        ("--method candle", {"lr": 3e-4, "batch": 128, "epochs": 50}),
        ("--method lift", {"lr": 0.01, "batch": 128, "epochs": 10, "logit_adjustment": True}),
        ("--method lift+", {"lr": 0.02, "batch": 128, "epochs": 5, "warmup_epochs": 0}),
        ("--method tip-f", {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.01, "lr_per": "step"}),
        ("--method tip-f --data caltech101", {"epochs": 20, "batch": 256, "warmup_epochs": 0}),
        ("--method tip-f --data EuroSAT", {"epochs": 100, "batch": 256}),
        ("--method clip-adapter", {"optimiser": "sgd", "lr": 1e-2, "epochs": 300, "batch": 32}),
        ("--method zs-lp", {"optimiser": "sgd", "lr": 0.1, "batch": 256, "weight_decay": 0.0}),
        ("--method clap --split all --data imagenet", {"epochs": 300, "warmup_epochs": 1}),
        ("--method prolip", {"optimiser": "adam", "lr": 1e-5, "epochs": 300, "warmup_epochs": 0}),
        ("--method zeroshot", {"lr": 3e-3}),
    ],
)
def test_published_defaults(flags, expected):
    config = settings.default_config(settings.choosing_flags(flags.split()))
    got = {name: getattr(config.optim, name) for name in expected}
    assert got == expected
    validate(config)


FOUR, SIXTEEN = {"n_ctx": 4, "ctx_init": "a photo of a"}, {"n_ctx": 16, "ctx_init": None}


@pytest.mark.parametrize(
    ("flags", "epochs", "expected"),
    [
        ("--method coop", 200, FOUR),
        ("--method coop --shots 16", 200, FOUR),
        ("--method coop --split all", 200, SIXTEEN),
        ("--method coop --split all --shots 1", 50, SIXTEEN),
        ("--method coop --split all --data ImageNet", 50, FOUR),
        ("--method coop --split all --data imagenet --shots 16", 50, SIXTEEN),
        ("--method cocoop --split all --data imagenet", 10, FOUR),
        ("--method maple", 5, {"n_ctx": 2, "depth": 9}),
        ("--method maple --split all", 5, {"n_ctx": 2, "depth": 9}),
        ("--method maple --split all --data imagenet", 2, {"n_ctx": 2, "depth": 3}),
        ("--method lfa --data imagenet", 100, {"procrustes_beta": 0.9}),
        ("--method lfa --split all --data imagenet", 200, {"procrustes_beta": None}),
    ],
)
def test_published_defaults_of_the_methods_own(flags, epochs, expected):
    """Of a source of transfer other than of few-shot learning on every class."""
    config = settings.default_config(settings.choosing_flags(flags.split()))
    assert {name: getattr(config.own, name) for name in expected} == expected
    assert config.optim.epochs == epochs


def test_flags_override_a_methods_defaults_and_a_config_of_another_method_does_not_leak(tmp_path):
    arguments = ["--method", "tcp", "--lr", "0.5"]
    config = train.read_flags(arguments)
    assert (config.optim.lr, config.optim.optimiser, config.optim.eps) == (0.5, "adam", 1e-3)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings.to_saved(replace(config, seed=5))))
    same = settings.default_config({"config": file})
    assert (same.method, same.optim.lr, same.seed) == ("tcp", 0.5, 5)
    other = settings.default_config({"config": file, "method": "mma"})
    assert (other.method, other.optim.lr, other.seed) == ("mma", 1.5e-3, 5)
    assert other.own == MmaSettings()


def test_a_methods_defaults_follow_the_data_of_a_config(tmp_path):
    """Its split and shots decide as the flags would."""
    data = DataConfig(data="folder", shots=2).resolved()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings.to_saved(TrainConfig(data=data))))
    config = settings.default_config({"config": file, "method": "coop"})
    assert (config.preset, config.optim.epochs) == ("coop-all", 100)
    again = settings.default_config({"config": file, "method": "coop", "shots": 1})
    assert again.optim.epochs == 50


def test_sgd_and_the_cosines_end():
    optim = OptimConfig(optimiser="sgd", lr=1.0, lr_end=0.2, epochs=4, warmup_epochs=0)
    weight = torch.nn.Parameter(torch.ones(1))
    optim_only = replace(optim, weight_decay=0.0)
    optimiser = build_optimiser(optim_only, [weight], weight.device)
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimiser.step()
    assert weight.item() == pytest.approx(1 - 1 - 1.9)  # momentum 0.9
    assert [learning_rate(optim, epoch) for epoch in (0, 2)] == pytest.approx([1.0, 0.6])


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_flags_of_the_method_and_of_no_other(method, capsys):
    """And of the trimming the three that are flags; what it would start with is what it shows."""
    with pytest.raises(SystemExit) as stop:
        train.read_flags(["--method", method, "--help"])
    assert stop.value.code == 0
    shown = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    own = {flag_of(each.name) for each in fields(METHODS[method].Settings)}
    others = {flag_of(each.name) for kind in METHODS.values() for each in fields(kind.Settings)}
    assert own <= shown
    assert not (others - own) & shown
    trimming = {flag_of(each.name) for each in fields(Trimming)}
    assert trimming & shown == {"--block", "--share-routes", "--as-published"}
    assert {"--no-share-routes", "--optimiser", "--data", "--device", "--clip"} <= shown


def test_contributings_worked_example_runs(pictures, tmp_path, monkeypatch):
    """As written there: two files and one line, then trained with its flag, loaded and asked."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    sources = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    name, constant = re.search(r'^    "(\w+)": (\w+),$', text, re.M).groups()
    for package, source in zip((methods.settings, methods), sources, strict=True):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / f"{name}.py").write_text(source)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
    settings = importlib.import_module(f"lamp_fast.methods.settings.{name}")
    entry = getattr(settings, constant)
    monkeypatch.setitem(METHODS, name, entry)
    (flag,) = (flag_of(each.name) for each in fields(entry.Settings))
    out = tmp_path / "run"
    words = ["--method", name, "--shots", "2", "--epochs", "2", "--out", str(out), flag, "3"]
    assert f"--method {name} {flag} " in text
    assert train.main(train.read_flags(words)) == 0
    saved = json.loads((out / "config.json").read_text())["settings"]
    assert list(saved[name].values()) == [3.0]
    with pytest.raises(InputError, match=f"{flag} 0.0: expected more than 0"):
        train.main(train.read_flags(["--method", name, flag, "0"]))
    with pytest.raises(InputError, match=f"{flag}: --method lamp has no such flag"):
        train.read_flags([flag, "3"])
    classifier = Classifier.load(out)
    assert classifier.method.entry is entry
    assert classifier.method.scale == 3
    assert sum(each.abs().sum() for each in classifier.method.parameters()) > 0
    rows = json.loads((out / "result.json").read_text())
    assert [row["name"] for row in rows] == ["CLIP zero-shot", entry.title]
    answers = classifier.classify(sorted((pictures / "test").rglob("*.png")), CLASSES)
    assert all(sum(answer.probabilities) == pytest.approx(1, abs=1e-5) for answer in answers)
