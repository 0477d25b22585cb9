"""The Python object: trained, loaded without its data, and classifying any picture and class."""

import json
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import lamp_fast
from lamp_fast import train
from lamp_fast.classifier import Classifier
from lamp_fast.clip import settings as clip_settings
from lamp_fast.data.loading import evaluation_batches
from lamp_fast.data.sources import load_source
from lamp_fast.errors import InputError
from lamp_fast.runs.experiment import load_run
from lamp_fast.runs.folder import CONFIG, LEARNED, RESULT
from lamp_fast.runs.trainer import NonFiniteLossError
from lamp_fast.runs.training import training_settings

ROOT = Path(__file__).parents[2]
DIGITS = load_source("digits", None).classnames


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch on the digits, adapted to the new half."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    Classifier.train(epochs=1, warmup_epochs=0, shots=8, out=folder)
    return folder


@pytest.fixture(scope="module")
def classifier(run):
    return Classifier.load(run, device="cpu")


@pytest.fixture(scope="module")
def scans():
    return load_source("digits", None).test


def class_folders(folder, pictures, wanted=(3, 7), each=8):
    """Class folders of the first scans of some digits."""
    for digit in wanted:
        place = folder / DIGITS[digit]
        place.mkdir(parents=True)
        for index in np.flatnonzero(pictures.labels == digit)[:each]:
            Image.fromarray(pictures.arrays[index]).save(place / f"{index}.png")


def same(one, other):
    """Two answers are alike to what the place in a batch changes in float32 logits up to 100."""
    probabilities = [
        dict(zip(each.names, each.probabilities, strict=True)) for each in (one, other)
    ]
    return probabilities[0] == pytest.approx(probabilities[1], abs=1e-4)


def test_classify_scores_what_the_run_reported(run, classifier):
    """Accuracy of its first answers against result.json: base by b_base, new by b_new."""
    experiment, _ = load_run(run)
    _, lamp, adapted = json.loads((run / RESULT).read_text())
    for pictures, names, expected in (
        (experiment.benchmark.test_base, classifier.trained_names, lamp["acc_base"]),
        (experiment.benchmark.test_new, classifier.new_names, adapted["acc_new"]),
    ):
        answers = classifier.classify(pictures.arrays, names, top=1)
        right = [
            answer.names == (names[label],)
            for answer, label in zip(answers, pictures.labels, strict=True)
        ]
        assert np.mean(right) == pytest.approx(expected, abs=1e-12)


def test_probabilities_are_the_softmax_of_the_logits(run, classifier, scans):
    experiment, _ = load_run(run)
    names = [*classifier.new_names, *classifier.trained_names]
    few = scans.select(range(11))
    prepared = experiment.method.prepare(names, classifier.template)
    (images, _, _) = next(iter(evaluation_batches(few, experiment.test_transform, 11)))
    expected = experiment.method.logits(images, prepared).double().softmax(1)
    for batch in (1, 4, 100):
        answers = classifier.classify(few.arrays, names, top=99, batch=batch)
        for answer, row in zip(answers, expected, strict=True):
            assert sorted(answer.names) == sorted(names)
            assert list(answer.probabilities) == sorted(answer.probabilities, reverse=True)
            assert answer.bias == "trained"
            for name, probability, trained in zip(
                answer.names, answer.probabilities, answer.trained, strict=True
            ):
                # Logits reach 100, of which float32 keeps 1e-5; other batch sizes round otherwise.
                assert probability == pytest.approx(row[names.index(name)].item(), abs=1e-4)
                assert trained == (name in classifier.trained_names)


