"""The ``exact`` path against ``literal`` in float64: logits, losses, gradients, selections."""

import copy
import itertools
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
import under_test

from lamp_fast.clip.prompts import tokenise
from lamp_fast.clip.settings import Trimming
from lamp_fast.errors import InputError
from lamp_fast.methods.lamp.exact import TextEncoder
from lamp_fast.methods.lamp.model import Lamp
from lamp_fast.methods.lamp.prompts import LayerPrompts
from lamp_fast.methods.lamp.state import similarity_loss
from lamp_fast.methods.settings.lamp import LampSettings
from lamp_fast.methods.zeroshot import ZeroShot

# Both paths add up the same float64 numbers in another order: some hundred operations on values of
# order 1 to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}

READINGS = list(itertools.product(["mlp", "linear"], ["keys", "both"]))

CLASS_SETS = {
    "mixed": (["zero", "a very long name of some kind of bird", "cat"], "a photo of a {}."),
    "name first": (["striped", "polka dotted", "knitted"], "{} texture."),
    "one class": (["only"], "a photo of a {}."),
}
LAYERS = {"contiguous": (2, 3, 4), "gaps": (1, 3, 4), "last": (4,), "from the first": (1, 2, 3, 4)}


def lamp_pair(clip, config, seed=0):
    """The same LAMP on both paths, with biases that matter to the selection."""
    torch.manual_seed(seed)
    exact = Lamp(clip, config, "exact")
    literal = Lamp(clip, config, "literal")
    for balance in (exact.image_balance, exact.text_balance):
        balance.bias.normal_(std=0.05)
    for name, each in exact.prompts.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(each, std=0.1)
    literal.load_state_dict(exact.state_dict())
    return exact, literal


def run(lamp, images, labels, names, template):
    lamp.zero_grad(set_to_none=True)
    step = lamp.step(images, labels, lamp.prepare(names, template), F.cross_entropy)
    step.loss.backward()
    gradients = {name: each.grad for name, each in lamp.named_parameters()}
    return step, gradients


