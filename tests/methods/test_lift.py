"""LIFT and LIFT+: equations, start, counts, and what becomes of classes that were not trained."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from training_sets import training_set

from lamp_fast import Classifier, evaluate, info, predict, train
from lamp_fast.clip.settings import Trimming
from lamp_fast.data.benchmark import build_benchmark
from lamp_fast.data.sources import load_source
from lamp_fast.errors import InputError
from lamp_fast.methods import METHODS, lift
from lamp_fast.methods.lift import LiftPlus, tuner_width
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.report import page
from lamp_fast.runs import parameters
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig, apply_preset, default_config
from lamp_fast.runs.optimisation import build_criterion

pytestmark = pytest.mark.filterwarnings("ignore:.*never seen in the tiny")

# The same float64 numbers added up in another order: some hundred operations on values of order 1
# to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
NAMES = ("zero", "polar_bear", "cat", "cathedral")
BOTH = ("lift", "lift+")


def build(name, clip, *, names=NAMES, trimming=None, **own):
    config = default_config({"method": name, "data": "digits"})
    config = replace(config, own=replace(config.own, **own), trim=trimming or Trimming())
    torch.manual_seed(3)
    return build_method(clip, config, RunClasses(names, ("ox",)))


def start(method, clip):
    """As before the first step of a run; of the pictures LIFT reads nothing."""
    source = load_source("digits", None, None, None)
    benchmark = build_benchmark(source, split="base-new", imb=4.0, cap=None, shots=4, seed=1)
    method.read_training_set(training_set(benchmark, clip, 3))
    return method


def felt(method):
    """The same with numbers that make every part felt: an adapter starts at 0."""
    with torch.no_grad():
        for each in method.parameters():
            each.add_(0.2 * torch.randn_like(each))
    return method


def pictures(count=3):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator)


def literal_features(method, images):
    """out = x + mlp(ln_2(x)) + g Up(relu(Down(LN(x)))), x the stream after attention; ln_post of
    the last cls."""
    visual = method.clip.model.visual
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    cls = visual.class_embedding.expand(len(images), 1, -1)
    x = visual.ln_pre(torch.cat([cls, patches], dim=1) + visual.positional_embedding)
    for block, own in zip(visual.transformer.resblocks, method.adapters, strict=True):
        x = x + block.attn(*[block.ln_1(x)] * 3, need_weights=False)[0]
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        normed = normed * own.norm.weight + own.norm.bias
        hidden = torch.relu(normed @ own.down.weight.T + own.down.bias)
        x = x + block.mlp(block.ln_2(x)) + own.scale * (hidden @ own.up.weight.T + own.up.bias)
    return visual.ln_post(x[:, 0])


@pytest.mark.parametrize(
    "trimming", [Trimming(), Trimming(last_row=False), Trimming(as_published=True)]
)
@pytest.mark.parametrize("name", BOTH)
def test_equations(small_clip, name, trimming):
    """Logits, logit-adjusted loss and every gradient."""
    method = felt(build(name, small_clip(), trimming=trimming, tuner_width=5))
    images, labels, counts = pictures(), torch.tensor([0, 3, 1]), (7, 1, 2, 4)
    optim = apply_preset(TrainConfig(), name).optim
    criterion = build_criterion(optim, counts, torch.device("cpu"))
    step = method.step(images, labels, method.prepare(NAMES, "{}"), criterion)
    step.loss.backward()
    got = {parameter: each.grad for parameter, each in method.named_parameters()}
    method.zero_grad(set_to_none=True)

    features = literal_features(method, images)
    logits = torch.stack(
        [25 * F.cosine_similarity(features, row[None], dim=-1) for row in method.head], dim=1
    )
    prior = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    loss = F.cross_entropy(logits + prior.log(), labels)
    loss.backward()
    torch.testing.assert_close(step.logits, logits, **TOLERANCE)
    torch.testing.assert_close(step.loss, loss, **TOLERANCE)
    scored = method.logits(images, method.prepare(NAMES, "{}"))
    torch.testing.assert_close(scored, logits, **TOLERANCE)
    for parameter, each in method.named_parameters():
        assert each.grad.abs().sum() > 0, parameter
        torch.testing.assert_close(got[parameter], each.grad, **TOLERANCE)


@pytest.mark.parametrize("name", BOTH)
def test_it_starts_as_zero_shot_but_for_a_factor_a_class(small_clip, name):
    """W_c = norm(P t_c), so the logit is 25 <f P, t_c> / (|f| |P t_c|); "_" is a space."""
    clip = small_clip()
    method = start(build(name, clip), clip)
    visual, images = clip.model.visual, pictures()
    prompts = [f"a photo of a {each.replace('_', ' ')}." for each in NAMES]
    text = clip.model.encode_text(clip.tokenizer(prompts))
    rows = text @ visual.proj.T
    torch.testing.assert_close(method.head.data, F.normalize(rows, dim=-1), **TOLERANCE)
    joint = clip.model.encode_image(images)
    with torch.no_grad():
        bare = literal_features(method, images)
    torch.testing.assert_close(joint, bare @ visual.proj, **TOLERANCE)
    expected = 25 * joint @ text.T / (bare.norm(dim=-1)[:, None] * rows.norm(dim=-1))
    got = method.logits(images, method.prepare(NAMES, "{}"))
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_the_two_draw_downs_weight_of_one_variance(small_clip):
    """Kaiming with a = sqrt 5: 1 / (3 fan_in); normal in LIFT's code, uniform in LIFT+'s."""
    weights = {}
    for name in BOTH:
        method = build(name, small_clip(), tuner_width=512)
        weights[name] = torch.cat([each.down.weight.flatten() for each in method.adapters])
        # Of 65,536 numbers the mean square is within 5 sqrt(2 / 65536) = 3% of the variance.
        assert weights[name].square().mean().item() == pytest.approx(1 / (3 * 32), rel=0.03)
        for each in method.adapters:
            still = (each.up.weight, each.up.bias, each.down.bias, each.norm.bias)
            assert all(bool((part == 0).all()) for part in still)
            assert each.scale.item() == 1
            assert bool((each.norm.weight == 1).all())
    # sqrt(3) deviations bound the uniform; a normal of so many goes beyond.
    bound = 32**-0.5
    assert weights["lift+"].abs().max() <= bound < weights["lift"].abs().max()


@pytest.mark.parametrize("layers", [1, 4, 12, 24])
def test_the_published_width(layers):
    for classes in range(1, 3000):
        power = math.floor(math.log2(classes / (2 * layers)))
        assert tuner_width(classes, layers) == 2 ** max(0, power)


# CIFAR-100, Places-LT, ImageNet-LT, iNaturalist 2018: classes, width, adapters, head.
PUBLISHED = [
    (100, 4, 101_436, 76_800),
    (365, 8, 175_212, 280_320),
    (1000, 32, 617_868, 768_000),
    (8142, 256, 4_749_324, 6_253_056),
]


def test_parameters_on_vit_b_16(monkeypatch):
    """Exactly, of shapes alone."""
    shapes = parameters.shapes_of("ViT-B-16")
    monkeypatch.setattr(parameters, "shapes_of", lambda name: shapes)
    for name in BOTH:
        for classes, width, adapters, head in PUBLISHED:
            assert tuner_width(classes, 12) == width
            lines = parameters.parameter_lines(
                apply_preset(TrainConfig(), name), trained_classes=classes
            )
            assert sorted(lines) == sorted(
                [
                    f"trainable parameters: {adapters + head}",
                    f"  adapters: {adapters}",
                    f"  head: {head}",
                ]
            )


def test_info_counts_trained_classes(capsys):
    wanted = {"method": "lift", "clip": "tiny", "trained_classes": 7}
    assert info.main(info.InfoConfig(**wanted)) == 0
    width = parameters.shapes_of("tiny").vision.width
    assert f"  head: {7 * width}" in capsys.readouterr().out.splitlines()


def test_pieces_of_a_batch_give_the_whole_batchs_gradient(small_clip):
    gradients = []
    for pieces in (1, 2):
        method = felt(build("lift", small_clip()))
        classes, labels = method.prepare(NAMES, "{}"), torch.tensor([0, 3, 1])
        method.accumulate(pictures(), labels, classes, F.cross_entropy, pieces, lambda loss: loss)
        gradients.append({name: each.grad for name, each in method.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, **TOLERANCE)


def test_a_clip_in_bfloat16_leaves_parameters_and_gradients_in_float32(small_clip):
    clip = small_clip().to(torch.bfloat16)
    method = start(build("lift", clip), clip)
    classes = method.prepare(NAMES, "{}")
    step = method.step(pictures().bfloat16(), torch.tensor([0, 1, 2]), classes, F.cross_entropy)
    step.loss.backward()
    assert step.logits.dtype == step.loss.dtype == torch.float32
    for name, each in method.named_parameters():
        assert each.dtype == each.grad.dtype == torch.float32, name
        assert torch.isfinite(each.grad).all(), name


def test_rows_are_found_by_name_and_of_equal_names_each_is_one(small_clip):
    names = ("missile", "ox", "missile", "hen")
    method = felt(build("lift", small_clip(), names=names))
    images = pictures()
    every = method.logits(images, method.prepare(names, "{}"))
    for asked, columns in (
        (("ox", "hen"), [1, 3]),
        (("hen", "missile", "ox", "missile"), [3, 0, 1, 2]),
        (["missile", "ox", "missile", "hen"], [0, 1, 2, 3]),
    ):
        got = method.logits(images, method.prepare(asked, "{}"))
        torch.testing.assert_close(got, every[:, columns], **TOLERANCE)
    for asked in (("ox", "zebra"), ("missile",) * 3):
        with pytest.raises(
            InputError, match="was not trained: the head has one row a trained class"
        ):
            method.prepare(asked, "{}")


@pytest.mark.parametrize(
    ("words", "epochs", "lr"),
    [
        ({"method": "lift"}, 10, 0.01),
        ({"method": "lift", "data": "inaturalist2018"}, 20, 0.01),
        ({"method": "lift+"}, 5, 0.02),
        ({"method": "lift+", "data": "inaturalist2018"}, 15, 0.02),
        ({"method": "lift+", "data": "caltech101", "split": "all"}, 5, 0.02),
    ],
)
def test_published_settings(words, epochs, lr):
    config = default_config(words)
    optim, views = config.optim, config.views
    assert (optim.epochs, optim.lr, optim.batch, optim.warmup_epochs) == (epochs, lr, 128, 0)
    assert (optim.optimiser, optim.weight_decay, optim.tau) == ("sgd", 5e-4, 1.0)
    assert optim.logit_adjustment
    assert (views.test_resize, views.tte, views.crop_area) == ("8/7", False, 0.08)
    plus = words["method"] == "lift+"
    assert views.interpolation == ("bicubic" if plus else "bilinear")
    assert views.augment == ("minimalist" if plus else "auto")


def test_the_two_are_one_but_for_what_is_published():
    own = {name for name in vars(LiftPlus) if not name.startswith("__")}
    assert own == {"entry", "start_down"}
    one, other = METHODS["lift"], METHODS["lift+"]
    assert replace(one, model=other.model, title=other.title, presets=other.presets) == other


def draw(root, names):
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in names:
            (root / part / name).mkdir(parents=True)
            for number in range(3):
                pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished base-to-new run: bread and cheese trained, ham and salad not."""
    folder = tmp_path_factory.mktemp("lift")
    root = draw(folder / "pictures", ("bread", "cheese", "ham", "salad"))
    words = ["--method", "lift", "--data", "folder", "--root", str(root), "--split", "base-new"]
    words += ["--epochs", "2", "--batch", "3", "--threads", "1", "--out", str(folder / "run")]
    words += ["--clip", "tiny"]
    assert train.main(train.read_flags(words)) == 0
    return folder / "run"


