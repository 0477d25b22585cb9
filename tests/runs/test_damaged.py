"""Run folders that are damaged, or not a run's at all: everything that reads one says so in a line.

Seeded changes to copies of runs that version 0.1.0 wrote, which kept no digest, so that most of
them reach the schema; whatever is still read must work to the end.
"""

import copy
import json
import random
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as to_safetensors

from lamp_fast import classifier as classifiers
from lamp_fast.classifier import Classifier
from lamp_fast.errors import InputError
from lamp_fast.export.exporting import build_module
from lamp_fast.report import page
from lamp_fast.runs import experiment, hub
from lamp_fast.runs.folder import CHECKPOINT, CONFIG, LEARNED, METRICS, RESULT
from lamp_fast.runs.saved import load
from lamp_fast.runs.scoring import evaluate_rows, write_results
from lamp_fast.runs.trainer import NonFiniteLossError, Trainer
from lamp_fast.tensors import load_tensors, save_tensors

BEFORE = Path(__file__).parents[1] / "before"
RUNS = sorted(folder.name for folder in BEFORE.iterdir())
TESTED = ("test_base", "test_new")
PICTURE = np.full((8, 8, 3), 7, dtype=np.uint8)

# Other kinds and sizes than any setting or fact has. Of --threads and --workers a large number is
# a machine's worth of threads and processes, so numbers here stay small or are refused at sight.
STRANGE = (
    *(None, True, -1, 0, 3, 2**70, 1.5, -0.0, 1e300, float("nan"), float("inf")),
    *("", "x", "\ud800", "none", "{}{}", "../../x", [], {}, [None], [[[]]], {"a": 1}),
)


@pytest.fixture(scope="module")
def shared_clip():
    """Every run here is over the carried CLIP, which is loaded once."""
    built = {}
    build = experiment.build_clip

    def build_once(config, recorded=None):
        key = (config.clip, config.machine.device, config.machine.precision, config.trim)
        if key not in built:
            built[key] = build(config)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "build_clip", build_once)
        patch.setattr(classifiers, "build_clip", build_once)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shared_clip):
    """A run with all that a report reads."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(BEFORE / "lamp", folder)
    again, facts = experiment.load_run(folder)
    halves = {name: getattr(again.benchmark, name).select(range(40)) for name in TESTED}
    again = replace(again, benchmark=replace(again.benchmark, **halves))
    write_results(folder, again, evaluate_rows(again, facts["seconds"], adapted=True))
    return folder


def places(value, path=()):
    """Every place in JSON values, as keys from the root."""
    yield path
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in list(items)[:40]:
            yield from places(item, (*path, key))


def change_json(value, draw):
    """The values with one place removed, added to, or of another kind."""
    value = copy.deepcopy(value)
    path = draw.choice(list(places(value)))
    if not path:
        return draw.choice(STRANGE)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    kind = draw.randrange(4)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent["strange"] = draw.choice(STRANGE)
    else:
        parent[path[-1]] = draw.choice(STRANGE)
    return value


def change_text(content, draw):
    """Bytes emptied, cut, repeated, flipped, or nested without end."""
    kind = draw.randrange(6)
    if kind == 0:
        return b""
    if kind == 1:
        return content[: draw.randrange(len(content) + 1)]
    if kind == 2:
        return b"[" * 100_000
    if kind == 3:
        return b'{"a":' * 900 + b"1" + b"}" * 900
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 8))):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def change_tensors(file, draw):
    """One tensor of another kind, size or name, or facts of another kind, without a digest."""
    tensors, facts = load_tensors(file)
    kind = draw.randrange(5)
    if kind == 0 or not tensors:
        facts = change_json(facts, draw)
    else:
        name = draw.choice(sorted(tensors))
        each = tensors.pop(name)
        if kind == 1:
            tensors[name + draw.choice(("", ".", "x"))] = each.to(
                draw.choice((torch.int8, torch.float16, torch.float64, torch.bool))
            )
        elif kind == 2:
            tensors[name] = draw.choice((each[None], each.new_zeros(0), each.flatten()))
        elif kind == 3 and each.is_floating_point():
            tensors[name] = torch.full_like(each, draw.choice((float("nan"), float("-inf"))))
    # With what JSON has no words for, too.
    text = json.dumps(facts)
    file.write_bytes(to_safetensors(tensors, metadata={"facts": text}))


def change_table(text, draw):
    """A CSV file with one cell, line or column changed."""
    lines = [line.split(",") for line in text.splitlines()]
    line = draw.randrange(len(lines))
    kind = draw.randrange(5)
    if kind == 0:
        lines = lines[:line]
    elif kind == 1:
        del lines[line][draw.randrange(len(lines[line]))]
    elif kind == 2:
        lines = [cells[:-1] for cells in lines]
    else:
        cell = draw.choice(("", "x", "-1", "1e400", "nan", "9" * 30, "0.5", '"', "$\\frac$"))
        lines[line][draw.randrange(len(lines[line]))] = cell
    return "\n".join(",".join(cells) for cells in lines)


def damage(folder, draw, names):
    """Change one file of the folder."""
    file = folder / draw.choice(names)
    if draw.random() < 0.25:
        file.write_bytes(change_text(file.read_bytes(), draw))
    elif file.suffix == ".safetensors":
        change_tensors(file, draw)
    elif file.suffix == ".csv":
        file.write_text(change_table(file.read_text(), draw))
    elif file.suffix == ".jsonl":
        lines = file.read_text().splitlines()
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(change_json(json.loads(lines[at]), draw))
        file.write_text("\n".join(lines))
    else:
        file.write_text(json.dumps(change_json(json.loads(file.read_text()), draw)))


def works_or_is_refused(function, *arguments):
    """Whether it worked; any other error than a user's is the test's failure."""
    try:
        function(*arguments)
    except InputError:
        return False
    return True


def use(folder, export):
    """What predict, the hub and export do with a folder."""
    loaded = Classifier.load(folder, device="cpu")
    (answer,) = loaded.classify([PICTURE], top=len(loaded.trained_names))
    assert sum(answer.probabilities) == pytest.approx(1, abs=1e-5)
    hub.model_card(hub.portable(loaded.record), loaded.results)
    if export:
        build_module(loaded, loaded.trained_names)


@pytest.mark.usefixtures("shared_clip")
@pytest.mark.parametrize("name", RUNS)
def test_whoever_loads_a_damaged_run_works_or_refuses(name, tmp_path):
    outcomes = []
    for seed in range(30):
        draw = random.Random(f"{name} {seed}")
        folder = tmp_path / str(seed)
        shutil.copytree(BEFORE / name, folder)
        damage(folder, draw, (CONFIG, CONFIG, RESULT, LEARNED))
        dear = seed % 6 == 0
        outcomes.append(works_or_is_refused(use, folder, dear))
        if dear and works_or_is_refused(load, folder):  # else evaluate says the same
            works_or_is_refused(experiment.load_run, folder)
    assert not all(outcomes)


@pytest.mark.slow
def test_a_report_on_a_damaged_run_works_or_refuses(whole, tmp_path, monkeypatch):
    """Without the pictures, whose reader is the one that evaluate has."""

    def no_pictures(_):
        raise InputError("none here")

    monkeypatch.setattr(page, "load_run", no_pictures)
    names = ("per_class.csv", "confusion_base.csv", "confusion_new.csv", METRICS, RESULT, CONFIG)
    outcomes = []
    for seed in range(30):
        folder = tmp_path / str(seed)
        shutil.copytree(whole, folder)
        damage(folder, random.Random(seed), names)
        outcomes.append(works_or_is_refused(page.build_page, folder))
    assert any(outcomes)
    assert not all(outcomes)


@pytest.fixture
def run(tmp_path, shared_clip):
    """A run to write into."""
    return Path(shutil.copytree(BEFORE / "lamp", tmp_path / "run"))


def test_a_flipped_bit_is_found(run):
    """Anywhere in a file with a digest: only in the digest's own name does it go unseen."""
    file = run / LEARNED
    before, facts = load_tensors(file)
    save_tensors(file, before, facts)
    content = file.read_bytes()
    draw = random.Random(0)
    places = [*range(0, len(content), len(content) // 60), *draw.choices(range(len(content)), k=60)]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        try:
            after, told = load_tensors(file)
        except InputError:
            continue
        assert told == facts
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], each) for name, each in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda each: torch.full_like(each, float("nan")), "values that are not finite"),
        (lambda each: each.to(torch.int8), r"is torch\.int8, expected torch\.float32"),
        (lambda each: each[:1], r"is \[1, 8\], expected \[2, 8\]"),
        (lambda each: None, "prompts.5.shared is missing"),
    ],
)
def test_weights_of_another_kind_are_refused(run, change, message):
    tensors, facts = load_tensors(run / LEARNED)
    changed = change(tensors.pop("prompts.5.shared"))
    if changed is not None:
        tensors["prompts.5.shared"] = changed
    save_tensors(run / LEARNED, tensors, facts)
    for read in (Classifier.load, experiment.load_run):
        with pytest.raises(InputError, match=message):
            read(run)