def assert_same(exact, literal, images, labels, names, template):
    (step, gradients), (expected, expected_gradients) = (
        run(lamp, images, labels, names, template) for lamp in (exact, literal)
    )
    torch.testing.assert_close(step.logits, expected.logits, **TOLERANCE)
    torch.testing.assert_close(step.loss, expected.loss, **TOLERANCE)
    for name, term in expected.terms.items():
        torch.testing.assert_close(step.terms[name], term, **TOLERANCE)
    for name, gradient in expected_gradients.items():
        # No path, no gradient on one side may be zeros on the other.
        got = gradients[name]
        zero = torch.zeros_like(exact.get_parameter(name))
        torch.testing.assert_close(
            zero if got is None else got,
            zero if gradient is None else gradient,
            **TOLERANCE,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert (step.observations is None) == (expected.observations is None)
    if step.observations is not None:
        assert torch.equal(step.observations.image, expected.observations.image)
        assert step.observations.image_rows == expected.observations.image_rows
        if expected.observations.text is not None:
            assert torch.equal(step.observations.text, expected.observations.text)
    return step, gradients


@pytest.mark.parametrize("text_query", ["image", "class"])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("classes", CLASS_SETS.values(), ids=CLASS_SETS)
@pytest.mark.parametrize(("phi", "similarity_gradient"), READINGS)
def test_exact_equals_literal(small_clip, text_query, layers, classes, phi, similarity_gradient):
    names, template = classes
    config = LampSettings(
        k=2,
        s=2,
        d=6,
        m=5,
        layers=layers,
        text_query=text_query,
        phi=phi,
        phi_hidden=32 if phi == "linear" else 7,
        similarity_gradient=similarity_gradient,
    )
    exact, literal = lamp_pair(small_clip(), config)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    labels = torch.tensor([0, len(names) - 1, 0])
    _, gradients = assert_same(exact, literal, images, labels, names, template)
    if len(names) > 1:
        assert all(gradient is not None for gradient in gradients.values())
        assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("text_query", ["image", "class"])
@pytest.mark.parametrize(("vision_layers", "text_layers"), [(5, 3), (3, 5)])
def test_towers_of_unequal_depth(small_clip, text_query, vision_layers, text_layers):
    """Further blocks of the longer tower carry no prompts."""
    config = LampSettings(k=2, s=1, d=6, m=4, layers=(1, 2, 3), text_query=text_query)
    exact, literal = lamp_pair(small_clip(vision_layers, text_layers), config)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_same(exact, literal, images, torch.tensor([1, 0]), *CLASS_SETS["mixed"])


@pytest.mark.parametrize(
    "change",
    [
        {"mpp": False},
        {"msp": False},
        {"lbo": False},
        {"phi_bias": False},
        {"phi_bias": False, "phi": "linear"},
        {"beta": 0.0},
        {"lbo_count": "unbiased"},
        {"k": 5},
        {"m": 1, "k": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("text_query", ["image", "class"])
def test_ablations(small_clip, change, text_query):
    settings = {"k": 2, "s": 2, "d": 6, "m": 5, "layers": (2, 3), "text_query": text_query}
    exact, literal = lamp_pair(small_clip(3, 3), LampSettings(**(settings | change)))
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert_same(exact, literal, images, torch.tensor([1, 0, 2]), *CLASS_SETS["mixed"])


@pytest.mark.parametrize("path", ["exact", "literal"])
def test_the_order_of_prompts_does_not_matter(small_clip, path):
    """Permuting the pool (and its bias) permutes nothing that a user sees."""
    config = LampSettings(k=3, s=2, d=6, m=6, layers=(2, 3))
    lamp = Lamp(small_clip(3, 3), config, path)
    lamp.image_balance.bias.normal_(std=0.05)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    classes = lamp.prepare(*CLASS_SETS["mixed"])
    before = lamp.logits(images, classes)
    order = torch.randperm(config.m)
    with torch.no_grad():
        lamp.image_balance.bias.copy_(lamp.image_balance.bias[:, order])
        for prompts in lamp.prompts.values():
            prompts.visual_pool.copy_(prompts.visual_pool[order])
            prompts.text_pool.copy_(prompts.text_pool[order])
            prompts.shared.copy_(prompts.shared.flip(0))
    torch.testing.assert_close(lamp.logits(images, classes), before, **TOLERANCE)


@pytest.mark.parametrize(("block", "most_rows"), [(1, 1), (2, 8), (5, 12), (1000, 16)])
def test_blocks_change_nothing(small_clip, block, most_rows):
    """Neither logits nor gradients; blocks of one image and one class, and of several of both."""
    config = LampSettings(k=2, s=1, d=6, m=5, layers=(2, 3))
    _, literal = lamp_pair(small_clip(3, 3), config)
    blocked = Lamp(literal.clip, config, trimming=Trimming(block=block, most_rows=most_rows))
    blocked.load_state_dict(literal.state_dict())
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1, 0])
    assert_same(blocked, literal, images, labels, *CLASS_SETS["mixed"])


SWITCHES = [each.name for each in fields(Trimming) if each.type is bool]


@pytest.mark.parametrize("text_query", ["image", "class"])
@pytest.mark.parametrize("off", [*SWITCHES, "all"])
def test_every_trimming_can_be_switched_off(small_clip, off, text_query):
    trimming = Trimming(**{name: False for name in SWITCHES if off in (name, "all")})
    config = LampSettings(k=2, s=2, d=6, m=5, layers=(2, 4), text_query=text_query)
    _, literal = lamp_pair(small_clip(4, 5), config)
    trimmed = Lamp(literal.clip, config, trimming=trimming)
    trimmed.load_state_dict(literal.state_dict())
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert_same(trimmed, literal, images, torch.tensor([1, 0, 2]), *CLASS_SETS["mixed"])


def test_images_with_equal_routes_share_and_still_differ(small_clip):
    """Two equal pictures, one that parts from them late, one of its own; in layers 1 to 3."""
    config = LampSettings(k=1, s=1, d=6, m=3, layers=(1, 2, 3))
    exact, literal = lamp_pair(small_clip(3, 3), config)
    first = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    images = torch.cat([first, first, first + 0.05, torch.randn_like(first)])
    assert_same(exact, literal, images, torch.tensor([1, 0, 2, 1]), *CLASS_SETS["mixed"])


@pytest.mark.parametrize("text_query", ["image", "class"])
def test_no_pictures(small_clip, text_query):
    config = LampSettings(k=2, s=1, d=6, m=5, layers=(2, 3), text_query=text_query)
    lamp = Lamp(small_clip(3, 3), config)
    classes = lamp.prepare(*CLASS_SETS["mixed"])
    assert lamp.logits(torch.zeros(0, 3, 16, 16, dtype=torch.float64), classes).shape == (0, 3)


def test_forward_moves_nothing(small_clip):
    lamp = Lamp(small_clip(3, 3), LampSettings(k=2, s=1, d=6, m=5, layers=(2, 3)))
    before = {name: each.clone() for name, each in lamp.state_dict().items()}
    lamp(torch.randn(4, 3, 16, 16, dtype=torch.float64), lamp.prepare(*CLASS_SETS["mixed"]))
    for name, each in lamp.state_dict().items():
        assert torch.equal(each, before[name]), name


def test_selections_count_rows_and_choices(small_clip):
    config = LampSettings(k=2, s=1, d=6, m=5, layers=(2, 3), text_query="class")
    lamp = Lamp(small_clip(3, 3), config)
    images = torch.randn(7, 3, 16, 16, dtype=torch.float64)
    selections = lamp(images, lamp.prepare(*CLASS_SETS["mixed"])).selections
    assert selections.image.sum(1).tolist() == [7 * 2, 7 * 2]
    assert selections.text.sum(1).tolist() == [3 * 2, 3 * 2]
    assert (selections.image_rows, selections.text_rows) == (7, 3)


def test_unbiased_counting_ignores_the_bias(small_clip):
    """Eq. 10 as printed: a bias that forces one entry in does not show in the counts."""
    counts = {}
    for count in ("biased", "unbiased"):
        config = LampSettings(k=1, s=1, d=6, m=5, layers=(2,), lbo_count=count)
        torch.manual_seed(0)
        lamp = Lamp(small_clip(3, 3), config)
        images = torch.randn(6, 3, 16, 16, dtype=torch.float64)
        plain = lamp(images, lamp.prepare(*CLASS_SETS["mixed"])).selections.image[0]
        unused = int(plain.argmin())
        lamp.image_balance.bias[0, unused] = 10.0
        counts[count] = lamp(images, lamp.prepare(*CLASS_SETS["mixed"])).selections.image[0]
        if count == "unbiased":
            assert torch.equal(counts[count], plain)
        else:
            assert counts[count][unused] == 6


@pytest.mark.parametrize("text_query", ["image", "class"])
@pytest.mark.parametrize("path", ["exact", "literal"])
@pytest.mark.parametrize("phi", ["mlp", "linear"])
def test_the_similarity_loss_moves_keys_or_tokens_too(small_clip, path, phi, text_query):
    """Under ``keys`` a layer's similarity reaches that layer's pool alone; under ``both`` the
    prompts below it as well: of both towers where text retrieves with its own token."""

    def moved(similarity_gradient):
        torch.manual_seed(0)
        config = LampSettings(
            k=2,
            s=1,
            d=6,
            m=5,
            layers=(2, 3),
            phi=phi,
            similarity_gradient=similarity_gradient,
            text_query=text_query,
        )
        lamp = Lamp(small_clip(3, 3), config, path)
        images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
        result = lamp(images, lamp.prepare(*CLASS_SETS["mixed"]))
        # Of the last layer alone: what it moves in the layer below must come through the tokens.
        similarity_loss(
            [each[-1] for each in (result.image_similarity, result.text_similarity) if each]
        ).backward()
        below, last = lamp.prompts["2"], lamp.prompts["3"]
        queried = ["visual_pool", *(["text_pool"] if text_query == "class" else [])]
        assert all(getattr(last, pool).grad.abs().sum() > 0 for pool in queried)
        return [
            getattr(below, pool).grad for pool in ["visual_pool", "text_pool", "shared"]
        ], queried

    gradients, _ = moved("keys")
    assert all(each is None or not each.any() for each in gradients)
    (visual, text, shared), queried = moved("both")
    assert visual.abs().sum() > 0
    assert shared.abs().sum() > 0
    assert (text is not None and bool(text.any())) == ("text_pool" in queried)


@pytest.mark.parametrize(("phi", "count"), [("mlp", 456_960), ("linear", 435_840)])
def test_default_parameter_count(phi, count):
    """ViT-B/16 widths, D=32, ten layers, M=20, S=2 (docs/mathematics.md, Parameter count)."""
    config = LampSettings(phi=phi)
    layer = LayerPrompts(config, 768, 512)
    assert len(config.layers) * sum(each.numel() for each in layer.parameters()) == count


def test_how_the_papers_count_comes_about():
    """Table 5 prints 470K: Eq. 8's bias counted as printed, R^{M x D} in both modalities."""
    config = LampSettings()
    layer = LayerPrompts(config, 768, 512)
    printed_bias = 2 * config.m * config.d
    numbers = sum(each.numel() for each in layer.parameters()) + printed_bias
    assert len(config.layers) * numbers == 469_760


def deviation(draws, std):
    """Standard deviations of n draws are within 5 / sqrt(2 n) of the truth."""
    assert draws.std().item() == pytest.approx(std, rel=5 / (2 * draws.numel()) ** 0.5)


def test_initialisation_of_a_linear_phi():
    """V, T, s ~ N(0, 0.02^2), phi ~ N(0, 1/D), biases 0."""
    torch.manual_seed(0)
    layer = LayerPrompts(LampSettings(m=256, s=64, d=64, phi="linear"), 768, 512)
    for each in (layer.visual_pool, layer.text_pool, layer.shared):
        deviation(each, 0.02)
    for phi in (layer.phi_v, layer.phi_t):
        deviation(phi.weight, 64**-0.5)
        assert not phi.bias.any()


def test_initialisation_of_a_perceptron_phi():
    """Every layer uniform within 1/sqrt(inputs) of 0, torch's default; keys start close together,
    since the biases are of the weights' size and V is small."""
    torch.manual_seed(0)
    lamp_layer = LayerPrompts(LampSettings(m=256, s=64, d=64, phi_hidden=48), 768, 512)
    for each in (lamp_layer.visual_pool, lamp_layer.text_pool, lamp_layer.shared):
        deviation(each, 0.02)
    for phi, width in ((lamp_layer.phi_v, 768), (lamp_layer.phi_t, 512)):
        first, activation, second = phi
        assert isinstance(activation, torch.nn.ReLU)
        assert (first.weight.shape, second.weight.shape) == ((48, 64), (width, 48))
        for linear in (first, second):
            bound = linear.in_features**-0.5
            assert linear.weight.abs().max() <= bound
            deviation(linear.weight, bound / 3**0.5)
            deviation(linear.bias, bound / 3**0.5)
    keys = F.normalize(lamp_layer.visual_rows()[:256], dim=-1)
    assert (keys @ keys.T).min() > 0.9


def test_zero_shot_is_open_clip(small_clip):
    """Text cut after eot and our blocks give open_clip's own logits."""
    clip = small_clip(3, 5)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    zero_shot = ZeroShot(clip)
    names, template = CLASS_SETS["mixed"]
    ids = tokenise(clip, names, template).ids
    image = F.normalize(clip.model.encode_image(images), dim=-1)
    text = F.normalize(clip.model.encode_text(ids), dim=-1)
    torch.testing.assert_close(
        zero_shot.logits(images, zero_shot.prepare(names, template)),
        clip.logit_scale * image @ text.T,
        **TOLERANCE,
    )


@pytest.mark.parametrize("path", ["exact", "literal"])
def test_prompts_change_the_logits(small_clip, path):
    clip = small_clip(3, 3)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    lamp = Lamp(clip, LampSettings(k=1, s=1, d=6, m=2, layers=(2, 3)), path)
    zero_shot = ZeroShot(clip)
    ours, plain = (
        method.logits(images, method.prepare(*CLASS_SETS["mixed"])) for method in (lamp, zero_shot)
    )
    assert (ours - plain).abs().max() > 1e-3


def test_layers_outside_the_towers_are_refused(small_clip):
    with pytest.raises(InputError, match=r"--layers 2\.\.4: .*1\.\.3"):
        Lamp(small_clip(3, 5), LampSettings(layers=(2, 3, 4)))


def test_adaptation_moves_only_the_new_bias(small_clip):
    config = LampSettings(k=2, s=1, d=6, m=8, layers=(2, 3), gamma=0.01, adapt_passes=20)
    lamp = Lamp(small_clip(3, 3), config)
    lamp.image_balance.bias.normal_(std=0.01)
    classes = lamp.prepare(*CLASS_SETS["mixed"])
    batches = [torch.randn(6, 3, 16, 16, dtype=torch.float64) for _ in range(3)]
    before = {name: each.clone() for name, each in lamp.state_dict().items()}
    log = lamp.adapt(batches, classes)
    changed = {
        name for name, each in lamp.state_dict().items() if not torch.equal(each, before[name])
    }
    assert changed == {
        "new_image_balance.bias",
        "new_image_balance.chosen",
        "new_image_balance.rows",
    }
    assert log["steps"] == 60
    assert sum(log["load_std_after"]) < sum(log["load_std_before"])
    base = lamp.logits(batches[0], classes)
    assert not torch.equal(lamp.logits(batches[0], classes, adapted=True), base)


def test_accumulated_text_selections_count_once(small_clip):
    """Pieces of one step see the same classes; their text selections are one set of rows."""
    config = LampSettings(k=2, s=1, d=6, m=5, layers=(2, 3), text_query="class")
    whole, pieces = (Lamp(small_clip(3, 3), config) for _ in range(2))
    pieces.load_state_dict(whole.state_dict())
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    classes = whole.prepare(*CLASS_SETS["mixed"])
    whole.after_step([whole(images, classes).selections], 0.0)
    pieces.after_step([pieces(part, classes).selections for part in images.chunk(3)], 0.0)
    for name, each in whole.state_dict().items():
        assert torch.equal(each, pieces.state_dict()[name]), name


@pytest.mark.parametrize("path", ["exact", "literal"])
@pytest.mark.parametrize("text_query", ["image", "class"])
def test_parameters_and_bias_stay_float32_under_a_bfloat16_clip(small_clip, path, text_query):
    clip = small_clip(3, 3).to(torch.bfloat16)
    lamp = Lamp(clip, LampSettings(k=2, s=1, d=6, m=5, layers=(2, 3), text_query=text_query), path)
    assert {each.dtype for each in lamp.parameters()} == {torch.float32}
    assert lamp.image_balance.bias.dtype == torch.float32
    images = torch.randn(3, 3, 16, 16).to(torch.bfloat16)
    step = lamp.step(
        images, torch.tensor([0, 1, 2]), lamp.prepare(*CLASS_SETS["mixed"]), F.cross_entropy
    )
    assert step.logits.dtype == step.loss.dtype == torch.float32
    step.loss.backward()
    assert all(torch.isfinite(each.grad).all() for each in lamp.parameters())


@pytest.mark.parametrize("text_query", ["image", "class"])
def test_in_bfloat16_the_ops_err_as_plain_torch(small_clip, text_query):
    """All prompts are taken, so that none is chosen otherwise in another precision."""

    def step(lamp, images):
        step, gradients = run(lamp, images, torch.tensor([0, 1, 2]), *CLASS_SETS["mixed"])
        all_gradients = torch.cat([each.flatten() for each in gradients.values()])
        return {"logits": step.logits.detach(), "gradients": all_gradients}

    settings = LampSettings(k=5, s=1, d=6, m=5, layers=(2, 3), text_query=text_query)
    draws = []
    for seed in range(5):
        torch.manual_seed(seed)
        clip = small_clip(3, 3, seed=seed).to(torch.bfloat16)
        lamp, exact = Lamp(clip, settings), Lamp(copy.deepcopy(clip).double(), settings)
        exact.load_state_dict(lamp.state_dict())
        images = torch.randn(3, 3, 16, 16).bfloat16()
        got, wanted = step(lamp, images), step(exact, images.double())
        with under_test.preferring("reference"):
            draws.append((got, step(lamp, images), wanted))
    under_test.assert_errs_as_eager(draws)


def test_paths_agree_over_random_settings(small_clip):
    """A seeded walk over K, S, M, layers, text queries, batch sizes and name lengths."""
    words = ["cat", "hummingbird", "of", "striped", "zebra", "42", "quokka's"]
    generator = torch.Generator().manual_seed(7)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    clip = small_clip(4, 3)
    for trial, text_query in itertools.product(range(4), ("image", "class")):
        m = draw(1, 7)
        layers = tuple(layer for layer in (1, 2, 3) if draw(0, 1)) or (2,)
        config = LampSettings(
            k=draw(1, m), s=draw(1, 3), d=draw(1, 8), m=m, layers=layers, text_query=text_query
        )
        exact, literal = lamp_pair(clip, config, seed=trial)
        names = [" ".join(words[draw(0, 6)] for _ in range(draw(1, 6))) for _ in range(draw(1, 4))]
        images = torch.randn(draw(1, 3), 3, 16, 16, dtype=torch.float64)
        labels = torch.tensor([draw(0, len(names) - 1) for _ in range(len(images))])
        template = ["a photo of a {}.", "{} texture.", "{}"][draw(0, 2)]
        assert_same(exact, literal, images, labels, names, template)


def test_accumulated_steps_share_one_text_pass(small_clip, monkeypatch):
    """``text_query=class``: one pass over the classes a step, and the gradients of the whole."""
    config = LampSettings(k=2, s=1, d=6, m=5, layers=(2, 3), text_query="class", beta=0.7)
    exact, _ = lamp_pair(small_clip(3, 3), config)
    images = torch.randn(7, 3, 16, 16, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1, 0, 2, 2])
    classes = exact.prepare(*CLASS_SETS["mixed"])
    passes = []
    original = TextEncoder.class_texts
    monkeypatch.setattr(TextEncoder, "class_texts", lambda *a: passes.append(a) or original(*a))
    results = {}
    for pieces in (1, 3):
        exact.zero_grad(set_to_none=True)
        passes.clear()
        steps = exact.accumulate(images, labels, classes, F.cross_entropy, pieces, lambda x: 8 * x)
        assert len(passes) == 1
        weights = [len(step.logits) / 7 for step in steps]
        loss = sum(w * step.loss for w, step in zip(weights, steps, strict=True))
        results[pieces] = loss, {name: each.grad for name, each in exact.named_parameters()}
    # A piece's loss leaves the text's similarity to the step as a whole, once.
    torch.testing.assert_close(results[1][0], results[3][0], **TOLERANCE)
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[3][1][name], gradient, **TOLERANCE)


