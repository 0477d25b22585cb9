"""CLIPs in folders of their own, and which CLIP a run takes unasked."""

import json
import shutil

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors.torch import save_file

from lamp_fast.classifier import Classifier
from lamp_fast.clip.load import load_clip
from lamp_fast.clip.model_folder import CONFIG, WEIGHTS
from lamp_fast.clip.prompts import tokenise
from lamp_fast.clip.settings import ClipConfig, caution
from lamp_fast.clip.weights import fingerprint
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.errors import InputError
from lamp_fast.methods.base import plain_image_features
from lamp_fast.methods.text import plain_text_features
from lamp_fast.runs import figures
from lamp_fast.runs.config import default_config
from lamp_fast.runs.hub import portable
from lamp_fast.runs.parameters import shapes_of
from lamp_fast.runs.training import training_settings

VISION = {"image_size": 16, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "layers": 2, "width": 24, "heads": 3}
MODEL = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}
LOOKS = {
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.1],
    "interpolation": "bilinear",
    "resize_mode": "squash",
}


def write(folder, model_cfg=MODEL, preprocess_cfg=LOOKS, seed=3):
    """A folder as open_clip writes one; without weights where there is no seed."""
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / CONFIG).write_text(json.dumps(config))
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            save_file(open_clip.CLIP(**model_cfg).state_dict(), folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model") / "bio")


def test_a_folder_is_the_model_that_open_clip_reads_from_it(folder):
    """Features, ids and preprocessing against open_clip's own loading of the same folder."""
    state = torch.get_rng_state()
    clip = load_clip(f"local-dir:{folder}", dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    tokens = tokenise(clip, ["red fox"], "a photo of a {}.")
    assert torch.equal(tokens.ids, tokenizer(["a photo of a red fox."]))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    theirs = theirs.double().eval()
    # The same float64 operations in another order, over two layers of width 32.
    for ours, expected in (
        (plain_image_features(clip, images), theirs.encode_image(images)),
        (
            plain_text_features(clip, tokens.names, "a photo of a {}."),
            theirs.encode_text(tokens.ids),
        ),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    looks = open_clip.get_model_preprocess_cfg(theirs)
    assert clip.preprocessing == Preprocessing(
        16, tuple(looks["mean"]), tuple(looks["std"]), looks["interpolation"], looks["resize_mode"]
    )
    assert (clip.identity.name, clip.identity.activation) == (f"local-dir:{folder}", "quick_gelu")
    assert clip.identity.fingerprint == fingerprint(theirs.float())


def test_the_hub_is_asked_for_the_two_files_alone(folder, monkeypatch):
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    clip = load_clip("hf-hub:org/bio")
    assert asked == [("org/bio", CONFIG), ("org/bio", WEIGHTS)]
    assert (clip.identity.name, clip.identity.weights) == ("hf-hub:org/bio", WEIGHTS)
    asked.clear()
    again = load_clip("hf-hub:org/bio", str(folder))
    assert not asked
    assert again.identity.fingerprint == clip.identity.fingerprint


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), r"no route.*hf download org/bio .* --clip local-dir:FOLDER"),
        (EntryNotFoundError("404"), f"--clip hf-hub:org/bio: has no {CONFIG}"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_line(error, message, monkeypatch):
    def download(*_):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(InputError, match=message) as caught:
        load_clip("hf-hub:org/bio")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="expected hf-hub:ORG/NAME"):
        load_clip("hf-hub:bio")


def model(vision=(), text=(), **more):
    return MODEL | {"vision_cfg": VISION | dict(vision), "text_cfg": TEXT | dict(text)} | more


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (model({"layers": [1, 1, 1, 1]}), "its image tower is a ResNet"),
        (model({"timm_model_name": "vit_base"}), "its image tower is timm's vit_base"),
        (
            model({"attentional_pool": True, "attn_pooler_heads": 4}),
            "the image tower pools by 'attentional'",
        ),
        (model({"pool_type": "avg"}), "the image tower pools by 'avg'"),
        (model({"ls_init_value": 0.1}), "image block 1 has LayerScale"),
        (model({"image_size": [16, 32]}), "not square"),
        (model(text={"hf_model_name": "bert"}), "its text tower is Hugging Face's bert"),
        (model(text={"hf_tokenizer_name": "t5"}), "its tokenizer is Hugging Face's t5"),
        (model(text={"no_causal_mask": True}), "the text tower is not causal"),
        (model(text={"pool_type": "last"}), "the text tower pools by 'last'"),
        (model(text={"vocab_size": 100}), "its vocabulary has 100 tokens"),
        (
            model(text={"act_kwargs": {"approximate": "tanh"}}, quick_gelu=False, custom_text=True),
            "text block 1 approximates GELU",
        ),
        (model(init_logit_bias=-10), r"it has a logit bias \(SigLIP\)"),
        (model(multimodal_cfg={}), "CoCa has a caption decoder"),
        (model(sparkles=2), "not what open_clip .* builds"),
        ({"embed_dim": 12}, "expected model_cfg with vision_cfg and text_cfg"),
    ],
)
def test_what_is_no_clip_of_ours_is_refused_by_its_config(config, reason, tmp_path):
    """Before weights are looked for: there are none."""
    write(tmp_path / "x", config, seed=None)
    with pytest.raises(InputError, match=f"^--clip local-dir:.*{reason}") as caught:
        load_clip(f"local-dir:{tmp_path / 'x'}")
    assert "\n" not in str(caught.value)


