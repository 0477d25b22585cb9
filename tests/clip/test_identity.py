"""A CLIP is more than its weights: who decides activation and preprocessing of a file's.

The models are small and registered for the test; what a tag would fetch is a file made here.
"""

import hashlib
import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lamp_fast import Classifier, evaluate, train
from lamp_fast.clip.load import load_clip
from lamp_fast.clip.usage import completed_record, file_usage
from lamp_fast.data.transforms import OPENAI_MEAN, Preprocessing
from lamp_fast.errors import InputError
from lamp_fast.runs.folder import CHECKPOINT, CONFIG, LEARNED, RESULT, resumed_defaults

HALF = (0.5, 0.5, 0.5)
VISION = {"image_size": 16, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "layers": 2, "width": 24, "heads": 3}
VENDOR = {"quick_gelu": True, "mean": HALF, "std": HALF, "resize_mode": "squash"}
VENDORS = ("quick_gelu", Preprocessing(16, HALF, HALF, resize_mode="squash"))
USUAL = ("gelu", Preprocessing(16))


@pytest.fixture
def weights(monkeypatch, tmp_path):
    """A file with the weights that the tag "vendor" of the model "lampdemo" fetches."""
    file = tmp_path / "vendor.safetensors"
    torch.manual_seed(5)
    model = open_clip.CLIP(embed_dim=12, vision_cfg=VISION, text_cfg=TEXT)
    for each in model.parameters():
        if each.ndim > 1:
            torch.nn.init.normal_(each, std=0.3)
    save_file(model.state_dict(), file)
    register(monkeypatch, tmp_path, {"vendor": {**VENDOR, "url": "", "hf_hub": "vendor/clip/"}})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_, **__: str(file))
    return file


def register(monkeypatch, folder, tags):
    (folder / "models").mkdir(exist_ok=True)
    config = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "models" / "lampdemo.json").write_text(json.dumps(config))
    factory = open_clip.factory
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    open_clip.add_model_config(folder / "models")
    known = open_clip.pretrained._PRETRAINED | {"lampdemo": tags}
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", known)


def usage(clip):
    assert clip.preprocessing == clip.identity.preprocessing
    return clip.identity.activation, clip.preprocessing


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_file_that_is_told_to_be_a_tags_is_used_as_the_tags(weights, no_warning):
    by_tag = load_clip("lampdemo", "vendor")
    by_file = load_clip("lampdemo", str(weights), weights_of="vendor")
    assert usage(by_tag) == usage(by_file) == VENDORS
    assert by_tag.identity.fingerprint == by_file.identity.fingerprint


def test_a_file_nobody_knows_is_warned_of(weights):
    with pytest.warns(UserWarning, match=r"not known.*vendor would.*--weights-of TAG") as told:
        clip = load_clip("lampdemo", str(weights))
    assert usage(clip) == USUAL
    assert len(told) == 1


@pytest.mark.parametrize("model", ["ViT-B-16", "ViT-L-14"])
def test_published_models_with_a_twin_warn(model, weights):
    with pytest.warns(UserWarning, match=f"as {model} says.*openai"):
        assert file_usage(model, weights, None).activation == "gelu"
    assert file_usage(model, weights, "openai").activation == "quick_gelu"


@pytest.mark.parametrize("digits", [64, 8])
def test_a_file_is_recognised_by_its_sha256(weights, monkeypatch, tmp_path, no_warning, digits):
    """As OpenAI's addresses hold all of it, and open_clip's own the beginning."""
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    address = f"https://x/{digest}/a.pt" if digits == 64 else f"https://x/a-{digest[:8]}.pt"
    other = {"url": f"https://x/a-{'0' * 8}.pt", "mean": (0.1, 0.1, 0.1)}
    register(monkeypatch, tmp_path, {"other": other, "vendor": {**VENDOR, "url": address}})
    copied = shutil.copy(weights, tmp_path / "renamed.safetensors")
    assert usage(load_clip("lampdemo", str(copied))) == VENDORS


def test_published_addresses_are_read():
    from lamp_fast.clip.usage import _SHA256_IN_ADDRESS

    for name, tag, start in (
        ("ViT-B-16", "openai", "5806e77cd80f8b59"),
        ("ViT-B-32", "laion2b_e16", "af8dbd0c"),
    ):
        found = _SHA256_IN_ADDRESS.search(open_clip.get_pretrained_cfg(name, tag)["url"])
        assert (found[1] or found[2]).startswith(start)


def test_a_file_in_the_hubs_cache_is_recognised(weights, tmp_path, no_warning):
    place = tmp_path / "models--vendor--clip" / "snapshots" / "1"
    place.mkdir(parents=True)
    copied = shutil.copy(weights, place)
    assert usage(load_clip("lampdemo", str(copied))) == VENDORS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights_of": "nonsense"}, r"--weights-of nonsense: expected a tag of lampdemo \(vendor"),
        ({"pretrained": "vendor", "weights_of": "vendor"}, "with a file, not vendor"),
        ({"pretrained": "random", "weights_of": "vendor"}, "with a file, not random"),
        ({"pretrained": None, "weights_of": "vendor"}, "expected --pretrained with a file"),
        ({"name": "tiny", "pretrained": None, "weights_of": "openai"}, "with a file"),
        ({"name": "nonsense", "weights_of": "vendor"}, "--clip nonsense: not tiny"),
    ],
)
def test_bad_weights_of(weights, arguments, message):
    arguments = {"name": "lampdemo", "pretrained": str(weights)} | arguments
    with pytest.raises(InputError, match=message):
        load_clip(arguments.pop("name"), **arguments)


