"""Look-ahead: the frozen layers of several batches at once change no number of a run."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import build_small_clip

from benchmarks.measuring.memory import PeakMemory
from lamp_fast.clip.features import up_to_layer
from lamp_fast.data.settings import DataConfig
from lamp_fast.methods import METHODS
from lamp_fast.methods.base import Method
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs import ahead
from lamp_fast.runs.ahead import LookAhead, bytes_a_picture
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig, default_config
from lamp_fast.runs.experiment import assemble
from lamp_fast.runs.trainer import Trainer, adapt_to_new_classes

# The same float64 numbers, perhaps added up in another order: of a step some hundred operations on
# values of order 1 to 100 (logits), each rounded to 1.1e-16 relative.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}

NAMES = ("zero", "a long name", "cat")
LAYERS, CPU = 6, torch.device("cpu")
# Where each begins to differ from a CLIP of six layers whose joint width is 12.
FROM_PICTURES = {
    "lamp": (3, {"layers": (3, 4, 6)}),
    "promptlt": (3, {}),
    "mmrl": (3, {}),
    "mmrl++": (3, {}),
    "mma": (5, {}),
    "coop": (7, {}),
    "cocoop": (7, {}),
    "tcp": (7, {}),
    "candle": (7, {"fusion_heads": 3, "fusion_dropout": 0.0}),
    "maple": (1, {}),
    "promptsrc": (1, {}),
    "lift": (1, {}),
    "lift+": (1, {}),
    "clip-lora": (1, {}),
    "2sfs": (1, {}),
}
# What they train on is read before the first step.
FROM_FEATURES = {"lfa", "tip-f", "clip-adapter", "zs-lp", "clap", "prolip"}


@pytest.fixture(scope="module")
def clip():
    return build_small_clip(LAYERS, LAYERS)


def build(name, clip):
    torch.manual_seed(3)
    config = default_config({"method": name, "data": "digits"})
    config = replace(config, own=replace(config.own, **FROM_PICTURES[name][1]))
    return build_method(clip, config, RunClasses(NAMES, ("dog",), (3, 2, 1)))


def pictures(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator)


def test_every_method_is_here():
    stepped = {name for name, each in METHODS.items() if each.load().step is not Method.step}
    assert stepped == FROM_PICTURES.keys() | FROM_FEATURES


@pytest.mark.parametrize("name", FROM_PICTURES)
def test_a_step_goes_on_where_the_method_begins(clip, name):
    """Loss, logits and gradients of three pictures, encoded up to there among seven."""
    method, labels, images = build(name, clip), torch.tensor([2, 0, 1]), pictures(7)
    assert method.first_changed_layer == FROM_PICTURES[name][0]
    if method.first_changed_layer == 1:
        return
    classes, taken = method.prepare(NAMES, "a photo of a {}."), []
    states = up_to_layer(clip, images, method.first_changed_layer)
    assert not states.requires_grad
    for given in (images[2:5], states[2:5]):
        method.zero_grad(set_to_none=True)
        step = method.step(given, labels, classes, F.cross_entropy)
        step.loss.backward()
        taken.append([step.loss, step.logits, *(each.grad for each in method.parameters())])
    for plain, ahead_of in zip(*taken, strict=True):
        torch.testing.assert_close(ahead_of, plain, **TOLERANCE)


def look_ahead(clip, most, layer=3):
    return LookAhead(clip, layer, most, None)


def batches_of(sizes, given=lambda rows: None):
    """Batches of pictures, told of as they are fetched; the label is the picture's number."""
    first = 0
    for rows in sizes:
        given(rows)
        labels = torch.arange(first, first + rows)
        images = pictures(40)[labels] if rows else torch.empty(0)
        first += rows
        yield [images, labels, labels]


@pytest.mark.parametrize(
    ("sizes", "most", "groups"),
    [
        pytest.param([4] * 8 + [1], 12, [4, 8, 12, 9], id="last one short"),
        pytest.param([4] * 7, 8, [4, 8, 8, 8], id="full"),
        pytest.param([4], 12, [4], id="one batch"),
        pytest.param([2, 2, 2, 0], 8, [2, 4], id="no row in the last"),
        pytest.param([0, 0, 0], 8, [], id="no row in any"),
        pytest.param([], 8, [], id="no batch"),
    ],
)
def test_every_batch_comes_in_its_turn(clip, monkeypatch, sizes, most, groups):
    """Groups double; at most ``most`` pictures wait beside at most as many that have gone through,
    and no batch takes more than two of the loader."""
    seen, fetched, given_out = [], [], 0

    def up_to(clip, images, layer):
        seen.append(len(images))
        return up_to_layer(clip, images, layer)

    monkeypatch.setattr(ahead, "up_to_layer", up_to)
    got, before = [], 0
    for batch in look_ahead(clip, most)(batches_of(sizes, fetched.append)):
        assert len(fetched) - before <= 2
        assert sum(fetched) - given_out <= 2 * most
        before, given_out = len(fetched), given_out + len(batch[1])
        got.append(batch)
    assert seen == groups
    assert max(seen, default=0) <= most
    for (images, *rest), (states, *others) in zip(batches_of(sizes), got, strict=True):
        assert all(map(torch.equal, rest, others))
        if len(images):
            expected = up_to_layer(clip, images, 3)
            torch.testing.assert_close(states, expected, **TOLERANCE)
        else:
            assert len(states) == 0


