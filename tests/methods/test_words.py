"""Several texts a class: named sets, files, descriptions, and the mean that is taken of them."""

import json

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lamp_fast import evaluate
from lamp_fast.classifier import Classifier
from lamp_fast.data.benchmark import Origin
from lamp_fast.data.sources.words import read_descriptions, read_templates
from lamp_fast.data.templates import IMAGENET_7, PROMPTSRC_60, SETS, openai_80
from lamp_fast.data.words import Words, saved_words
from lamp_fast.errors import InputError
from lamp_fast.fields import to_json
from lamp_fast.methods import METHODS, text
from lamp_fast.methods.surroundings import RunClasses, Surroundings
from lamp_fast.methods.zeroshot import ZeroShot
from lamp_fast.runs import figures
from lamp_fast.runs.building import refuse_ensemble
from lamp_fast.runs.training import training_settings

TWO = ("a photo of a {}.", "the {}, drawn.")
TOLD = {"red fox": ("a fox with a {} tail.", "an animal.", "a {}.")}
NAMES = ("red_fox", "ox")


def texts_of(clip, texts, *, normalised):
    """The oracle: open_clip's own text tower, a text at a time."""
    rows = [clip.model.encode_text(open_clip.get_tokenizer("ViT-B-16")([each])) for each in texts]
    rows = torch.cat(rows)
    return (F.normalize(rows, dim=-1) if normalised else rows).mean(0)


@pytest.mark.parametrize("at_once", [1024, 2])
@pytest.mark.parametrize("name", ["zeroshot", "tip", "clap", "candle"])
def test_the_mean_over_a_classs_texts(name, at_once, small_clip, monkeypatch):
    """Normalised before it as CLIP's authors do, but not where a method's paper does otherwise."""
    monkeypatch.setattr(text, "_TEXTS_AT_ONCE", at_once)
    clip, words = small_clip(), Words(TWO, TOLD)
    classes = RunClasses(NAMES, (), (3, 2))
    kind = METHODS[name]
    settings = kind.Settings(**({"fusion_heads": 4} if name == "candle" else {}))
    method = kind.load().build(clip, settings, Surroundings(classes))
    prepared = method.prepare(NAMES, TWO[0], Origin(words=words))
    found = prepared if isinstance(prepared, torch.Tensor) else prepared.texts
    if name == "candle":
        found = found[: len(NAMES)]
    own = [each.replace("{}", "red_fox") for each in TOLD["red fox"]]
    every = [own, [each.replace("{}", "ox") for each in TWO]]
    normalised = name in ("zeroshot", "tip")
    expected = torch.stack([texts_of(clip, each, normalised=normalised) for each in every])
    if normalised:
        expected = F.normalize(expected, dim=-1)
    # Float64 through four small blocks, of texts of other lengths beside one another.
    torch.testing.assert_close(found.double(), expected, rtol=1e-9, atol=1e-9)
    assert method.templates(TWO[0], Origin(words=words)) == TWO


def test_texts_are_encoded_once(small_clip, monkeypatch):
    clip, words, calls = small_clip(), Words(TWO), []
    plain = text.plain_text_features
    monkeypatch.setattr(
        text, "plain_text_features", lambda *given: calls.append(given) or plain(*given)
    )
    one, other = (ZeroShot(clip).prepare(NAMES, TWO[0], Origin(words=words)) for _ in range(2))
    assert len(calls) == 1
    assert torch.equal(one, other)
    three = Words((*TWO, "{}"))
    assert not torch.equal(ZeroShot(clip).prepare(NAMES, TWO[0], Origin(words=three)), one)


@pytest.mark.parametrize("name", METHODS)
def test_what_reads_one_text_a_class_refuses_several(name, small_clip):
    method = METHODS[name]
    if method.no_ensemble is None:
        refuse_ensemble(method, Words(TWO))
        return
    with pytest.raises(InputError, match=r"--template: .* and 1 more templates: expected one"):
        refuse_ensemble(method, Words(TWO))
    with pytest.raises(
        InputError, match=r"--descriptions: 3 descriptions of 1 classes.*text tower"
    ):
        refuse_ensemble(method, Words(TWO, TOLD))


