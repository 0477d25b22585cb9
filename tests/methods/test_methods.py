"""The methods LAMP is compared with, each against its equations written out literally.

The statements run open_clip's own blocks on 77 tokens, in float64, and share nothing with what they
check but the parameters.
"""

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import under_test
from training_sets import training_set

from lamp_fast import info
from lamp_fast.clip.settings import Trimming
from lamp_fast.data.benchmark import Origin, build_benchmark
from lamp_fast.data.catalog import CATALOG
from lamp_fast.data.sources import load_source
from lamp_fast.data.transforms import evaluation_transform, five_crop_transform
from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.methods import METHODS
from lamp_fast.methods.base import Memo
from lamp_fast.methods.lfa import cross_validated_beta
from lamp_fast.methods.mma import TEMPLATE
from lamp_fast.methods.settings.maple import MapleSettings
from lamp_fast.methods.settings.mma import MmaSettings
from lamp_fast.methods.settings.tcp import TcpSettings
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs import parameters
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig, apply_preset, default_config
from lamp_fast.runs.settings import OptimConfig

# The same float64 numbers added up in another order: some hundred operations on values of order 1
# to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}

NAMES = ["zero", "a very long name of some kind of bird", "cat", "cathedral"]
OWN_TEMPLATE = "a photo of a {}, a type of pet."
TRIMMINGS = {
    "default": Trimming(),
    "as published": Trimming(as_published=True),
    "one switch each off": Trimming(share_tokens=False, last_row=False, prepare_text=False),
    "small sheets": Trimming(most_rows=12, block=3),
}
# Settings that make every part of a method felt, on towers of four layers and width 12.
SMALL = {
    "coop": {"n_ctx": 3, "ctx_init": "a photo of"},
    "cocoop": {"n_ctx": 3, "ctx_init": "a photo of"},
    "maple": {"n_ctx": 2, "depth": 3},
    "tcp": {"ctx_init": None, "n_ctx": 3},
    "mma": {"adapter_layers": (2, 4), "adapter_width": 5, "adapter_scale": 0.25},
    "lfa": {},
    "candle": {"fusion_heads": 3, "fusion_dropout": 0.0, "prototype_scale": 0.7},
    "tip": {"tip_alpha": 1.0, "tip_beta": 1.0},
    "tip-f": {"tip_alpha": 1.0, "tip_beta": 1.0},
    "clip-adapter": {},
    "zs-lp": {},
    "clap": {},
    "prolip": {},
}
COMPARED = sorted(SMALL)
TRAINED = sorted(SMALL.keys() - {"tip"})


def small_config(name, trimming=None, optim=None, **changes):
    config = default_config({"method": name, "data": "digits"})
    return replace(
        config,
        own=replace(config.own, **SMALL[name] | changes),
        optim=replace(config.optim, **optim or {}),
        trim=trimming or Trimming(),
    )


def build(name, clip, trimming=None, classes=None, **changes):
    torch.manual_seed(3)
    method = build_method(clip, small_config(name, trimming, **changes), classes)
    if name == "cocoop":
        # The bottleneck of so narrow a CLIP is one unit, which must not be dead.
        torch.nn.init.ones_(method.meta_net[0].bias)
    return method


def pictures(count=3):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator)


def gradients(method):
    return {name: each.grad for name, each in method.named_parameters()}


def text_tower(clip, x, before=lambda number, x: x, beside=None):
    """Rows [C, 77, Dt] that enter the first layer, position included, to rows behind the last."""
    mask = torch.full((77, 77), float("-inf"), dtype=x.dtype).triu(1)
    for number, block in enumerate(clip.model.transformer.resblocks, 1):
        x = before(number, x)
        added = 0 if beside is None else beside(number, block.ln_1(x))
        x = block(x, attn_mask=mask) + added
    return x


def image_tower(clip, x, before=lambda number, x: x, beside=None):
    """Rows [B, L, Dv] that enter the first layer to normalised features."""
    visual = clip.model.visual
    for number, block in enumerate(visual.transformer.resblocks, 1):
        x = before(number, x)
        added = 0 if beside is None else beside(number, block.ln_1(x))
        x = block(x) + added
    return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)


def embed_images(clip, images, further=None):
    """cls, patches, positions, then perhaps further rows, through the first LayerNorm."""
    visual = clip.model.visual
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    cls = visual.class_embedding.expand(len(images), 1, -1)
    x = torch.cat([cls, patches], dim=1) + visual.positional_embedding
    if further is not None:
        x = torch.cat([x, further.expand(len(images), -1, -1)], dim=1)
    return visual.ln_pre(x)


def read_text(clip, x, ids):
    eot = x[torch.arange(len(ids)), ids.argmax(-1)]
    return F.normalize(clip.model.ln_final(eot) @ clip.model.text_projection, dim=-1)