def lift_row(text):
    return next(line for line in text.splitlines() if line.startswith("| LIFT"))


def test_new_classes_have_no_scores(run, capsys):
    rows = json.loads((run / "result.json").read_text())
    assert [row["name"] for row in rows] == ["CLIP zero-shot", "LIFT"]
    assert rows[0]["acc_new"] is not None
    assert [rows[1][key] for key in ("acc_new", "hm_a", "f1_new", "hm_m")] == [None] * 4
    assert rows[1]["acc_base"] is not None
    assert "n/a" in lift_row((run / "table.md").read_text())
    lines = (run / "per_class.csv").read_text().splitlines()
    assert [line.endswith(",nan") for line in lines[1:]] == [False, False, True, True]
    assert evaluate.main(evaluate.EvaluateConfig(run)) == 0
    assert "n/a" in lift_row(capsys.readouterr().out)
    assert json.loads((run / "config.json").read_text())["settings"]["lift"] == {
        "tuner_width": None
    }


def test_its_report_is_made(run):
    assert "LIFT" in page.build_page(run)


def test_names_that_were_not_trained_are_refused(run, tmp_path):
    files = (run.parent / "pictures" / "test" / "bread",)
    message = "classes: '.*' was not trained: the head has one row a trained class, and no other"
    for words in ({"add": "zebra"}, {"classes": "all"}, {"classes": "bread,ham"}):
        with pytest.raises(InputError, match=message):
            predict.main(predict.PredictConfig(run, files, csv=tmp_path / "a.csv", **words))
    assert not (tmp_path / "a.csv").exists()
    assert predict.main(predict.PredictConfig(run, files, csv=tmp_path / "a.csv")) == 0