def test_only_exactly_the_new_classes_get_the_adapted_bias(run, scans):
    """With an adapted bias that reverses every choice, those answers alone change."""
    ours = Classifier.load(run, device="cpu")
    base, new = ours.trained_names, ours.new_names
    cases = {
        base: "trained",
        new: "adapted",
        new[::-1]: "adapted",
        new[:-1]: "trained",
        (*new, "zebra"): "trained",
        base + new: "trained",
        ("zebra", "yak"): "trained",
    }
    few = scans.arrays[:20]
    before = {names: ours.classify(few, names) for names in cases}
    assert {names: answers[0].bias for names, answers in before.items()} == cases
    # Each prompt another step of a bias that no cosine outweighs: the choice is turned around.
    bias = ours.method.new_image_balance.bias
    bias -= 10 * torch.arange(bias.shape[1])
    for names, answers in before.items():
        assert (ours.classify(few, names) == answers) == (cases[names] == "trained"), names
    ours.facts = {**ours.facts, "adaptation": None}
    assert ours.bias_for(new) == "trained"


@pytest.mark.parametrize("text_query", ["image", pytest.param("class", marks=pytest.mark.slow)])
def test_threads_with_lists_of_their_own(tmp_path, scans, text_query):
    """Every thread stands between its question and its scores until all do; lists have different
    lengths, and one is answered with the adapted bias."""
    shorter = {"epochs": 1, "warmup_epochs": 0, "shots": 1, "adapt_passes": 1}
    ours = Classifier.train(out=tmp_path / "run", text_query=text_query, **shorter)
    bias = ours.method.new_image_balance.bias
    bias -= 10 * torch.arange(bias.shape[1])
    lists = [ours.trained_names, ours.new_names, ("cat", "dog", "bird"), ("six", "seven")]
    few = scans.arrays[:3]
    alone = [ours.classify(few, names) for names in lists]
    logits, together = ours.method.logits, threading.Barrier(len(lists))

    def wait(*arguments):
        together.wait(60)
        return logits(*arguments)

    ours.method.logits = wait
    with ThreadPoolExecutor(len(lists)) as threads:
        for _ in range(5):
            assert list(threads.map(lambda names: ours.classify(few, names), lists)) == alone
            ours.method.forget_text()