def words_in_front(clip, prompts, words):
    """Embedded prompts whose tokens 1..m are replaced, with positions: [C, 77, Dt], and ids."""
    ids = clip.tokenizer(prompts)
    x = clip.model.token_embedding(ids)
    words = words.expand(len(ids), -1, -1)
    x = torch.cat([x[:, :1], words, x[:, 1 + words.shape[1] :]], dim=1)
    return x + clip.model.positional_embedding, ids


def zero_shot_texts(clip, prompts):
    ids = clip.tokenizer(prompts)
    x = clip.model.token_embedding(ids) + clip.model.positional_embedding
    return read_text(clip, text_tower(clip, x), ids)


def features_of(clip, images):
    return image_tower(clip, embed_images(clip, images))


def literal_coop(method, images, labels, names):
    clip = method.clip
    x, ids = words_in_front(clip, [f"X X X {name}." for name in names], method.context)
    logits = (
        clip.logit_scale * features_of(clip, images) @ read_text(clip, text_tower(clip, x), ids).T
    )
    return logits, F.cross_entropy(logits, labels)


def literal_cocoop(method, images, labels, names):
    clip, rows = method.clip, []
    first, _, second = method.meta_net
    for feature in features_of(clip, images):
        shift = second.weight @ torch.relu(first.weight @ feature + first.bias) + second.bias
        prompts = [f"X X X {name}." for name in names]
        x, ids = words_in_front(clip, prompts, method.context + shift)
        rows.append(clip.logit_scale * read_text(clip, text_tower(clip, x), ids) @ feature)
    logits = torch.stack(rows)
    return logits, F.cross_entropy(logits, labels)


def literal_maple(method, images, labels, names):
    clip, words, count = method.clip, list(method.words), len(method.words[0])
    visual = [
        each @ phi.weight.T + phi.bias for each, phi in zip(words, method.projections, strict=True)
    ]
    x, ids = words_in_front(clip, [f"a photo of a {name}." for name in names], words[0])

    def deeper_words(number, x):
        if not 2 <= number <= len(words):
            return x
        new = words[number - 1].expand(len(x), -1, -1)
        return torch.cat([x[:, :1], new, x[:, 1 + count :]], dim=1)

    def deeper_rows(number, x):
        if not 2 <= number <= len(words):
            return x
        return torch.cat([x[:, :-count], visual[number - 1].expand(len(x), -1, -1)], dim=1)

    text = read_text(clip, text_tower(clip, x, deeper_words), ids)
    features = image_tower(clip, embed_images(clip, images, visual[0]), deeper_rows)
    logits = clip.logit_scale * features @ text.T
    return logits, F.cross_entropy(logits, labels)


def literal_tcp(method, images, labels, names):
    clip = method.clip
    known = zero_shot_texts(clip, [OWN_TEMPLATE.format(name) for name in names])
    hidden = known @ method.narrow.weight.T + method.narrow.bias
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    class_words = (hidden @ method.widen.weight.T + method.widen.bias).view(len(names), 3, -1)
    prompts = [f"X X X {name}, a type of pet." for name in names]
    x, ids = words_in_front(clip, prompts, method.context)

    def class_aware(number, x):
        # Index 8 of 12 blocks is the ninth; two thirds of four blocks are two, so the third.
        return torch.cat([x[:, :1], class_words, x[:, 4:]], dim=1) if number == 3 else x

    text = read_text(clip, text_tower(clip, x, class_aware), ids)
    logits = clip.logit_scale * features_of(clip, images) @ text.T
    distance = 1 - F.cosine_similarity(text, known, dim=-1).mean()
    return logits, F.cross_entropy(logits, labels) + 8.0 * distance


def literal_mma(method, images, labels, names):
    """The gradient rule by detached copies: x feels the adapter times s with constant weights, the
    weights feel it without s on a constant x."""
    clip, scale = method.clip, 0.25

    def adapter(weights, x):
        down, shared, up = weights
        hidden = torch.relu(x @ down[0].T + down[1])
        hidden = torch.relu(hidden @ shared[0].T + shared[1])
        return hidden @ up[0].T + up[1]

    def beside(side):
        def added(number, x):
            if number not in (2, 4):
                return 0
            own, layer = getattr(method, side)[str(number)], str(number)
            parts = (own.down, method.shared[layer], own.up)
            live = [(each.weight, each.bias) for each in parts]
            fixed = [(each.weight.detach(), each.bias.detach()) for each in parts]
            feels = adapter(live, x.detach())
            return scale * adapter(fixed, x) + feels - feels.detach()

        return added

    ids = clip.tokenizer([TEMPLATE.format(name) for name in names])
    x = clip.model.token_embedding(ids) + clip.model.positional_embedding
    text = read_text(clip, text_tower(clip, x, beside=beside("textual")), ids)
    features = image_tower(clip, embed_images(clip, images), beside=beside("visual"))
    logits = clip.logit_scale * features @ text.T
    return logits, F.cross_entropy(logits, labels)