def test_another_data_set_is_one_of_trained_classes(run, tmp_path):
    """As ImageNet's variants are; any other is refused before a picture is encoded."""
    other = draw(tmp_path / "other", ("bread", "zebra"))
    with pytest.raises(InputError, match="classes: 'zebra' was not trained: the head"):
        evaluate.main(evaluate.EvaluateConfig(run, data="folder", root=other))
    assert not (run / "on_folder").exists()
    some = draw(tmp_path / "some", ("cheese", "bread"))
    assert evaluate.main(evaluate.EvaluateConfig(run, data="folder", root=some)) == 0
    rows = json.loads((run / "on_folder" / "result.json").read_text())
    assert [row["name"] for row in rows] == ["CLIP zero-shot on folder", "LIFT on folder"]


def test_text_has_no_part_in_prediction(run, tmp_path, monkeypatch):
    """Nothing is encoded to load, save, load again and answer."""

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(lift, "plain_text_features", refuse)
    classifier = Classifier.load(run)
    pictures = [np.full((9, 9, 3), 200, dtype=np.uint8)]
    (answer,) = classifier.classify(pictures)
    assert set(answer.names) == {"bread", "cheese"}
    classifier.save_pretrained(tmp_path / "saved")
    (again,) = Classifier.from_pretrained(tmp_path / "saved").classify(pictures)
    assert again == answer


def test_a_template_of_the_users_is_refused(run, tmp_path):
    config = train.read_flags(["--method", "lift+", "--template", "{} here"])
    with pytest.raises(InputError, match=r"--method lift\+ has a prompt of its own"):
        train.main(replace(config, out=tmp_path / "x"))