def test_named_sets_are_the_fields(tmp_path):
    assert {name: len(each()) for name, each in SETS.items()} == {
        "imagenet-7": 7,
        "promptsrc-60": 60,
        "openai-80": 80,
    }
    assert set(IMAGENET_7) | set(PROMPTSRC_60) <= set(openai_80())
    assert len(set(openai_80())) == 80
    file = tmp_path / "mine.txt"
    file.write_text("a {}.\n\nthe {}.\n")
    assert read_templates(["imagenet-7", "a {}.", str(file)]) == (*IMAGENET_7, "a {}.", "the {}.")
    assert read_templates(()) == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "picture",
            "--template 'picture': expected {} once, .*imagenet-7, promptsrc-60, openai-80",
        ),
        ("{} and {}", "--template '{} and {}': expected {} once"),
        (
            "one.txt",
            "--template .*one.txt: line 2: 'nothing': expected {} once, for the class name$",
        ),
        ("none.txt", "none.txt: cannot be read"),
    ],
)
def test_templates_that_are_none(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("a {}.\nnothing\n")
    with pytest.raises(InputError, match=message) as caught:
        read_templates([given])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected one column 'class' in"),
        ("name,description\nox,big\n", "expected one column 'class' in"),
        ("class,description\n", "has no rows"),
        ("class,description\nox, \n", "row 1: description is empty"),
        ("class,description\nox\n", "row 1: description is empty"),
        ("class,description\nox,{} and {}\n", "row 1: '{} and {}': expected {} once"),
        ('class,description\nox,"big\n', "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_descriptions_that_are_none(content, message, tmp_path):
    file = tmp_path / "d.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_descriptions(file)
    assert str(caught.value).startswith(f"--descriptions {file}")


@pytest.mark.parametrize(
    "values",
    [3, {}, {"templates": [], "descriptions": {}}, {"templates": ["x"], "descriptions": {}},
     {"templates": ["{}"], "descriptions": {"a": []}}],
)  # fmt: skip
def test_damaged_words_of_a_run(values):
    with pytest.raises(InputError, match=r"config\.json: expected templates with {} once"):
        saved_words(values, "config.json")


def test_words_survive_a_record():
    words = Words(TWO, TOLD)
    assert saved_words(json.loads(json.dumps(to_json(words))), "here") == words


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name in NAMES:
        (root / name).mkdir()
        for number in range(6):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_a_run_keeps_its_words(pictures, tmp_path, monkeypatch, capsys):
    """Every later command answers from the run alone; the file is gone."""
    monkeypatch.setattr(figures, "plot_per_class", lambda *_: None)
    file, out = tmp_path / "d.csv", tmp_path / "run"
    rows = ["red_fox,a fox with a {} tail.", "red_fox,an animal.", "ox,a {}.", "yak,a yak."]
    file.write_text("\n".join(["class,description", *rows]))
    flags = {"data": "folder", "root": pictures, "method": "zeroshot", "clip": "tiny"}
    trained = Classifier.train(template=list(TWO), descriptions=file, out=out, **flags)
    told = capsys.readouterr().out
    assert '4 descriptions of 3 classes, else "a photo of a {}." and 1 more templates' in told
    file.unlink()
    files = sorted(pictures.glob("*/*.png"))[:3]
    loaded = Classifier.load(out)
    assert loaded.classify(files) == trained.classify(files)
    clip = loaded.method.clip
    words = Words(TWO, {"ox": ("a {}.",), "red fox": ("a fox with a {} tail.", "an animal.")})
    names = loaded.trained_names
    expected = ZeroShot(clip).prepare(names, TWO[0], Origin(words=words))
    assert torch.equal(loaded._classes(names), expected)
    assert evaluate.main(evaluate.EvaluateConfig(out)) == 0
    assert evaluate.main(evaluate.EvaluateConfig(out, data="folder", root=pictures)) == 0
    assert '"a photo of a {}.", tested only' in capsys.readouterr().out
    file.write_text("class,description\nox,a {}.\n")
    with pytest.raises(InputError, match=r"--descriptions .*: class 'red fox' has none, expected"):
        Classifier.train(descriptions=file, out=tmp_path / "other", **flags)
    with pytest.raises(InputError, match=r"--template .*: --method coop has a prompt of its own"):
        Classifier.train(**{**flags, "method": "coop"}, template=list(TWO), out=tmp_path / "other")
    with pytest.raises(InputError, match=r"--template: .*: expected one --template, for LAMP"):
        Classifier.train(**{**flags, "method": "lamp"}, template="imagenet-7", out=tmp_path / "o")
    assert not (tmp_path / "other").exists()


def test_one_template_is_what_it_was():
    """A run of before with one, or with none, goes on; flags take the place of a run's."""
    from lamp_fast.runs.config import default_config, from_saved, parse_flags, to_saved

    values = to_saved(training_settings({"data": "folder", "template": "a {}."}))
    assert values["data"]["template"] == ["a {}."]
    for before, now in (("a {}.", ("a {}.",)), (None, ())):
        saved = {**values, "data": {**values["data"], "template": before}}
        assert from_saved(saved, "config.json").data.template == now
    default = from_saved(values, "config.json")
    assert parse_flags(["--template", "x {}", "--template=y {}"], default).data.template == (
        "x {}",
        "y {}",
    )
    assert parse_flags([], default).data.template == ("a {}.",)
    assert default_config({}).data.template == ()