def test_loading_needs_no_training_data_and_leaves_the_generator_alone(tmp_path, scans):
    pictures = tmp_path / "pictures"
    class_folders(pictures, scans)
    flags = {"clip": "tiny", "epochs": 2, "batch": 4, "adapt_passes": 1}
    trained = Classifier.train(data="folder", root=pictures, out=tmp_path / "run", **flags)
    few = scans.arrays[:9]
    expected = trained.classify(few)
    shutil.rmtree(pictures)
    state = torch.get_rng_state()
    loaded = Classifier.load(tmp_path / "run", device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.trained_names == ("seven", "three")
    assert loaded.classify(few) == expected
    with pytest.raises(InputError):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("kind", ["RGB", "L", "1", "RGBA", "LA", "P", "CMYK", "I;16", "turned"])
def test_a_picture_in_memory_is_read_as_its_file(kind, classifier, scans, tmp_path):
    """The same probabilities for the path of a file and for what PIL makes of it."""
    generator = np.random.default_rng(0)
    scan = Image.fromarray(scans.arrays[5]).resize((40, 24))
    file = tmp_path / "picture.png"
    options = {}
    if kind in ("RGBA", "LA"):
        scan.putalpha(Image.fromarray(generator.integers(0, 256, (24, 40), dtype=np.uint8)))
        scan = scan.convert(kind)
    elif kind == "P":
        scan = scan.quantize(8)
        options["transparency"] = 3
    elif kind == "I;16":
        scan = Image.fromarray(np.asarray(scan.convert("L")).astype(np.uint16) * 257)
    elif kind == "turned":
        scan.getexif()[0x0112] = 6
        options["exif"] = scan.getexif()
    else:
        scan = scan.convert(kind)
    if kind == "CMYK":
        file = file.with_suffix(".tif")
    scan.save(file, **options)
    with Image.open(file) as opened:
        opened.load()
        before = opened.mode, opened.size, opened.tobytes()
        answers = classifier.classify([file, str(file), opened])
        assert (opened.mode, opened.size, opened.tobytes()) == before
    assert all(same(answers[0], other) for other in answers)
    upright = Image.fromarray(scans.arrays[5]).resize((40, 24))
    unchanged = kind in ("RGB", "L", "CMYK", "I;16")
    assert same(classifier.classify([upright])[0], answers[0]) == unchanged


def test_arrays_and_files_agree(classifier, scans, tmp_path):
    Image.fromarray(scans.arrays[0]).save(tmp_path / "a.png")
    scan = scans.arrays[0]
    opaque = np.dstack([scan, np.full((8, 8, 1), 255, dtype=np.uint8)])
    answers = classifier.classify([tmp_path / "a.png", scan, scan[..., 0], opaque, scan[:, :]])
    assert all(same(answers[0], other) for other in answers)


def test_an_iterator_may_use_its_buffer_again(classifier, scans):
    """As a camera's and a GIF's frames do: what counts is what an item showed when it was given."""
    few = scans.arrays[:7]
    assert len({scan.tobytes() for scan in few}) == 7
    expected = classifier.classify(few, batch=3)

    def camera():
        buffer = np.empty_like(few[0])
        for scan in few:
            buffer[...] = scan
            yield buffer

    def redrawn():
        image = Image.new("RGB", (8, 8))
        for scan in few:
            image.paste(Image.fromarray(scan))
            yield image

    for pictures in (camera(), redrawn()):
        assert classifier.classify(pictures, batch=3) == expected


def test_the_frames_of_a_file(classifier, scans, tmp_path):
    frames = [Image.fromarray(scan) for scan in scans.arrays[:5]]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as gif:
        copies = [frame.convert("RGB") for frame in ImageSequence.Iterator(gif)]
        assert len(copies) == 5
        answers = classifier.classify(ImageSequence.Iterator(gif))
    assert answers == classifier.classify(copies)


def test_one_image_many_times(classifier, tmp_path):
    """PIL decodes a file when it is first needed, which several threads cannot do at once."""
    Image.effect_noise((600, 400), 90).convert("RGB").save(tmp_path / "noise.jpg")
    with Image.open(tmp_path / "noise.jpg") as image:
        answers = classifier.classify([image] * 16)
    (expected,) = classifier.classify([tmp_path / "noise.jpg"])
    assert all(same(answer, expected) for answer in answers)


def test_an_unreadable_picture_stands_in_its_place(classifier, scans, tmp_path):
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(b"\x89PNG nonsense")
    pictures = [scans.arrays[0], broken, scans.arrays[1], missing, scans.arrays[2]]
    expected = classifier.classify([pictures[0], pictures[2], pictures[4]])
    for batch in (1, 2, 5):
        outcomes = list(classifier.classify_each(pictures, batch=batch))
        assert all(same(*pair) for pair in zip(outcomes[::2], expected, strict=True))
        for file, outcome in zip((broken, missing), outcomes[1::2], strict=True):
            assert isinstance(outcome, InputError)
            assert str(file) in str(outcome)
        with pytest.raises(InputError, match=re.escape(str(broken))):
            classifier.classify(pictures, batch=batch)
    assert [type(each) for each in classifier.classify_each([broken])] == [InputError]
    assert classifier.classify([]) == []


def test_pictures_are_read_as_they_are_needed(classifier, scans):
    """A stream without end: asking for one answer reads no more than two batches."""
    asked = []

    def endless():
        while True:
            asked.append(len(asked))
            yield scans.arrays[0]

    answers = classifier.classify_each(endless(), batch=3)
    next(answers)
    assert len(asked) <= 6
    answers.close()


BAD_CALLS = [
    ({"classes": "zebra"}, "classes 'zebra': expected a list"),
    ({"classes": ["zebra"]}, "at least 2"),
    ({"classes": ["zebra", " "]}, "' ' is not a class name"),
    ({"classes": ["zebra", None]}, "None is not a class name"),
    ({"classes": ["zebra", "yak", "zebra"]}, "'zebra' is named 2 times"),
    ({"classes": ["zebra", "yak " * 80]}, "longer than 77 tokens"),
    ({"top": 0}, "top 0: expected at least 1"),
    ({"batch": 0}, "batch 0: expected at least 1"),
    ({"pictures": "a.png"}, "pictures 'a.png': expected a list"),
    ({"pictures": [np.zeros((4, 4, 3))]}, r"pictures\[0\]: float64 array \[4, 4, 3\]"),
    ({"pictures": [np.zeros((0, 4, 3), np.uint8)]}, r"pictures\[0\]: uint8 array \[0, 4, 3\]"),
    ({"pictures": [np.zeros((3, 4, 5), np.uint8)]}, r"uint8 array \[3, 4, 5\], expected"),
    ({"pictures": np.zeros((4, 4, 3), np.uint8)}, r"pictures: array \[4, 4, 3\], expected"),
    ({"pictures": [7]}, r"pictures\[0\]: int, expected a path"),
    ({"pictures": [Image.new("F", (4, 4))]}, r"pictures\[0\]: cannot be read .*floating-point"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=lambda value: str(value)[:40])
def test_bad_calls(call, message, classifier, scans):
    with pytest.raises(InputError, match=message):
        classifier.classify(**({"pictures": scans.arrays[:1]} | call))


def damage_settings(record):
    record["settings"]["optim"]["epochs"] = "many"


def damage_names(record):
    del record["data"]["base_names"]


def damage_fingerprint(record):
    record["clip"]["fingerprint"] = "0" * 64


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_settings, "optim.epochs: 'many'"),
        (damage_names, "data.base_names is missing"),
        (damage_fingerprint, "CLIP weights are not those of the run"),
        (lambda record: record.pop("settings"), "not the config.json of a run"),
        (lambda record: record.update(clip=3), "not the config.json of a run"),
        (lambda record: record["settings"]["lamp"].update(d=16), "not the state of this model"),
    ],
)
def test_a_damaged_run_is_named(damage, message, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    record = json.loads((copy / CONFIG).read_text())
    damage(record)
    (copy / CONFIG).write_text(json.dumps(record))
    with pytest.raises(InputError, match=message) as refusal:
        Classifier.load(copy, device="cpu")
    assert str(copy) in str(refusal.value)


def test_what_is_no_finished_run_is_refused(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / LEARNED).unlink()
    with pytest.raises(InputError, match="training has not finished"):
        Classifier.load(copy)
    with pytest.raises(InputError, match="nowhere"):
        Classifier.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="--device abacus"):
        Classifier.load(run, device="abacus")


