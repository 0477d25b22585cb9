"""The Hugging Face layout: what it holds, what it must not hold, to the hub and back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from lamp_fast.classifier import Classifier
from lamp_fast.errors import InputError
from lamp_fast.runs import hub
from lamp_fast.tensors import load_tensors

PICTURE = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
FILES = {"README.md", "answers.json", "config.json", "model.safetensors", "result.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One epoch over a folder of noise: two classes, one with a name that Markdown would read."""
    place = tmp_path_factory.mktemp("hub")
    generator = np.random.default_rng(1)
    for name, count in (("cat", 9), ("<b>dog|", 6)):
        (place / "secret-place" / name).mkdir(parents=True)
        for index in range(count):
            picture = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(place / "secret-place" / name / f"{index}.png")
    broken = place / "secret-place" / "cat" / "broken.png"
    broken.write_bytes(b"nonsense")
    Classifier.train(
        data="folder",
        root=place / "secret-place",
        clip="tiny",
        skip_unreadable=True,
        epochs=1,
        batch=4,
        out=place / "run",
    )
    return place / "run"


@pytest.fixture(scope="module")
def classifier(run):
    return Classifier.load(run, device="cpu")


@pytest.fixture
def saved(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "saved", license="mit")
    return tmp_path / "saved"


def test_a_saved_classifier_answers_alike(classifier, saved):
    assert {each.name for each in saved.iterdir()} == FILES
    for loaded in (Classifier.from_pretrained(saved), Classifier.load(saved)):
        assert loaded.classify([PICTURE]) == classifier.classify([PICTURE])
        assert loaded.results == classifier.results
        assert loaded.facts == classifier.facts
    tensors, _ = load_tensors(saved / "model.safetensors")
    assert tensors.keys() == classifier.method.state_dict().keys()


def test_a_saved_classifier_saves_and_loads_again(saved, tmp_path, classifier):
    again = tmp_path / "again"
    Classifier.from_pretrained(saved).save_pretrained(again, license="mit")
    for name in FILES:
        assert (again / name).read_bytes() == (saved / name).read_bytes(), name
    Classifier.from_pretrained(again).save_pretrained(again)
    assert Classifier.from_pretrained(again).classify([PICTURE]) == classifier.classify([PICTURE])


def test_no_path_of_the_machine_is_published(run, saved):
    assert "secret-place" in (run / "config.json").read_text()
    for file in saved.iterdir():
        content = file.read_bytes()
        assert b"secret-place" not in content, file
        assert str(run.parent).encode() not in content, file


def test_local_weights_keep_their_name_alone(classifier):
    record = json.loads(json.dumps(classifier.record))
    record["settings"]["clip"].update(clip="ViT-B-16", pretrained="/home/me/weights.pt")
    record["clip"].update(name="ViT-B-16", weights="/home/me/weights.pt")
    places = ("root", "table", "train", "val", "test", "names")
    record["settings"]["data"].update(dict.fromkeys(places, "/home/me/pictures"))
    before = json.dumps(record)
    portable = hub.portable(record)
    assert "/home" not in json.dumps(portable)
    assert portable["settings"]["clip"]["pretrained"] == "weights.pt"
    assert json.dumps(record) == before
    record["settings"]["clip"]["pretrained"] = "openai"
    record["clip"]["weights"] = "openai (open_clip tag)"
    assert hub.portable(record)["settings"]["clip"]["pretrained"] == "openai"


