"""2SFS: equations of both stages, what each of them changes, and which classes have a vector."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lamp_fast import evaluate, train
from lamp_fast.classifier import Classifier
from lamp_fast.clip.settings import Trimming
from lamp_fast.methods.fixed import without_parameters
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.methods.two_stage import CLASSIFIER, NORMS
from lamp_fast.runs import figures, parameters
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig, apply_preset, default_config
from lamp_fast.runs.experiment import assemble
from lamp_fast.runs.folder import LEARNED
from lamp_fast.runs.trainer import Trainer
from lamp_fast.tensors import load_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*never seen in the tiny")

# The same float64 numbers added up in another order: some hundred operations on values of order 1
# to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
NAMES = ("zero", "a very long name of some kind of bird", "cat", "cathedral")
TEMPLATE = "a photo of a {}, a type of pet."
TRIMMINGS = {
    "default": Trimming(),
    "as published": Trimming(as_published=True),
    "one switch each off": Trimming(share_tokens=False, last_row=False),
    "small sheets": Trimming(most_rows=12),
}


def build(clip, trimming=None, *, names=NAMES, **own):
    config = apply_preset(TrainConfig(), "2sfs")
    config = replace(config, own=replace(config.own, **own), trim=trimming or Trimming())
    torch.manual_seed(3)
    method = build_method(clip, config, RunClasses(names, ("ox",)))
    with torch.no_grad():
        for each in method.parameters():
            each.add_(0.2 * torch.randn_like(each))
    return method


def pictures(count=3):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator)


def literal_norm(norm, x):
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return centred / deviation * norm.weight + norm.bias


def literal_tower(blocks, norms, x, mask=None):
    for block, (first, second) in zip(blocks, norms, strict=True):
        normed = literal_norm(first, x)
        x = x + block.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        x = x + block.mlp(literal_norm(second, x))
    return x


def literal_text(method, names):
    """t_c of 77 tokens [C, Ds], normalised."""
    model, outer = method.clip.model, method.outer_norms
    ids = method.clip.tokenizer([TEMPLATE.replace("{}", name) for name in names])
    x = model.token_embedding(ids) + model.positional_embedding
    mask = torch.full((77, 77), float("-inf"), dtype=x.dtype).triu(1)
    x = literal_tower(model.transformer.resblocks, method.text_norms, x, mask)
    final = outer["final"] if outer else model.ln_final
    rows = literal_norm(final, x[torch.arange(len(ids)), ids.argmax(-1)])
    return F.normalize(rows @ model.text_projection, dim=-1)


def literal_pictures(method, images):
    """f [B, Ds], normalised."""
    visual, outer = method.clip.model.visual, method.outer_norms
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    cls = visual.class_embedding.expand(len(images), 1, -1)
    x = torch.cat([cls, patches], dim=1) + visual.positional_embedding
    x = literal_norm(outer["pre"] if outer else visual.ln_pre, x)
    x = literal_tower(visual.transformer.resblocks, method.vision_norms, x)
    rows = literal_norm(outer["post"] if outer else visual.ln_post, x[:, 0])
    return F.normalize(rows @ visual.proj, dim=-1)


@pytest.mark.parametrize("trimming", TRIMMINGS.values(), ids=TRIMMINGS)
@pytest.mark.parametrize("outer_norms", [True, False])
@pytest.mark.parametrize("stage", [NORMS, CLASSIFIER])
def test_equations(small_clip, trimming, outer_norms, stage):
    """Logits, loss and every gradient; what a stage leaves alone has none."""
    method = build(small_clip(), trimming, outer_norms=outer_norms)
    images, labels = pictures(), torch.tensor([0, 3, 1])
    classes = method.prepare(NAMES, TEMPLATE)
    method.enter_stage(stage, classes, first_epoch=False)
    step = method.step(images, labels, classes, F.cross_entropy)
    step.loss.backward()
    got = {name: each.grad for name, each in method.named_parameters()}
    method.zero_grad(set_to_none=True)
    rows = literal_text(method, NAMES) if stage == NORMS else F.normalize(method.weight, dim=-1)
    logits = method.clip.logit_scale * literal_pictures(method, images) @ rows.T
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    torch.testing.assert_close(step.logits, logits, **TOLERANCE)
    torch.testing.assert_close(step.loss, loss, **TOLERANCE)
    for name, each in method.named_parameters():
        trained = (name == "weight") == (stage == CLASSIFIER)
        assert each.requires_grad == trained, name
        if not trained:
            assert got[name] is None, name
            continue
        assert each.grad.abs().sum() > 0, name
        torch.testing.assert_close(got[name], each.grad, **TOLERANCE)


@pytest.mark.parametrize("trimming", TRIMMINGS.values(), ids=TRIMMINGS)
def test_trained_names_have_their_vector_and_others_the_learned_towers_text(small_clip, trimming):
    """In any order and any company, by name; of equal names each has its own."""
    names = ("missile", "ox", "missile", "hen")
    method, images = build(small_clip(), trimming, names=names), pictures()
    asked = ("gnu", "hen", "missile", "zebra", "missile")
    text = literal_text(method, asked)
    vectors = F.normalize(method.weight, dim=-1)
    rows = torch.stack([text[0], vectors[3], vectors[0], text[3], vectors[2]])
    expected = method.clip.logit_scale * literal_pictures(method, images) @ rows.T
    classes = method.prepare(asked, TEMPLATE)
    torch.testing.assert_close(method.logits(images, classes), expected.detach(), **TOLERANCE)
    sides = method.fixed_sides(without_parameters(method.clip), classes)
    got = method.clip.logit_scale * sides.pictures(images) @ sides.classes.T
    torch.testing.assert_close(got, expected.detach(), **TOLERANCE)
    with torch.no_grad():
        method.weight[3].neg_()
    moved = method.logits(images, classes)
    torch.testing.assert_close(moved[:, 1], -expected[:, 1].detach(), **TOLERANCE)


def test_the_classifier_starts_at_the_texts_of_the_first_stage(small_clip):
    method = build(small_clip())
    classes = method.prepare(NAMES, TEMPLATE)
    drawn = method.weight.detach().clone()
    method.enter_stage(NORMS, classes, first_epoch=True)
    method.enter_stage(CLASSIFIER, classes, first_epoch=False)
    assert torch.equal(method.weight, drawn)
    method.enter_stage(CLASSIFIER, classes, first_epoch=True)
    torch.testing.assert_close(method.weight.data, literal_text(method, NAMES).data, **TOLERANCE)


def test_it_starts_as_clip(small_clip):
    clip = small_clip()
    method = build_method(clip, apply_preset(TrainConfig(), "2sfs"), RunClasses(NAMES))
    images, ids = pictures(), clip.tokenizer([TEMPLATE.replace("{}", name) for name in NAMES])
    text = F.normalize(clip.model.encode_text(ids), dim=-1)
    expected = clip.logit_scale * F.normalize(clip.model.encode_image(images), dim=-1) @ text.T
    classes = method.prepare(NAMES, TEMPLATE)
    method.enter_stage(NORMS, classes, first_epoch=True)
    step = method.step(images, torch.tensor([0, 3, 1]), classes, F.cross_entropy)
    torch.testing.assert_close(step.logits, expected, **TOLERANCE)
    # Trained copies: CLIP's own stay as they are.
    for own, given in zip(method.text_norms[0], ("ln_1", "ln_2"), strict=True):
        frozen = getattr(clip.model.transformer.resblocks[0], given)
        assert own.weight.data_ptr() != frozen.weight.data_ptr()


@pytest.mark.parametrize(
    ("epochs", "share", "expected"),
    [
        (192, 0.6, (115, 77)),
        (10, 0.6, (6, 4)),
        (2, 0.6, (1, 1)),
        (1, 0.6, (0, 1)),
        (5, 0.0, (0, 5)),
        (5, 1.0, (4, 1)),
    ],
)
def test_stages(small_clip, epochs, share, expected):
    assert build(small_clip(), first_stage=share).stages(epochs) == expected


def test_a_clip_in_bfloat16_leaves_parameters_and_gradients_in_float32(small_clip):
    method = build(small_clip().to(torch.bfloat16))
    classes = method.prepare(NAMES, TEMPLATE)
    images, labels = pictures().bfloat16(), torch.tensor([0, 1, 2])
    for stage in (NORMS, CLASSIFIER):
        method.enter_stage(stage, classes, first_epoch=True)
        step = method.step(images, labels, classes, F.cross_entropy)
        step.loss.backward()
        assert step.logits.dtype == step.loss.dtype == torch.float32
    for name, each in method.named_parameters():
        assert each.dtype == each.grad.dtype == torch.float32, name
        assert torch.isfinite(each.grad).all(), name
    assert method.logits(images, method.prepare(("cat", "gnu"), TEMPLATE)).dtype == torch.float32


@pytest.mark.parametrize(("outer_norms", "norms"), [(True, 65_536), (False, 61_440)])
def test_parameters_on_vit_b_16(outer_norms, norms):
    """Of shapes alone, with 512 a trained class."""
    config = apply_preset(TrainConfig(), "2sfs")
    config = replace(
        config,
        clip=replace(config.clip, clip="ViT-B-16"),
        own=replace(config.own, outer_norms=outer_norms),
    )
    first, *parts = parameters.parameter_lines(config, trained_classes=50)
    assert first == f"trainable parameters: {norms + 50 * 512}"
    assert sum(int(line.rpartition(" ")[2]) for line in parts) == norms + 50 * 512


def test_published_settings():
    config = default_config({"method": "2sfs", "data": "caltech101"})
    optim = config.optim
    assert (optim.optimiser, optim.lr, optim.lr_end, optim.lr_per) == ("adamw", 2e-4, 1e-6, "step")
    assert (optim.weight_decay, optim.batch, optim.warmup_epochs) == (0.01, 32, 0)
    assert (config.own.first_stage, config.own.outer_norms) == (0.6, True)
    # 300 steps a shot, 16 pictures of each of 50 classes: 4,800 steps of 25 an epoch.
    assert (optim.epochs, config.own.epochs(800, 50, optim.batch)) == (None, 192)


CLASSES = ("bread", "cheese", "ham", "salad")  # two base, two new


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
def root(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("two_stage") / "pictures", CLASSES)


@pytest.fixture(scope="module", autouse=True)
def _no_drawings():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_curves", "plot_per_class"):
            patch.setattr(figures, name, lambda *_: None)
        yield


def parse(root, out, *flags):
    words = ["--method", "2sfs", "--data", "folder", "--root", str(root), "--split", "base-new"]
    words += ["--epochs", "5", "--batch", "3", "--threads", "1", "--out", str(out)]
    # Validation pictures would be taken from the few that are trained on.
    return train.read_flags([*words, "--clip", "tiny", "--validation", "off", *flags])


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_stage_run") / "run"
    assert train.main(parse(root, folder)) == 0
    return folder


@pytest.mark.parametrize("done", [1, 3, 4])
def test_a_run_stopped_in_either_stage_goes_on_to_the_same_bits(
    finished, root, tmp_path, monkeypatch, done
):
    """Three epochs of the first stage, two of the second: stopped inside each, and between."""
    epoch = Trainer._epoch

    def stop(trainer, number):
        if number == done:
            raise KeyboardInterrupt
        return epoch(trainer, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", stop)
        with pytest.raises(KeyboardInterrupt, match=f"stopped after epoch {done}"):
            train.main(parse(root, tmp_path / "run"))
    assert train.main(parse(root, tmp_path / "run", "--resume")) == 0
    expected, got = (load_tensors(each / LEARNED)[0] for each in (finished, tmp_path / "run"))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_the_optimiser_of_one_stage_has_no_part_in_the_other(root, tmp_path):
    """Each stage is a run of AdamW of its own, over its own parameters and cosine, written out."""
    torch.manual_seed(0)
    trainer = Trainer(assemble(parse(root, tmp_path / "run")), tmp_path / "run")
    method, optim = trainer.method, trainer.optim
    steps = len(trainer.batch_sizes)
    assert steps == 2
    moments, taken = {}, []
    take = trainer.optimiser.step

    def checked(*arguments):
        """One step, beside the equations of AdamW."""
        before = {name: each.detach().clone() for name, each in method.named_parameters()}
        gradients = {name: each.grad for name, each in method.named_parameters()}
        taken.append({name for name, each in gradients.items() if each is not None})
        stage = method.stage
        begun, length = ((0, 3), (3, 2))[stage]
        passed = (len(taken) - 1 - begun * steps) / (length * steps)
        rate = 1e-6 + (2e-4 - 1e-6) * 0.5 * (1 + math.cos(math.pi * passed))
        result = take(*arguments)
        for name, each in method.named_parameters():
            gradient = gradients[name]
            if gradient is None:
                assert torch.equal(each, before[name]), name
                continue
            count, first, second = moments.get(name, (0, 0.0, 0.0))
            count, first = count + 1, 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient.square()
            moments[name] = count, first, second
            root_mean = (second / (1 - 0.999**count)).sqrt() + 1e-8
            expected = before[name] * (1 - rate * 0.01)
            expected = expected - rate * first / (1 - 0.9**count) / root_mean
            # Float32 numbers of order 1 after ten roundings of 6e-8.
            torch.testing.assert_close(each.detach(), expected, rtol=1e-6, atol=1e-6)
        return result

    trainer.optimiser.step = checked
    trainer.folder.mkdir()
    for epoch in range(optim.epochs):
        trainer._epoch(epoch)
    norms = {name for name, _ in method.named_parameters()} - {"weight"}
    assert taken == [norms] * 6 + [{"weight"}] * 4


def test_new_classes_and_another_data_set(finished, tmp_path):
    """Every name has a score; a trained one keeps its vector there."""
    answers = Classifier.load(finished)
    classes = answers.method.prepare(("cheese", "zebra", "bread"), answers.template)
    assert (classes.known.tolist(), classes.unknown.tolist()) == ([0, 2], [1])
    assert classes.columns.tolist() == [1, 0]
    other = draw(tmp_path / "other", ("bread", "zebra"))
    assert evaluate.main(evaluate.EvaluateConfig(finished, data="folder", root=other)) == 0
    assert (finished / "on_folder" / "result.json").is_file()