@pytest.mark.parametrize("layer", [3, LAYERS + 1])
def test_its_memory_is_what_it_says(clip, layer):
    """Counted over the real code; but for a row a picture it is the same to the byte."""
    most, numbers = 16, torch.zeros(4, dtype=torch.int64)

    loaded = ([torch.randn(4, 3, 16, 16, dtype=clip.dtype), numbers] for _ in range(11))
    with PeakMemory() as memory:
        up_to_layer(clip, torch.zeros(1, 3, 16, 16, dtype=clip.dtype), layer)
        weights = memory.peak = memory.live
        for _ in look_ahead(clip, most, layer)(loaded):
            pass
    said, row = most * bytes_a_picture(clip), most * clip.vision.width * clip.dtype.itemsize
    assert said - row <= memory.peak - weights <= said


def settings(out, most, method="lamp"):
    """Five steps an epoch: five digits, four scans each, batch 4."""
    config = default_config({"method": method, "data": "digits", "clip": "tiny"})
    return replace(
        config,
        out=out,
        data=DataConfig(shots=4),
        own=replace(config.own, **({"adapt_passes": 1} if method == "lamp" else {})),
        optim=replace(config.optim, epochs=2, batch=4),
        machine=replace(config.machine, threads=1, precision="fp64", ahead=most),
    )


def state_of(trainer):
    slots = trainer.optimiser.state_dict()["state"]
    moments = {f"{n}.{slot}": each for n, state in slots.items() for slot, each in state.items()}
    return {**{k: v.clone() for k, v in trainer.method.state_dict().items()}, **moments}


def trained(config):
    trainer = Trainer(assemble(config), config.out)
    given = []
    accumulate = trainer.method.accumulate
    trainer.method.accumulate = lambda images, *rest: (
        given.append(images.ndim) or accumulate(images, *rest)
    )
    trainer.run()
    adaptation = adapt_to_new_classes(trainer.experiment)
    return trainer, set(given), adaptation


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of LAMP that looks two batches ahead."""
    return trained(settings(tmp_path_factory.mktemp("whole"), 8))


def assert_close_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **TOLERANCE, msg=name)


def test_a_run_is_the_run_without(tmp_path, whole):
    """Weights, moments, load balancing and adaptation of LAMP; its choices are the same."""
    plain, given, adaptation = trained(settings(tmp_path, 1))
    trainer, given_ahead, adaptation_ahead = whole
    assert (given, given_ahead) == ({4}, {3})
    assert_close_states(state_of(plain), state_of(trainer))
    for name, value in adaptation.items():
        assert adaptation_ahead[name] == pytest.approx(value, rel=1e-9), name
    for line, other in zip(plain.progress.history, trainer.progress.history, strict=True):
        assert other["activations"] == line["activations"]
        assert other["step_loss"] == pytest.approx(line["step_loss"], rel=1e-9)


def test_a_run_over_features_is_the_run_without(tmp_path):
    results = [trained(settings(tmp_path / str(most), most, "coop")) for most in (1, 8)]
    (plain, given, _), (trainer, given_ahead, _) = results
    assert (given, given_ahead) == ({4}, {2})
    assert_close_states(state_of(plain), state_of(trainer))


def test_a_run_stopped_within_an_epoch_resumes_to_the_same_bits(tmp_path, whole):
    config = settings(tmp_path, 8)
    trainer = Trainer(assemble(config), tmp_path)
    trainer.save()
    take, taken = trainer._take_step, []

    def stopping(*batch):
        taken.append(batch)
        if len(taken) == 8:
            raise KeyboardInterrupt
        return take(*batch)

    trainer._take_step = stopping
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    trainer = Trainer(assemble(config), tmp_path)
    trainer.restore()
    assert trainer.progress.epoch == 1
    trainer.run()
    expected = state_of(whole[0])
    got = state_of(trainer)
    # Adaptation, which follows training, is in the other alone.
    learned = {name for name in expected if not name.startswith("new_")}
    assert learned == {name for name in got if not name.startswith("new_")}
    assert all(torch.equal(got[name], expected[name]) for name in learned)


@pytest.mark.parametrize(
    ("name", "change", "device", "reason"),
    [
        ("lamp", {"ahead": 8}, "cpu", None),
        ("lamp", {"ahead": 7}, "cpu", "two batches are 8 pictures"),
        ("lamp", {}, "cpu", "more than 1 at once"),
        ("lamp", {}, "cuda", None),
        ("lamp", {"ahead": 1}, "cuda", "more than 1 at once"),
        ("lamp", {"ahead": 8, "path": "literal"}, "cpu", "--path literal"),
        ("coop", {"ahead": 8}, "cpu", None),
        ("mmrl", {"ahead": 8, "as_published": True}, "cpu", "--as-published"),
        ("promptsrc", {"ahead": 8}, "cuda", "first layer"),
    ],
)
def test_when_a_run_looks_ahead(clip, name, change, device, reason):
    config = TrainConfig(method=name)
    for part in ("machine", "trim"):
        own = getattr(config, part)
        fields = {field: value for field, value in change.items() if hasattr(own, field)}
        config = replace(config, **{part: replace(own, **fields)})
    got = LookAhead.of(config, build(name, clip), torch.device(device), rows=4)
    assert (got.why_not is None) if reason is None else reason in got.why_not
    on_features = LookAhead.of(config, build(name, clip), CPU, rows=4, on_features=True)
    assert on_features.why_not == "the method trains on features"


def test_what_a_run_says(clip):
    assert look_ahead(clip, 8, 3).describe() == (
        "layers 1..2 of the image tower for up to 8 pictures at once"
    )
    said = look_ahead(clip, 8, LAYERS + 1).describe()
    assert said == "all of the image tower for up to 8 pictures at once"
    assert replace(look_ahead(clip, 8), why_not="as it is").describe() == "none: as it is"