LITERAL = {
    "coop": literal_coop,
    "cocoop": literal_cocoop,
    "maple": literal_maple,
    "tcp": literal_tcp,
    "mma": literal_mma,
}


def assert_equations_hold(name, method, names=NAMES):
    images, labels = pictures(), torch.tensor([0, len(names) - 1, 1])
    classes = method.prepare(names, OWN_TEMPLATE)
    step = method.step(images, labels, classes, F.cross_entropy)
    step.loss.backward()
    got = gradients(method)
    other = copy.copy(method)
    method.zero_grad(set_to_none=True)
    logits, loss = LITERAL[name](other, images, labels, names)
    loss.backward()
    torch.testing.assert_close(step.logits, logits, **TOLERANCE)
    torch.testing.assert_close(step.loss, loss, **TOLERANCE)
    torch.testing.assert_close(method.logits(images, classes), logits, **TOLERANCE)
    for parameter, expected in gradients(method).items():
        assert expected is not None, parameter
        assert expected.abs().sum() > 0, parameter
        torch.testing.assert_close(
            got[parameter], expected, **TOLERANCE, msg=lambda text, p=parameter: f"{p}: {text}"
        )


@pytest.mark.parametrize("trimming", TRIMMINGS.values(), ids=TRIMMINGS)
@pytest.mark.parametrize("name", LITERAL)
def test_equations(small_clip, name, trimming):
    """Logits, loss and every gradient, for every kind of trimming."""
    assert_equations_hold(name, build(name, small_clip(), trimming))


@pytest.mark.parametrize("depths", [(3, 4), (4, 3)])
def test_maple_over_towers_of_unequal_depth(small_clip, depths):
    """The shallower tower's last layer, which carries prompts, is not the other's."""
    assert_equations_hold("maple", build("maple", small_clip(*depths), depth=3))


def test_maple_through_every_layer(small_clip):
    """Depth = all layers, where no layer carries prompts on and cls alone is read behind the
    last."""
    assert_equations_hold("maple", build("maple", small_clip(), depth=4))
    assert_equations_hold("maple", build("maple", small_clip(), depth=1))


def test_maples_deeper_projections_start_alike(small_clip):
    method = build("maple", small_clip(), depth=4)
    first, second, *others = (each.weight for each in method.projections)
    assert not torch.equal(first, second)
    assert all(torch.equal(second, each) for each in others)


def test_learned_words_start_from_the_template(small_clip):
    clip = small_clip()
    ids = clip.tokenizer(["a photo of a"])[0]
    table = clip.model.token_embedding.weight
    assert torch.equal(build("coop", clip).context.data, table[ids[1:4]])
    assert torch.equal(build("maple", clip).words[0].data, table[ids[1:3]])


def test_mmas_weights_learn_as_if_the_scale_were_one(small_clip):
    """Identity forward; the gradient of the output weight is that of s = 1, of x that of s."""
    from lamp_fast.methods.mma import Adapter

    torch.manual_seed(0)
    shared = torch.nn.Linear(4, 4).double()
    small, plain = (Adapter(6, shared, scale).double() for scale in (1e-3, 1.0))
    small.load_state_dict(plain.state_dict())
    results = []
    for adapter in (small, plain):
        x = torch.arange(12, dtype=torch.float64).view(2, 6).requires_grad_()
        y = adapter(x)
        y.sum().backward()
        results.append((y, x.grad, adapter.down.weight.grad, adapter.up.weight.grad))
    (y, x_grad, down, up), (y1, x1, down1, up1) = results
    torch.testing.assert_close(y, 1e-3 * y1)
    torch.testing.assert_close(x_grad, 1e-3 * x1)
    torch.testing.assert_close(down, down1)
    torch.testing.assert_close(up, up1)
    assert up1.abs().sum() > 0


@pytest.mark.parametrize(("depth", "layer"), [(12, 9), (6, 5), (4, 3), (1, 1)])
def test_tcps_layer_is_two_thirds_down(small_clip, depth, layer):
    method = build("tcp", small_clip(2, depth))
    assert method.layer == layer
    assert method.resolved(TcpSettings()).knowledge_layer == layer


def test_layers_are_cut_to_the_shallower_tower_and_recorded(small_clip):
    clip = small_clip(6, 8)
    mma = build("mma", clip, adapter_layers=tuple(range(5, 13)))
    assert mma.resolved(MmaSettings()).adapter_layers == (5, 6)
    maple = build("maple", clip, depth=9)
    assert maple.resolved(MapleSettings()).depth == 6
    with pytest.raises(InputError, match=r"--adapter-layers 5\.\.7: expected layers within 1\.\.6"):
        build("mma", clip, adapter_layers=(5, 6, 7))
    with pytest.raises(InputError, match="--depth 7: expected at most 6"):
        build("maple", clip, depth=7)
    with pytest.raises(InputError, match="--knowledge-layer 11: expected at most 8"):
        build("tcp", clip, knowledge_layer=11)
    with pytest.raises(InputError, match="--ctx-init 'a photo': 2 tokens, expected at least"):
        build("coop", clip, ctx_init="a photo")
    with pytest.raises(InputError, match="--fusion-heads 5: expected a divisor"):
        build("candle", clip, fusion_heads=5)