@pytest.mark.parametrize("name", ["m", "d"])
def test_sizes_that_no_tensor_has_take_no_memory(run, name):
    """A hundred million prompts, or as wide ones, would be gigabytes."""
    record = json.loads((run / CONFIG).read_text())
    record["settings"]["lamp"][name] = 100_000_000
    (run / CONFIG).write_text(json.dumps(record))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError):
        Classifier.load(run)
    # In KiB; the smallest of these tensors alone has 400 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimiser.0.exp_avg": torch.zeros(3)}, r"optimiser\.0\.exp_avg is .* expected floats"),
        ({"optimiser.99.step": torch.zeros(())}, r"optimiser\.99\.step is of no such optimiser"),
        ({"generator": torch.zeros(7, dtype=torch.uint8)}, "no state of the random generator"),
        ({"epoch": 3}, "epoch 3, but 2 of them in its log"),
        ({"scaler": {"scale": "x"}}, "scaler.scale 'x': expected a number"),
        ({"history": "none"}, "history: expected a list of epochs"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(run, change, message):
    (run / "after_2.safetensors").rename(run / CHECKPOINT)
    tensors, facts = load_tensors(run / CHECKPOINT)
    for name, value in change.items():
        (tensors if isinstance(value, torch.Tensor) else facts)[name] = value
    save_tensors(run / CHECKPOINT, tensors, facts)
    trainer = Trainer(experiment.assemble(load(run).record.settings), run)
    before = {name: each.clone() for name, each in trainer.method.state_dict().items()}
    with pytest.raises(InputError, match=message):
        trainer.restore()
    assert all(torch.equal(before[n], each) for n, each in trainer.method.state_dict().items())


def test_weights_that_the_last_step_broke_replace_no_checkpoint(run, monkeypatch):
    """Its loss was computed before; the checkpoint of the epoch before is what is left."""
    trainer = Trainer(experiment.assemble(load(run).record.settings), run)
    epoch = trainer._epoch

    def broken(number):
        line = epoch(number)
        if number == 1:
            trainer.parameters[0].data.view(-1)[3] = float("inf")
        return line

    monkeypatch.setattr(trainer, "_epoch", broken)
    with pytest.raises(NonFiniteLossError, match=r"not finite after epoch 2; .* of epoch 1, is in"):
        trainer.run()
    assert load_tensors(run / CHECKPOINT)[1]["epoch"] == 1
