"""Which CLIPs are served, with which activation and weights, and what the others are told."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lamp_fast.clip.load import load_clip
from lamp_fast.clip.prompts import tokenise
from lamp_fast.clip.towers import FrozenClip, activation_of, check_supported
from lamp_fast.clip.weights import fingerprint
from lamp_fast.data.transforms import Preprocessing
from lamp_fast.errors import InputError
from lamp_fast.methods.base import plain_image_features
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.methods.text import plain_text_features
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig

VISION = {"image_size": 16, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "layers": 3, "width": 24, "heads": 3}


def small(vision=(), text=(), model=open_clip.CLIP, **more):
    vision, text = VISION | dict(vision), TEXT | dict(text)
    return model(embed_dim=12, vision_cfg=vision, text_cfg=text, **more)


@pytest.fixture
def small_models(monkeypatch, tmp_path):
    """Registers ``small`` and ``small-quickgelu`` with open_clip, with one tag each."""
    import json

    for name, quick in (("lampsmall", False), ("lampsmall-quickgelu", True)):
        config = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": quick}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    paths = list(open_clip.factory._MODEL_CONFIG_PATHS)
    configs = dict(open_clip.factory._MODEL_CONFIGS)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", paths)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", configs)
    open_clip.add_model_config(tmp_path)
    tags = {
        name: {"quicktag": {"url": "", "hf_hub": "", "quick_gelu": True}, "plaintag": {"url": ""}}
        for name in ("lampsmall", "lampsmall-quickgelu")
    }
    monkeypatch.setattr(
        open_clip.pretrained, "_PRETRAINED", open_clip.pretrained._PRETRAINED | tags
    )
    file = tmp_path / "weights.safetensors"
    torch.manual_seed(5)
    save_file(small().state_dict(), file)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_, **__: str(file))
    return file


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("model", [open_clip.CLIP, open_clip.CustomTextCLIP])
@pytest.mark.parametrize("pool", ["argmax", "eos"])
def test_towers_reproduce_open_clip(model, quick_gelu, pool):
    """Blocks, embedding, eot rule and readout against encode_image and encode_text."""
    text = {"pool_type": pool, "eos_id": 49407}
    clip = FrozenClip(
        small(text=text, model=model, quick_gelu=quick_gelu).double(), Preprocessing(size=16)
    )
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    tokens = tokenise(clip, ["cat", "a rather long name"], "a photo of a {}.")
    torch.testing.assert_close(
        plain_image_features(clip, images), clip.model.encode_image(images), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        plain_text_features(clip, tokens.names, "a photo of a {}."),
        clip.model.encode_text(tokens.ids),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision": {"pool_type": "avg"}}, "'avg'"),
        ({"vision": {"attentional_pool": True, "attn_pooler_heads": 4}}, "attentional"),
        ({"vision": {"ls_init_value": 0.1}}, "LayerScale"),
        ({"vision": {"patch_dropout": 0.5}}, "drops patches"),
        ({"vision": {"qk_norm": True}}, "block 1 is a Custom"),
        ({"vision": {"layers": [1, 1, 1, 1], "width": 16}}, "ModifiedResNet"),
        ({"text": {"ls_init_value": 0.1}}, "LayerScale"),
        ({"text": {"no_causal_mask": True}, "model": open_clip.CustomTextCLIP}, "not causal"),
        ({"text": {"pool_type": "last"}}, "'last'"),
        ({"text": {"proj_type": "none"}}, "no joint projection"),
        ({"text": {"embed_cls": True}, "model": open_clip.CustomTextCLIP}, "class token"),
        ({"init_logit_bias": -10.0}, "logit bias"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_foreign_architectures_are_refused(changes, reason):
    with pytest.raises(InputError, match="not supported: ") as error:
        check_supported(small(**changes))
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "name", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "xlm-roberta-base-ViT-B-32", "EVA02-B-16"]
)
def test_foreign_models_are_refused_by_name_before_anything_is_built(name):
    with pytest.raises(InputError, match=f"--clip {name}: not supported"):
        load_clip(name, "random")


@pytest.mark.parametrize("name", ["lampsmall", "lampsmall-quickgelu"])
@pytest.mark.parametrize(("tag", "activation"), [("quicktag", "quick_gelu"), ("plaintag", "gelu")])
def test_the_activation_follows_the_tag(small_models, name, tag, activation):
    clip = load_clip(name, tag)
    assert clip.identity.activation == activation_of(clip.model) == activation


def test_openai_is_quick_gelu_under_either_name():
    for name in ("ViT-B-16", "ViT-B-16-quickgelu"):
        assert open_clip.get_pretrained_cfg(name, "openai")["quick_gelu"] is True


def test_local_safetensors_and_state_dict(small_models, tmp_path):
    expected = fingerprint(load_clip("lampsmall", str(small_models), weights_of="plaintag").model)
    file = tmp_path / "weights.pt"
    torch.manual_seed(5)
    torch.save(small().state_dict(), file)
    assert fingerprint(load_clip("lampsmall", str(file), weights_of="plaintag").model) == expected


def test_torchscript_is_recognised_and_the_error_says_how_to_convert(small_models, tmp_path):
    file = tmp_path / "ViT.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(file))
    with pytest.raises(InputError, match=r"TorchScript.*torch\.jit\.load"):
        load_clip("lampsmall", str(file), weights_of="plaintag")


def test_code_in_a_pickle_is_not_run(small_models, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    file = tmp_path / "evil.pt"
    torch.save({"weights": Evil()}, file)
    with pytest.raises(InputError, match="not weights of this model"):
        load_clip("lampsmall", str(file), weights_of="plaintag")
    assert not (tmp_path / "owned").exists()


def test_weights_of_another_model(small_models, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file(small(text={"layers": 2}).state_dict(), file)
    with pytest.raises(InputError, match="not weights of this model"):
        load_clip("lampsmall", str(file), weights_of="plaintag")


def test_random_weights_follow_their_seed(small_models):
    first, again, other = (
        load_clip("lampsmall", "random", init_seed=seed).identity for seed in (1, 1, 2)
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.random


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("nonsense", None, "--clip nonsense: not tiny nor an open_clip model"),
        ("vit-b-16", None, "did you mean ViT-B-16"),
        ("ViT-B-16", None, "expected --pretrained with a tag"),
        ("ViT-B-16", "nonsense", "neither a file nor a tag of ViT-B-16"),
        ("tiny", "openai", "brings its own weights"),
    ],
)
def test_bad_names(name, pretrained, message):
    with pytest.raises(InputError, match=message) as error:
        load_clip(name, pretrained)
    assert "\n" not in str(error.value)


def test_unreachable_weights_say_how_to_give_a_local_file(small_models, monkeypatch):
    def away(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(open_clip, "download_pretrained", away)
    with pytest.raises(InputError, match=r"cannot be fetched.*--pretrained FILE"):
        load_clip("lampsmall", "quicktag")


def test_cosines_and_their_scale_do_not_lose_what_the_towers_lose(small_clip):
    """In bfloat16 a logit near 30 is a multiple of an eighth, and 100 itself becomes 99."""
    clip = small_clip()
    clip.model.logit_scale.fill_(100.0).log_()
    clip = FrozenClip(clip.model, clip.preprocessing)
    assert float(clip.logit_scale) == pytest.approx(100, rel=1e-15)
    low = clip.to(torch.bfloat16)
    assert float(low.logit_scale) == pytest.approx(100, rel=1e-15)
    images = torch.randn(3, 3, 16, 16).bfloat16()
    image = plain_image_features(low, images)
    text = plain_text_features(low, ["cat", "dog"], "a photo of a {}.")
    assert image.dtype == text.dtype == torch.float32
    method = build_method(low, TrainConfig(method="zeroshot"), RunClasses())
    classes = method.prepare(["cat", "dog"], "a photo of a {}.")
    cosine = F.cosine_similarity(image.double()[:, None], text.double()[None], dim=-1)
    torch.testing.assert_close(
        method.logits(images, classes), (100 * cosine).float(), rtol=1e-5, atol=1e-5
    )
    assert low.to("meta").logit_scale.is_meta  # it moves with the model


def test_everything_is_frozen(small_clip):
    clip = small_clip()
    clip.train()
    assert not clip.training
    assert not any(each.requires_grad for each in clip.parameters())


def test_a_prompt_longer_than_the_context_is_refused(small_clip):
    with pytest.raises(InputError, match="longer than 77 tokens"):
        tokenise(small_clip(), ["cat " * 80], "a photo of a {}.")
    fits = tokenise(small_clip(), ["cat " * 70], "a photo of a {}.")
    assert fits.ids.shape == (1, 77)