@pytest.mark.parametrize("name", ["coop", "maple", "tcp", "mma"])
def test_kept_text_follows_every_change(small_clip, name):
    """An optimiser's step, a load and other classes: never yesterday's text."""
    method = build(name, small_clip())
    images, classes = pictures(), method.prepare(NAMES, OWN_TEMPLATE)
    optimiser = torch.optim.SGD(method.parameters(), lr=0.1)
    state = copy.deepcopy(method.state_dict())
    before = method.logits(images, classes)
    method.step(images, torch.tensor([0, 1, 2]), classes, F.cross_entropy).loss.backward()
    optimiser.step()
    after = method.logits(images, classes)
    assert not torch.allclose(after, before)
    fresh = build(name, method.clip)
    fresh.load_state_dict(method.state_dict())
    assert torch.equal(fresh.logits(images, fresh.prepare(NAMES, OWN_TEMPLATE)), after)
    method.load_state_dict(state)
    assert torch.equal(method.logits(images, classes), before)
    fewer = method.prepare(NAMES[:2], OWN_TEMPLATE)
    torch.testing.assert_close(method.logits(images, fewer), before[:, :2], **TOLERANCE)


def test_what_is_kept_belongs_to_its_owner():
    """Threads that ask at once get each their own; a value goes with its owner."""
    kept, owners = Memo(), [frozenset({number}) for number in range(4)]
    together = threading.Barrier(len(owners))

    def ask(owner):
        def compute():
            together.wait(60)
            return set(owner)

        return kept.get(owner, (), compute)

    with ThreadPoolExecutor(len(owners)) as threads:
        first = list(threads.map(ask, owners))
        assert first == owners
        assert all(one is other for one, other in zip(threads.map(ask, owners), first, strict=True))
    gone = weakref.ref(first.pop())
    owners.pop()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", TRAINED)
def test_pieces_of_a_batch_give_the_whole_batchs_gradient(small_clip, name):
    clip = small_clip()
    results = []
    for pieces in (1, 2):
        method, training, images, labels = ready(name, clip, batch=3)
        if name == "lfa":
            method.config = replace(method.config, feature_noise=0.0, feature_dropout=0.0)
        classes = method.prepare(training.benchmark.base_names, training.benchmark.template)
        method.accumulate(images, labels, classes, F.cross_entropy, pieces, lambda loss: loss)
        results.append(gradients(method))
    for parameter, expected in results[0].items():
        torch.testing.assert_close(results[1][parameter], expected, **TOLERANCE)


@pytest.mark.parametrize("name", COMPARED)
def test_a_prediction_does_not_depend_on_its_batch(small_clip, name):
    method, training, _, _ = ready(name, small_clip(), batch=3)
    classes = method.prepare(training.benchmark.new_names, training.benchmark.template)
    images = pictures(4)
    alone = torch.cat([method.logits(each[None], classes) for each in images])
    torch.testing.assert_close(method.logits(images, classes), alone, **TOLERANCE)


@pytest.fixture(scope="module")
def few_digits():
    """A long tail of 4 to 1 training pictures."""
    source = load_source("digits", None, None, None)
    return build_benchmark(source, split="base-new", imb=4.0, cap=None, shots=4, seed=1)


FEW = {}


@pytest.fixture(autouse=True)
def _hold(few_digits):
    FEW["benchmark"] = few_digits


def ready(name, clip, batch, **groups):
    """A method that has looked at a small training set, and a batch it can train on."""
    benchmark = FEW["benchmark"]
    method = build(
        name, clip, None, RunClasses(benchmark.base_names, benchmark.new_names), **groups
    )
    training = training_set(benchmark, clip, batch)
    batches = method.read_training_set(training)
    labels = torch.tensor([4, 0, 1])
    images = pictures()
    if batches is not None:
        images, labels, _ = next(batches.epoch(0))
        images = images.double()
    return method, training, images, labels


def training_pictures(benchmark, transform):
    return torch.stack([transform(benchmark.train.load(i)) for i in range(len(benchmark.train))])