def changed(weights, **tensors):
    from safetensors.torch import load_file

    file = weights.with_name("changed.safetensors")
    save_file({**load_file(weights), **tensors}, file)
    return str(file)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"visual.positional_embedding": torch.zeros(10, 32)}, "another picture size .10 pos"),
        ({"positional_embedding": torch.zeros(32, 24)}, "another context length .32 positions"),
        ({"text_projection": torch.full((24, 12), float("nan"))}, "text_projection holds NaN"),
        ({"logit_scale": torch.tensor(float("inf"))}, "logit_scale holds NaN or infinity"),
        ({"text_projection": torch.ones(24, 12, dtype=torch.int8)}, "is torch.int8"),
        ({"text_projection": torch.zeros(24, 13)}, "not weights of this model"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(weights, tensors, message):
    with pytest.raises(InputError, match=message):
        load_clip("lampdemo", changed(weights, **tensors), weights_of="vendor")


def test_what_openai_keeps_beside_its_weights_is_left_out(weights, tmp_path):
    from safetensors.torch import load_file

    file = tmp_path / "clip.pt"
    beside = {name: torch.tensor(16) for name in ("input_resolution", "context_length")}
    torch.save({**load_file(weights), **beside}, file)
    clip = load_clip("lampdemo", str(file), weights_of="vendor")
    expected = load_clip("lampdemo", "vendor").identity.fingerprint
    assert clip.identity.fingerprint == expected


@pytest.fixture
def run(weights, tmp_path):
    """A run of the tag, its pictures and its weights as a file."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 255, (20, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    Classifier.train(
        data="folder",
        root=tmp_path / "data",
        clip="lampdemo",
        pretrained="vendor",
        layers="2",
        epochs=2,
        out=tmp_path / "run",
    )
    return tmp_path / "run"


def probabilities(classifier, run):
    answers = classifier.classify(sorted((run.parent / "data").glob("*/*.png")))
    return [dict(zip(each.names, each.probabilities, strict=True)) for each in answers]


def test_a_run_is_used_as_it_was_trained_wherever_its_weights_lie(run, weights, no_warning):
    by_tag, by_file = Classifier.load(run), Classifier.load(run, pretrained=weights)
    assert usage(by_file.method.clip) == usage(by_tag.method.clip) == VENDORS
    # The same numbers through the same program.
    assert probabilities(by_file, run) == probabilities(by_tag, run)
    by_file.save_pretrained(run.parent / "saved")
    again = Classifier.from_pretrained(run.parent / "saved", pretrained=weights)
    assert probabilities(again, run) == probabilities(by_tag, run)


def test_a_run_resumes_and_is_scored_as_it_was_trained(run, weights, no_warning):
    expected = json.loads((run / RESULT).read_text())
    saved = json.loads((run / CONFIG).read_text())
    saved["settings"]["clip"]["pretrained"] = str(weights)
    (run / CONFIG).write_text(json.dumps(saved))
    assert evaluate.main(evaluate.EvaluateConfig(run)) == 0
    for name in (LEARNED, RESULT):
        (run / name).unlink()
    assert (run / CHECKPOINT).is_file()
    config = replace(resumed_defaults({"out": run, "resume": True}), out=run, resume=True)
    assert train.main(config) == 0
    again = json.loads((run / RESULT).read_text())
    assert [row["acc_base"] for row in again] == [row["acc_base"] for row in expected]


def test_version_0_1_0_did_not_record_the_preprocessing(weights):
    of_tag = {"name": "lampdemo", "weights": "vendor (open_clip tag)", "activation": "quick_gelu"}
    clip = load_clip("lampdemo", str(weights), recorded=of_tag)
    assert usage(clip) == VENDORS
    # It took any file for what the model's name says, and was trained so.
    of_file = {"name": "lampdemo", "weights": str(weights), "activation": "gelu"}
    assert usage(load_clip("lampdemo", "vendor", recorded=of_file)) == USUAL
    completed = completed_record(of_tag)
    assert completed["preprocessing"]["mean"] == list(HALF)
    assert completed_record(completed) == completed
    carried = {"name": "tiny", "weights": "carried by the package", "activation": "quick_gelu"}
    assert usage(load_clip("tiny", recorded=carried))[1].mean == OPENAI_MEAN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "--clip tiny: used with quick_gelu.*by the run with gelu"),
        ({"preprocessing": {"size": 32}}, "its clip is not what a run records"),
        ({"preprocessing": None}, "its clip is not what a run records"),
        ({"weights": 3}, "its clip is not what a run records"),
    ],
)
def test_a_record_that_cannot_be_followed_is_refused(change, message):
    record = {"name": "tiny", "weights": "carried by the package", "activation": "quick_gelu"}
    if change == {"weights": 3}:
        record["name"] = "ViT-B-16"
    with pytest.raises(InputError, match=message):
        load_clip("tiny", recorded=record | change)


def test_an_unknown_tag_of_an_old_record_is_refused():
    record = {"name": "ViT-B-16", "weights": "gone (open_clip tag)", "activation": "gelu"}
    with pytest.raises(InputError, match="the tag gone, unknown here"):
        load_clip("ViT-B-16", "openai", recorded=record)