def test_kept_text_follows_weights_bias_and_classes(small_clip, monkeypatch):
    config = LampSettings(k=2, s=1, d=6, m=5, layers=(2, 3), text_query="class")
    lamp, _ = lamp_pair(small_clip(3, 3), config)
    fresh = Lamp(lamp.clip, config, trimming=Trimming(cache_text=False))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    one, other = (lamp.prepare(*CLASS_SETS[name]) for name in ("mixed", "name first"))
    passes = []
    original = TextEncoder.class_texts
    monkeypatch.setattr(TextEncoder, "class_texts", lambda *a: passes.append(a) or original(*a))

    def check(classes, expected_passes, adapted=False):
        passes.clear()
        got = lamp.logits(images, classes, adapted)
        assert len(passes) == expected_passes
        fresh.load_state_dict(lamp.state_dict())
        torch.testing.assert_close(got, fresh.logits(images, classes, adapted), rtol=0, atol=0)

    check(one, 1)
    check(one, 0)
    check(other, 1)
    check(one, 0)
    optimiser = torch.optim.AdamW(lamp.parameters(), lr=0.1)
    lamp.step(images, torch.tensor([0, 1]), one, F.cross_entropy).loss.backward()
    optimiser.step()
    check(one, 1)
    lamp.text_balance.update(torch.tensor([[9, 0, 0, 0, 0]] * 2), rows=9, progress=0.0)
    check(one, 1)
    lamp.load_state_dict({name: each + 0.01 for name, each in lamp.state_dict().items()})
    check(one, 1)
    check(one, 1, adapted=True)
    check(one, 0, adapted=True)


@pytest.mark.parametrize("text_query", ["image", "class"])
def test_the_training_curve_is_literals(small_clip, text_query):
    """20 steps of AdamW and LBO in float64 on both paths."""
    config = LampSettings(k=2, s=2, d=6, m=8, layers=(2, 3), text_query=text_query, gamma=5e-3)
    both = lamp_pair(small_clip(3, 3), config)
    curves = []
    for lamp in both:
        generator = torch.Generator().manual_seed(1)
        classes = lamp.prepare(*CLASS_SETS["mixed"])
        optimiser = torch.optim.AdamW(lamp.parameters(), lr=3e-3)
        losses = []
        for number in range(20):
            images = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=generator)
            labels = torch.randint(3, (4,), generator=generator)
            optimiser.zero_grad()
            step = lamp.step(images, labels, classes, F.cross_entropy)
            step.loss.backward()
            optimiser.step()
            lamp.after_step([step.observations], number / 20)
            losses.append(step.loss.detach())
        curves.append(torch.stack(losses))
    torch.testing.assert_close(*curves, **TOLERANCE)
    for name, value in both[0].state_dict().items():
        torch.testing.assert_close(value, both[1].state_dict()[name], rtol=1e-7, atol=1e-7)