def test_candles_equations(small_clip, few_digits):
    """One sequence a picture, [f W_i; v W_i; t W_t], in which prototypes do not see the picture."""
    clip, names = small_clip(), (*few_digits.base_names, *few_digits.new_names)
    method, _, images, labels = ready("candle", clip, batch=3)
    classes = method.prepare(few_digits.base_names, few_digits.template)
    with torch.no_grad():
        for each in (method.image_projection, method.text_projection, method.virtual):
            each.add_(0.1 * torch.randn_like(each))
    step = method.step(images, labels, classes, F.cross_entropy)
    step.loss.backward()
    got = gradients(method)
    method.zero_grad(set_to_none=True)

    visual = clip.model.visual
    encode = clip.model.encode_image
    train = encode(training_pictures(few_digits, evaluation_transform(clip.preprocessing)).double())
    train_labels = torch.tensor(few_digits.train.labels)
    means = torch.stack([train[train_labels == label].mean(0) for label in range(5)])
    texts = clip.model.encode_text(clip.tokenizer([few_digits.template.format(n) for n in names]))
    assert visual.proj.shape[1] == texts.shape[1]
    v = torch.cat([means, method.virtual]) @ method.image_projection
    t = texts @ method.text_projection
    n = len(names)
    hidden = torch.zeros(1 + 2 * n, 1 + 2 * n, dtype=torch.bool)
    hidden[1:, 0] = True

    def fuse(f):
        rows = F.layer_norm(torch.cat([f[None], v, t]), (12,), method.norm.weight, method.norm.bias)
        attended, _ = method.attention(rows[None], rows[None], rows[None], attn_mask=hidden)
        return rows + method.ratio * attended[0]

    def cos(a, b):
        return F.cosine_similarity(a[:, None], b[None], dim=-1)

    f = encode(images) @ method.image_projection
    fused = [fuse(each) for each in f]
    fused_v, fused_t = fused[0][1 : 1 + n], fused[0][1 + n :]
    for each in fused[1:]:
        torch.testing.assert_close(each[1:], fused[0][1:], **TOLERANCE)
    after = torch.cat([torch.stack([each[0] for each in fused]), fused_v])
    scale = clip.logit_scale
    scores = (
        scale * cos(torch.cat([f, v]), t),
        scale * cos(after, fused_t),
        0.7 * scale * cos(after, fused_v),
    )
    sizes = train_labels.bincount().tolist()
    assert len(set(sizes)) > 1
    prior = torch.tensor([size + 1 for size in sizes] + [1] * 5, dtype=torch.float64)
    targets = torch.cat([labels, torch.arange(n)])
    loss = sum(F.cross_entropy(each + (prior / prior.sum()).log(), targets) for each in scores)
    loss.backward()
    torch.testing.assert_close(step.loss, loss, **TOLERANCE)
    torch.testing.assert_close(step.logits, (scores[1] + scores[2])[:3], **TOLERANCE)
    for parameter, expected in gradients(method).items():
        torch.testing.assert_close(got[parameter], expected, **TOLERANCE)
    # Base is tested over base names alone, new over new.
    predicted = method.logits(images, classes)
    torch.testing.assert_close(predicted, (scores[1] + scores[2])[:3, :5], **TOLERANCE)
    new = method.logits(images, method.prepare(few_digits.new_names[::-1], few_digits.template))
    torch.testing.assert_close(new, (scores[1] + scores[2])[:3, 5:].flip(1), **TOLERANCE)


def test_candles_virtual_prototypes_start_at_the_text(small_clip, few_digits):
    clip = small_clip()
    method, _, images, _ = ready("candle", clip, batch=3)
    prompts = [few_digits.template.format(name) for name in few_digits.new_names]
    texts = clip.model.encode_text(clip.tokenizer(prompts))
    torch.testing.assert_close(method.virtual.data, texts, **TOLERANCE)
    # So a name that the run did not know is one that it knew and has not trained yet.
    known = build(
        "candle", clip, None, RunClasses(few_digits.base_names, (*few_digits.new_names, "ox"))
    )
    known.load_state_dict(
        method.state_dict()
        | {
            "virtual": torch.cat(
                [
                    method.virtual.data,
                    clip.model.encode_text(clip.tokenizer([few_digits.template.format("ox")])),
                ]
            ),
            "counts": torch.cat([method.counts, torch.ones(1, dtype=torch.int64)]),
        }
    )
    asked = ("zero", "ox")
    torch.testing.assert_close(
        method.logits(images, method.prepare(asked, few_digits.template)),
        known.logits(images, known.prepare(asked, few_digits.template)),
        **TOLERANCE,
    )