@pytest.mark.parametrize(
    ("precision", "then", "expected"),
    [
        ("fp64", "cuda:0", "fp64"),
        ("bf16", "cuda:0", "fp32"),
        ("fp16", "cuda:0", "fp32"),
        ("bf16", "cpu", "bf16"),
        ("fp32", "cuda:1", "fp32"),
    ],
)
def test_a_run_of_another_machine_loads_on_this_one(precision, then, expected, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    record = json.loads((copy / CONFIG).read_text())
    record["settings"]["machine"].update(precision=precision, device=then)
    (copy / CONFIG).write_text(json.dumps(record))
    loaded = Classifier.load(copy, device="cpu")
    assert (loaded.config.machine.precision, loaded.config.machine.device) == (expected, "cpu")
    answer = loaded.classify([np.zeros((8, 8, 3), np.uint8)])[0]
    assert sum(answer.probabilities) == pytest.approx(1, abs=1e-5)


def test_a_run_in_bfloat16_loads_with_whole_weights_where_that_is_asked_for(run, tmp_path):
    """Which is what is exported."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    record = json.loads((copy / CONFIG).read_text())
    record["settings"]["machine"].update(precision="bf16", device="cpu")
    (copy / CONFIG).write_text(json.dumps(record))
    clips = [
        Classifier.load(copy, device="cpu", **asked).method.clip
        for asked in ({}, {"precision": "fp32"}, {"precision": "auto"})
    ]
    rounded, whole, either = (clip.model.visual.conv1.weight for clip in clips)
    assert (rounded.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(whole.bfloat16(), rounded)
    assert not torch.equal(whole, rounded.float())
    assert torch.equal(either, whole)
    with pytest.raises(InputError, match="precision='half': expected auto or one of fp32"):
        Classifier.load(copy, precision="half")


FLAGS = [
    ({}, []),
    ({"epochs": 3, "lr": 1e-4}, ["--epochs", "3", "--lr", "1e-4"]),
    ({"preset": "section4.1", "layers": "3,5..6"}, ["--preset", "section4.1", "--layers", "3,5,6"]),
    (
        {"clip": "ViT-B-16", "pretrained": Path("w.pt"), "layers": range(2, 5), "cap": None},
        ["--clip", "ViT-B-16", "--pretrained", "w.pt", "--layers", "2..4", "--cap", "none"],
    ),
    (
        {"data": "folder", "root": "here", "mpp": False, "text_query": "class", "out": Path("x")},
        ["--data", "folder", "--root", "here", "--no-mpp", "--text-query", "class", "--out", "x"],
    ),
]


@pytest.mark.parametrize(("flags", "argv"), FLAGS, ids=lambda value: " ".join(value)[:40])
def test_keywords_mean_what_the_command_line_means(flags, argv):
    assert training_settings(flags) == train.read_flags(argv)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"epoch": 3}, "epoch: not a setting of training"),
        ({"epochs": "3"}, "optim.epochs: '3'"),
        ({"epochs": 0}, "--epochs 0"),
        ({"layers": "7..3"}, "--layers 7..3"),
        ({"preset": "best"}, "--preset best"),
        ({"data": "folder"}, "--root"),
    ],
)
def test_bad_settings_train_nothing(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        Classifier.train(**flags)
    assert not list(tmp_path.iterdir())


def test_a_diverging_run_raises(tmp_path):
    with pytest.raises(NonFiniteLossError, match="run"):
        Classifier.train(epochs=2, warmup_epochs=0, shots=4, lr=1e30, out=tmp_path / "run")


def test_zero_shot_has_no_bias(classifier, scans):
    """The same interface over a method without parameters."""
    from lamp_fast.methods.zeroshot import ZeroShot

    method = ZeroShot(classifier.method.clip)
    config = replace(classifier.config, method="zeroshot")
    plain = Classifier(method, config, classifier.record, classifier.facts)
    answers = plain.classify(scans.arrays[:60], [*plain.trained_names, *plain.new_names], top=1)
    assert {answer.bias for answer in answers} == {"none"}
    right = [
        answer.names[0] == DIGITS[label]
        for answer, label in zip(answers, scans.labels, strict=False)
    ]
    assert np.mean(right) > 0.5  # ten classes; the carried CLIP is far above chance


def test_the_package_is_light_until_it_is_used():
    code = (
        "import sys, lamp_fast; assert 'torch' not in sys.modules; "
        "assert {'Classifier', 'InputError'} <= set(dir(lamp_fast)); print(lamp_fast.__version__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert lamp_fast.Classifier is Classifier
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        _ = lamp_fast.nothing_of_ours


def documented_example():
    for file in (ROOT / "README.md", ROOT / "docs" / "python.md"):
        if file.is_file():
            blocks = re.findall(r"^```python\n(.*?)^```", file.read_text(), re.M | re.S)
            for block in blocks:
                if "Classifier.train" in block:
                    return block
    raise AssertionError("no example of Classifier.train in README.md or docs/python.md")


def test_the_documented_example_runs(tmp_path, monkeypatch, capsys, scans):
    """Build, train, save, load, classify: on threes and sevens, it must tell them apart."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clip_settings, "GLYPHS", ("digits", "folder"))  # these folders hold digits
    class_folders(Path("pictures"), scans)
    Path("unsorted").mkdir()
    truth = {}
    for digit, name in ((3, "three"), (7, "seven")):
        for index in np.flatnonzero(scans.labels == digit)[-4:]:
            file = Path("unsorted") / f"{index}.png"
            truth[str(file)] = name
            Image.fromarray(scans.arrays[index]).save(file)
    example = documented_example()
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    exec(compile(example, "example", "exec"), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    answers = {line[0]: line[1] for line in lines if line and line[0] in truth}
    assert answers.keys() == truth.keys()
    assert sum(answers[file] == name for file, name in truth.items()) >= len(truth) - 1