def test_the_card_is_read_by_the_hub_and_says_what_the_run_was(run, saved, classifier):
    card = ModelCard.load(saved / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "mit"
    assert data["library_name"] == "lamp_fast"
    assert data["pipeline_tag"] == "image-classification"
    row = json.loads((run / "result.json").read_text())[1]
    values = {
        (each.dataset_name, each.metric_type): each.metric_value for each in card.data.eval_results
    }
    assert values == {
        ("folder, trained classes", "accuracy"): row["acc_base"],
        ("folder, trained classes", "f1"): row["f1_base"],
    }
    for words in (
        "imbalance ratio",
        "| cat |",
        classifier.record["data"]["sha256"],
        classifier.record["clip"]["fingerprint"],
        "LAMP",
        "CLIP zero-shot",
        "mit",
    ):
        assert words in card.text, words
    assert "<b>" not in card.text
    assert "\\<b" not in card.text
    assert "&lt;b&gt;dog\\|" in card.text


def test_nothing_of_a_record_speaks_markdown_html_or_yaml(classifier):
    """Written by whoever trained it, read on a page that others trust."""
    hostile = "x\n---\n# [a](b) <script>|`*c* ~d~ $e$ :f: @g \x1b[31m &lt; \"q': {h: !i}\\"
    # Escaped by hand, as CommonMark reads it: on one line, each mark behind a backslash.
    literal = (
        r"x --- \# \[a\]\(b\) &lt;script&gt;\|\`\*c\* \~d\~ \$e\$ \:f\: \@g \[31m"
        r""" &amp;lt; "q'\: \{h\: \!i\}\\"""
    )
    record = json.loads(json.dumps(classifier.record))
    record["version"] = record["settings"]["preset"] = hostile
    record["settings"]["data"]["data"] = hostile
    record["data"] |= {"template": hostile, "sha256": hostile}
    record["data"]["base_names"][0] = hostile
    record["clip"] |= dict.fromkeys(("name", "weights", "activation", "fingerprint"), hostile)
    results = [{**row, "name": hostile} for row in classifier.results]
    card = ModelCard(hub.model_card(record, results, license=hostile))
    assert card.data.license == hostile
    assert {each.dataset_type for each in card.data.eval_results} == {hostile}
    # Title, version, results, data, sha256, template, preset, a class, CLIP and licence.
    assert card.text.count(literal) == 1 + 1 + len(results) + 5 + 4 + 1
    assert "<script>" not in card.text
    assert "\x1b" not in card.text


def test_a_save_without_results_keeps_none_of_an_earlier_one(classifier, saved):
    parts = classifier.method, classifier.config, classifier.record, classifier.facts
    Classifier(*parts).save_pretrained(saved)
    assert Classifier.load(saved).results is None


def test_a_card_without_licence_or_results_says_so(classifier):
    card = ModelCard(hub.model_card(classifier.record, None))
    assert card.data.license is None
    assert "not stated by their author" in card.text
    assert "None were saved." in card.text


def test_a_card_of_a_thousand_classes_stays_readable(classifier):
    record = json.loads(json.dumps(classifier.record))
    record["data"]["base_names"] = [f"class {number}" for number in range(1000)]
    record["data"]["counts"] = [3] * 1000
    card = hub.model_card(record, None)
    assert card.count("| class ") == hub.MAX_CLASSES_SHOWN
    assert "and 800 more" in card


def test_a_card_of_random_weights_says_that_its_numbers_mean_nothing(classifier):
    record = json.loads(json.dumps(classifier.record))
    record["clip"]["random"] = True
    assert "accuracies mean nothing" in hub.model_card(record, classifier.results)
    assert "accuracies mean nothing" not in hub.model_card(classifier.record, classifier.results)
    assert "answers mean nothing" in hub.model_card(classifier.record, classifier.results)


def test_other_files_are_left_alone(classifier, run, tmp_path):
    (tmp_path / "README.md").write_text("my project")
    with pytest.raises(InputError, match="holds other files"):
        classifier.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my project"
    before = sorted(each.name for each in run.iterdir())
    with pytest.raises(InputError, match="holds other files"):
        classifier.save_pretrained(run)
    assert sorted(each.name for each in run.iterdir()) == before
    # Transformers and others call theirs by the same names.
    other = tmp_path / "bert"
    other.mkdir()
    contents = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"weights"}
    for name, content in contents.items():
        (other / name).write_bytes(content)
    with pytest.raises(InputError, match="holds other files"):
        classifier.save_pretrained(other)
    assert {each.name: each.read_bytes() for each in other.iterdir()} == contents
    with pytest.raises(InputError, match="is a file"):
        classifier.save_pretrained(tmp_path / "README.md")


class FakeHub:
    """Stands in for HfApi: repositories are folders."""

    def __init__(self, place: Path) -> None:
        self.place, self.made, self.messages = place, {}, []

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        (self.place / repo_id).mkdir(parents=True, exist_ok=True)
        self.made[repo_id] = private
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.place / repo_id, dirs_exist_ok=True)
        self.messages.append(commit_message)


def test_to_the_hub_and_back(classifier, tmp_path, monkeypatch):
    fake = FakeHub(tmp_path)
    address = classifier.push_to_hub(
        "me/mine", private=True, license="mit", commit_message="first", api=fake
    )
    assert address == "https://hub.example/me/mine"
    assert (fake.made, fake.messages) == ({"me/mine": True}, ["first"])
    assert {each.name for each in (tmp_path / "me" / "mine").iterdir()} == FILES

    def snapshot_download(repo_id, *, revision, token, allow_patterns, **_):
        assert (revision, token) == ("v1", "word")
        copy = tmp_path / "downloaded"
        ignored = shutil.ignore_patterns("README.md")
        assert set(allow_patterns) == FILES - {"README.md"}
        return str(shutil.copytree(tmp_path / repo_id, copy, ignore=ignored))

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    loaded = Classifier.from_pretrained("me/mine", revision="v1", token="word")
    assert loaded.classify([PICTURE]) == classifier.classify([PICTURE])


@pytest.mark.parametrize("error", [ConnectionError, OSError, RuntimeError, ValueError])
def test_a_hub_out_of_reach_costs_one_line(error, classifier, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise error("no route\n to the hub")

    fake = FakeHub(tmp_path)
    for name in ("create_repo", "upload_folder"):
        broken = FakeHub(tmp_path)
        setattr(broken, name, fail)
        with pytest.raises(InputError, match=r"^me/mine: .*\(no route to the hub\)$"):
            classifier.push_to_hub("me/mine", api=broken)
    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"^me/mine: no such folder, .*\(no route to the hub\)$"):
        Classifier.from_pretrained("me/mine")
    assert not fake.made


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/mi ne", "../elsewhere/x", "me/", ""])
def test_a_malformed_id_asks_no_hub(name, classifier, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", None)
    fake = FakeHub(tmp_path)
    with pytest.raises(InputError, match="owner/name on the Hugging Face hub"):
        classifier.push_to_hub(name, api=fake)
    assert not fake.made
    if name:
        with pytest.raises(InputError, match=r"a folder that exists, or owner/name"):
            Classifier.from_pretrained(name)