def test_lfas_equations(small_clip, few_digits):
    clip = small_clip()
    method, training, features, labels = ready("lfa", clip, batch=1 << 20)
    crops = training_pictures(few_digits, five_crop_transform(clip.preprocessing)).double()
    every = F.normalize(clip.model.encode_image(crops.flatten(0, 1)), dim=-1)
    texts = zero_shot_texts(clip, [few_digits.template.format(n) for n in few_digits.base_names])
    train_labels = torch.tensor(few_digits.train.labels)
    targets = texts[train_labels].repeat_interleave(5, dim=0)
    rotation, _ = scipy.linalg.orthogonal_procrustes(every.numpy(), targets.detach().numpy())
    start = 0.1 * torch.from_numpy(rotation) + 0.9 * torch.eye(12, dtype=torch.float64)
    # Five classes fix five directions of a rotation of twelve.
    torch.testing.assert_close(method.weight.data @ texts.T, start @ texts.T, **TOLERANCE)
    identity = torch.eye(12, dtype=torch.float64)
    rotation = (method.weight.data - 0.9 * identity) / 0.1
    torch.testing.assert_close(rotation @ rotation.T, identity, **TOLERANCE)

    # Of an iteration one crop, of every picture.
    order = next(training_batches_of(method, training).epoch(0))[2]
    chosen = every.view(-1, 5, 12)[order]
    crop = [c for c in range(5) if torch.allclose(chosen[:, c], features, atol=1e-12)]
    assert crop
    assert torch.equal(labels, train_labels[order])

    method.config = replace(method.config, feature_noise=0.0, feature_dropout=0.0)
    classes = method.prepare(few_digits.base_names, few_digits.template)
    step = method.step(features, labels, classes, F.cross_entropy)
    step.loss.backward()
    got = method.weight.grad
    method.zero_grad()
    total = 0.0
    for feature, label in zip(features, labels.tolist(), strict=True):
        mapped = F.normalize(feature @ method.weight, dim=0)
        distances = torch.stack([(mapped - text).norm() for text in texts])
        for j in distances.argsort()[:3].tolist():
            margin = (1 - texts[label] @ texts[j]) / 4
            total = total + torch.relu(distances[label] + margin - distances[j])
    loss = total / (3 * len(features))
    loss.backward()
    torch.testing.assert_close(step.loss, loss, **TOLERANCE)
    torch.testing.assert_close(got, method.weight.grad, **TOLERANCE)
    assert got.abs().sum() > 0

    images, base = pictures(), few_digits.base_names
    for names, origin, weight in (
        (base, Origin(), method.weight),
        (base, few_digits.origin, method.weight),
        (few_digits.new_names, few_digits.origin, method.ema),
        ((*base, "ox"), Origin(), method.ema),
        (base, Origin("digits", target=True), method.ema),
    ):
        y = zero_shot_texts(clip, [few_digits.template.format(name) for name in names])
        f = F.normalize(features_of(clip, images) @ weight, dim=-1)
        torch.testing.assert_close(
            method.logits(images, method.prepare(names, few_digits.template, origin)),
            clip.logit_scale * f @ y.T,
            **TOLERANCE,
        )


def test_lfas_cross_validated_start_is_of_the_centre_crops(small_clip, few_digits):
    clip = small_clip()
    torch.manual_seed(3)
    method = build("lfa", clip, procrustes_beta=None, classes=RunClasses(few_digits.base_names))
    method.read_training_set(training_set(few_digits, clip, 1 << 20))
    centre = training_pictures(few_digits, evaluation_transform(clip.preprocessing)).double()
    f = F.normalize(clip.model.encode_image(centre), dim=-1)
    texts = zero_shot_texts(clip, [few_digits.template.format(n) for n in few_digits.base_names])
    labels = torch.tensor(few_digits.train.labels)
    beta = cross_validated_beta(f, texts, labels, seed=1)
    rotation, _ = scipy.linalg.orthogonal_procrustes(f.numpy(), texts[labels].detach().numpy())
    start = (1 - beta) * torch.from_numpy(rotation) + beta * torch.eye(12, dtype=torch.float64)
    assert beta < 1  # else any crops would give the identity
    # Five classes fix five directions of a rotation of twelve.
    torch.testing.assert_close(method.weight.data @ texts.T, start @ texts.T, **TOLERANCE)


@pytest.mark.parametrize("data", ["imagenet", "imagenetv2", "imagenet_a"])
def test_lfas_imagenet_texts_are_means_over_eight_templates(small_clip, data):
    """Of normalised features; one template for all else, and for a template of the user's."""
    clip = small_clip()
    method, template = build("lfa", clip), "a photo of a {}."
    templates = method.templates(template, Origin(data))
    assert len(set(templates)) == 8
    assert template in templates
    every = [zero_shot_texts(clip, [each.format(name) for name in NAMES]) for each in templates]
    expected = F.normalize(sum(every) / 8, dim=-1)
    got = method.prepare(NAMES, template, Origin(data)).texts
    torch.testing.assert_close(got, expected, **TOLERANCE)
    for origin in (Origin(), Origin("dtd")):
        assert method.templates(template, origin) == (template,)
        alone = zero_shot_texts(clip, [template.format(name) for name in NAMES])
        got = method.prepare(NAMES, template, origin).texts
        torch.testing.assert_close(got, alone, **TOLERANCE)