def test_other_preprocessing_is_refused(tmp_path):
    write(tmp_path / "x", preprocess_cfg={"resize_mode": "longest"}, seed=None)
    with pytest.raises(InputError, match=r"prepared otherwise .*resize_mode longest"):
        load_clip(f"local-dir:{tmp_path / 'x'}")


def test_files_that_are_not_there(folder, tmp_path):
    place = tmp_path / "x"
    for expected in ("is no folder", f"has no {CONFIG}", f"has no {WEIGHTS}$"):
        with pytest.raises(InputError, match=f"^--clip local-dir:{place}: {expected}"):
            load_clip(f"local-dir:{place}")
        if place.is_dir():
            write(place, seed=None)
        place.mkdir(exist_ok=True)
    (place / "open_clip_pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"model\.bin may run code .*save_file"):
        load_clip(f"local-dir:{place}")
    with pytest.raises(InputError, match=f"--pretrained {tmp_path}: has no"):
        load_clip("hf-hub:org/bio", str(tmp_path))
    with pytest.raises(InputError, match="--weights-of openai: --clip local-dir"):
        load_clip(f"local-dir:{folder}", weights_of="openai")


def test_parameters_are_counted_without_weights(tmp_path):
    place = write(tmp_path / "x", seed=None)
    assert shapes_of(f"local-dir:{place}").vision.width == VISION["width"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for number in range(6):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_a_run_names_its_folder_and_finds_it_where_it_has_moved(
    folder, pictures, tmp_path, monkeypatch
):
    place = shutil.copytree(folder, tmp_path / "bio")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "plot_per_class", lambda *_: None)
    flags = {"data": "folder", "root": pictures, "method": "zeroshot", "out": tmp_path / "run"}
    trained = Classifier.train(clip="local-dir:bio", **flags)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["clip"]["name"] == record["settings"]["clip"]["clip"] == f"local-dir:{place}"
    assert record["clip"]["preprocessing"]["resize_mode"] == "squash"
    shared = json.dumps(portable(record))
    assert "local-dir:bio" in shared
    assert str(tmp_path) not in shared
    files = sorted(pictures.glob("*/*.png"))
    expected = trained.classify(files)
    moved = place.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="is no folder"):
        Classifier.load(tmp_path / "run")
    assert Classifier.load(tmp_path / "run", pretrained=moved).classify(files) == expected
    write(moved, seed=4)
    with pytest.raises(InputError, match="sha256"):
        Classifier.load(tmp_path / "run", pretrained=moved)


def test_the_carried_clip_is_for_glyphs_alone(tmp_path):
    usual = ClipConfig("ViT-B-16", "openai")
    for data in ("folder", "table", "list", "caltech101", "cifar100_lt"):
        assert ClipConfig().resolved(data) == usual
        assert ClipConfig("tiny").resolved(data) == ClipConfig("tiny")
        assert "mean nothing" in caution("tiny", False, data)
    assert ClipConfig().resolved("digits") == ClipConfig("tiny")
    assert caution("tiny", False, "digits") is caution("ViT-B-16", False, "folder") is None
    assert ClipConfig(pretrained="w.pt").resolved("folder").pretrained == "w.pt"
    assert default_config({}).preset == "tiny"
    assert default_config({"data": "folder"}).preset == "table16-imb"
    assert training_settings({"data": "folder", "clip": "tiny"}).preset == "tiny"


def test_weights_that_cannot_be_fetched_are_one_line_that_says_what_to_do(
    pictures, tmp_path, monkeypatch
):
    def download(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    with pytest.raises(InputError) as caught:
        Classifier.train(data="folder", root=pictures, out=tmp_path / "run")
    told = str(caught.value)
    assert "\n" not in told
    for words in (
        "--clip ViT-B-16: its weights openai cannot be fetched (no route)",
        f"hf download timm/vit_base_patch16_clip_224.openai {WEIGHTS} --local-dir .",
        "--pretrained FILE --weights-of openai",
        "--clip tiny needs none, but only tries the pipeline",
    ):
        assert words in told
    assert not (tmp_path / "run").exists()