@pytest.mark.parametrize(
    ("data", "known", "learned"),
    [
        ("dtd", "a photo of a {}, a type of texture.", "a a a a {} texture."),
        ("fgvc_aircraft", "a photo of an aircraft {}.", "a a a a {}, a type of aircraft."),
        ("food101", "a photo of a {}, a type of food.", "a a a a {}, a type of food."),
        ("stanford_cars", "a photo of a {}.", "a a a a {}, a type of car"),
        ("ucf101", "a photo of a person doing {}.", "a a a a person doing {}."),
        ("eurosat", "a centered satellite photo of {}.", "a a a a {}."),
    ],
)
def test_tcps_prompts_are_published_by_data_set(small_clip, data, known, learned):
    """Before "{}" stand four tokens that the learned words replace."""
    method, template = build("tcp", small_clip(), n_ctx=4), CATALOG[data].template
    assert method.templates(template, Origin(data)) == (known, learned)
    # Of other data, or with the user's own: what was asked for, and no exception.
    rest = template[template.index("{}") :]
    for origin in (Origin(), Origin("folder")):
        assert method.templates(template, origin) == (template, f"a a a a {rest}")


def training_batches_of(method, training):
    return method.read_training_set(training)


def test_lfas_average(small_clip):
    """Momentum 0.9 + 0.1 (1 - exp(-5 clip(i, h) / h)), from the identity, over n = 7 iterations."""
    method = build("lfa", small_clip(), optim={"epochs": 7})
    expected = torch.eye(12, dtype=torch.float64)
    for iteration in range(7):
        with torch.no_grad():
            method.weight.add_(0.1 * torch.randn_like(method.weight))
        method.after_step([None], iteration / 7)
        momentum = 0.9 + 0.1 * (1 - torch.exp(torch.tensor(-5.0 * min(iteration, 3) / 3)).item())
        expected = momentum * expected + (1 - momentum) * method.weight.detach()
        # The momentum's exponential is of float32.
        torch.testing.assert_close(method.ema, expected, rtol=1e-6, atol=1e-6)


def test_lfas_beta_is_chosen_on_held_out_training_features():
    """Rotated class texts want beta 0; class texts as they are want no rotation at all."""
    generator = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(6, 8, generator=generator, dtype=torch.float64), dim=-1)
    labels = torch.arange(60) % 6
    noise = 0.02 * torch.randn(60, 8, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    rotated = F.normalize(texts[labels] @ rotation.T + noise, dim=-1)
    assert cross_validated_beta(rotated, texts, labels, seed=1) < 0.5
    few = F.normalize(texts[labels] + 40 * noise, dim=-1)
    assert cross_validated_beta(few[:12], texts, labels[:12], seed=1) > 0.0


@pytest.mark.parametrize("name", METHODS)
def test_entry_and_model_name_each_other(name):
    assert METHODS[name].load().entry is METHODS[name]


@pytest.mark.parametrize(
    ("optim", "flag"),
    [
        ({"logit_adjustment": True}, "--logit-adjustment: "),
        *(({"loss": name}, f"--loss {name}: ") for name in ("la", "ldam", "lade")),
        ({"class_weights": "auto"}, "--class-weights: "),
    ],
)
@pytest.mark.parametrize("name", ["lfa", "candle"])
def test_other_losses_are_refused_where_a_method_has_its_own(name, optim, flag):
    with pytest.raises(InputError) as error:
        validate(TrainConfig(method=name, optim=OptimConfig(**optim)))
    assert str(error.value) == flag + METHODS[name].own_loss


@pytest.mark.parametrize("name", TRAINED)
def test_a_clip_in_bfloat16_leaves_parameters_and_gradients_in_float32(small_clip, name):
    clip = small_clip().to(torch.bfloat16)
    method, training, images, labels = ready(name, clip, batch=3)
    classes = method.prepare(training.benchmark.base_names, training.benchmark.template)
    step = method.step(images.bfloat16(), labels, classes, F.cross_entropy)
    step.loss.backward()
    assert torch.isfinite(step.loss)
    assert step.logits.dtype == step.loss.dtype == torch.float32
    for parameter, each in method.named_parameters():
        assert each.dtype == torch.float32, parameter
        assert torch.isfinite(each.grad).all(), parameter
    new = method.prepare(training.benchmark.new_names, training.benchmark.template)
    logits = method.logits(pictures(4).bfloat16(), new)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


# CLIP-Adapter's bottleneck over so narrow a CLIP is dead in some draws: no gradient to compare.
@pytest.mark.parametrize("name", sorted(set(TRAINED) - {"clip-adapter"}))
def test_in_bfloat16_the_ops_err_as_plain_torch(small_clip, name):
    def step(method, images, labels):
        method.zero_grad(set_to_none=True)
        classes = method.prepare(FEW["benchmark"].base_names, FEW["benchmark"].template)
        step = method.step(images, labels, classes, F.cross_entropy)
        step.loss.backward()
        all_gradients = torch.cat([each.flatten() for each in gradients(method).values()])
        return {"logits": step.logits.detach(), "gradients": all_gradients}

    draws = []
    for seed in range(5):
        clip = small_clip(seed=seed).to(torch.bfloat16)
        method, _, images, labels = ready(name, clip, batch=3)
        exact = ready(name, copy.deepcopy(clip).double(), batch=3)[0]
        exact.load_state_dict(method.state_dict())
        images = images.bfloat16()
        got, wanted = step(method, images, labels), step(exact, images.double(), labels)
        with under_test.preferring("reference"):
            draws.append((got, step(method, images, labels), wanted))
    under_test.assert_errs_as_eager(draws)


# Of the papers, or worked out in their public code, for ViT-B/16.
PARAMETERS = {
    "coop": 2_048,
    "coop-all": 8_192,
    "cocoop": 35_360,
    "maple": 3_555_072,
    "tcp": 331_904,
    "mma": 674_560,
    "candle": 1_575_937 + 7 * 512,
    "lfa": 262_144,
    "tip": 0,
    "tip-f": 0,  # 512 a training picture, of which there are none here
    "clip-adapter": 131_072,
    "prolip": 393_216,
    "table16-imb": 456_960,
}


def test_trainable_parameters_on_vit_b_16(monkeypatch):
    """Exactly, of shapes alone; seven new classes."""
    shapes = parameters.shapes_of("ViT-B-16")
    monkeypatch.setattr(parameters, "shapes_of", lambda name: shapes)
    for preset, expected in PARAMETERS.items():
        config = apply_preset(TrainConfig(), preset)
        first, *parts = parameters.parameter_lines(config, new_classes=7)
        assert first == f"trainable parameters: {expected}"
        assert sum(int(line.rpartition(" ")[2]) for line in parts) == expected


@pytest.mark.parametrize(("name", "each"), [("linear-probe", 513), ("lp++", 514)])
def test_parameters_of_each_trained_class(name, each):
    config = default_config({"method": name})
    config = replace(config, clip=replace(config.clip, clip="ViT-B-16"))
    first, *_ = parameters.parameter_lines(config, trained_classes=50)
    assert first == f"trainable parameters: {50 * each}"


def test_info_prints_the_parameters(monkeypatch, capsys):
    assert info.main(info.InfoConfig(method="coop", clip="tiny")) == 0
    assert capsys.readouterr().out.splitlines()[0] == "trainable parameters: 256"
    with pytest.raises(InputError, match="--clip nonsense: not tiny nor"):
        info.main(info.InfoConfig(method="coop", clip="nonsense"))
    with pytest.raises(InputError, match="--method nonsense"):
        info.main(info.InfoConfig(method="nonsense", clip="tiny"))


def test_every_method_is_compared_here():
    """But for those with a file of their own."""
    elsewhere = {"lamp", "zeroshot", "lift", "lift+", "linear-probe", "lp++", "ss-text", "ss-text+"}
    elsewhere |= {"promptsrc", "mmrl", "mmrl++"}
    elsewhere |= {"clip-lora", "2sfs", "promptlt"}
    assert set(METHODS) - elsewhere == set(COMPARED)


@pytest.mark.parametrize("name", COMPARED)
def test_templates_are_all_that_names_are_put_into(name, small_clip):
    """What is checked before a run is what the run will tokenise."""
    clip, seen = small_clip(), []
    tokenizer = clip.tokenizer

    def recording(texts, *arguments, **options):
        seen.extend(texts)
        return tokenizer(texts, *arguments, **options)

    for template, origin in (
        ("a photo of a {}.", Origin()),
        ("a photo of a {}.", Origin("imagenet")),
        ("a photo of a person doing {}.", Origin("ucf101")),
        ("{} texture.", Origin("dtd", target=True)),
    ):
        method = build(name, clip)
        expected = {each.replace("{}", "ox") for each in method.templates(template, origin)}
        clip.tokenizer, seen[:] = recording, []
        method.prepare(["ox"], template, origin)
        clip.tokenizer = tokenizer
        assert set(seen) == expected


def test_candle_tells_classes_of_one_name_apart(small_clip):
    """By their place: ImageNet has two "missile", each with pictures of its own."""
    clip = small_clip()
    base, new = ("missile", "ox", "missile"), ("hen", "missile")
    method = build("candle", clip, None, RunClasses(base, new))
    torch.nn.init.normal_(method.visual)
    torch.nn.init.normal_(method.virtual.data)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    every = method.logits(images, method.prepare((*base, *new), "a photo of a {}."))
    for names, expected in (
        (base, every[:, :3]),
        (new, every[:, 3:]),
        (("missile", "hen", "missile"), every[:, [0, 3, 2]]),
    ):
        got = method.logits(images, method.prepare(names, "a photo of a {}."))
        torch.testing.assert_close(got, expected, **TOLERANCE)
    columns = method.prepare(("zebra", "ox", "gnu"), "a photo of a {}.").columns
    assert columns.tolist() == [5, 1, 6]
