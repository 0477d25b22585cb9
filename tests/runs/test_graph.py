"""The captured step: the same bits as the plain one, and nothing in it that a graph cannot hold.

A GPU alone can capture. Here a recorder with the same interface calls the function again at every
replay, on the same buffers; a watch on every dispatched op says whether the step reads values.
"""

import math
import typing
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lamp_fast.clip.settings import Trimming
from lamp_fast.data.settings import DataConfig
from lamp_fast.methods.lamp.balance import LoadBalance
from lamp_fast.methods.lamp.model import Lamp
from lamp_fast.methods.settings.lamp import LampSettings
from lamp_fast.runs import graph
from lamp_fast.runs.config import TrainConfig, apply_preset
from lamp_fast.runs.experiment import assemble
from lamp_fast.runs.ranks import ALONE, Ranks
from lamp_fast.runs.settings import Loss, OptimConfig
from lamp_fast.runs.trainer import Trainer

NAMES = ["dog", "old dog", "cat", "sea horse", "tree"]
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs need a GPU, this machine has none"
)


class CallingRecorder:
    """Stands in for a CUDA graph: a replay is a call that writes into the recorded outcome."""

    def __init__(self):
        self.replays = 0

    def warm_up(self, function):
        for _ in range(graph.WARM_UPS):
            function()

    def record(self, function):
        self.function = function
        self.outcome = {name: each.clone() for name, each in function().items()}
        return self.outcome

    def replay(self):
        self.replays += 1
        for name, value in self.function().items():
            self.outcome[name].copy_(value)


class ReadsNoValue(TorchDispatchMode):
    """Fails at ops that wait for the device, copy from the host, or have a shape of values."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "lift_fresh",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        assert name not in self.FORBIDDEN, name
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None
        return func(*args, **(kwargs or {}))


def settings(out, **optim):
    """Two steps an epoch: five digits, eight scans each, batch 16."""
    config = apply_preset(TrainConfig(out=out), "tiny")
    return replace(
        config,
        data=DataConfig(shots=8),
        own=replace(config.own, adapt_passes=1),
        optim=replace(config.optim, **({"epochs": 2, "warmup_epochs": 0} | optim)),
        machine=replace(config.machine, threads=1),
        trim=replace(config.trim, share_routes=False),
    )


def state_of(trainer):
    slots = trainer.optimiser.state_dict()["state"]
    moments = {f"{n}.{slot}": each for n, state in slots.items() for slot, each in state.items()}
    return {**{k: v.clone() for k, v in trainer.method.state_dict().items()}, **moments}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def log(trainer):
    timings = ("seconds", "waiting_for_data")
    return [
        {name: value for name, value in line.items() if name not in timings}
        for line in trainer.progress.history
    ]


@pytest.mark.parametrize(("text_query", "ahead"), [("image", None), ("class", 32)])
def test_a_captured_run_is_the_plain_run(tmp_path, text_query, ahead):
    """Parameters, moments, step counts, bias, totals and log to the bit; warm-ups leave nothing.

    Looking ahead, the graph's batch is what enters the first layer with prompts.
    """
    trainers = []
    for captured in (False, True):
        config = settings(tmp_path / str(captured), accumulate=2, epochs=1)
        config = replace(config, own=replace(config.own, text_query=text_query))
        config = replace(config, machine=replace(config.machine, ahead=ahead))
        trainer = Trainer(assemble(config), config.out)
        recorder = CallingRecorder()
        if captured:
            trainer.capture(recorder)
        trainer.run()
        trainers.append(trainer)
    assert recorder.replays == trainers[0].progress.steps == trainers[1].progress.steps
    assert_same(*map(state_of, trainers))
    assert log(trainers[0]) == log(trainers[1])


def test_a_captured_run_resumes_to_the_same_bits(tmp_path):
    """The optimiser's state is there before the warm-up, and comes back from it."""
    whole = Trainer(assemble(settings(tmp_path / "whole")), tmp_path / "whole")
    whole.capture(CallingRecorder())
    whole.run()
    for epochs in (1, 2):
        config = settings(tmp_path / "parts")
        trainer = Trainer(assemble(config), config.out)
        trainer.capture(CallingRecorder())
        if epochs == 2:
            trainer.restore()
        # The schedule is that of two epochs; only the loop ends early.
        trainer.optim = replace(trainer.optim, epochs=2)
        line = trainer._epoch(trainer.progress.epoch)
        trainer.progress.history.append(line)
        trainer.progress.epoch = epochs
        trainer.save()
    assert_same(state_of(whole), state_of(trainer))


def test_sharing_routes_is_off_in_a_captured_step_alone(tmp_path):
    config = settings(tmp_path / "run", epochs=1)
    config = replace(config, trim=replace(config.trim, share_routes=True))
    trainer = Trainer(assemble(config), config.out)
    seen = []
    accumulate = trainer.method.accumulate
    trainer.method.accumulate = lambda *arguments: (
        seen.append(arguments[-1]) or accumulate(*arguments)
    )
    trainer.capture(CallingRecorder())
    images = torch.zeros(16, 3, *[trainer.experiment.clip.preprocessing.size] * 2)
    labels = torch.zeros(16, dtype=torch.int64)
    trainer._take_step(images, labels, 16)
    assert set(seen) == {True}
    seen.clear()
    # Another size than the recorded one runs outside.
    trainer._take_step(images[:5], labels[:5], 5)
    assert seen == [False]
    assert trainer.progress.steps == 2


def counting_step(weight: torch.Tensor, total: torch.Tensor) -> Callable:
    def step(batch):
        weight.add_(batch.sum())
        total.add_(1)
        return {"seen": batch.sum(), "total": total.clone()}

    return step


def test_the_first_batch_counts_once():
    weight, total = torch.ones(3), torch.zeros((), dtype=torch.int64)
    step = graph.CapturedStep(
        counting_step(weight, total), lambda: [weight, total], CallingRecorder()
    )
    for number in range(1, 4):
        outcome = step(torch.full((2,), float(number)))
        assert outcome["seen"] == 2 * number
        assert outcome["total"] == total == number
    assert torch.equal(weight, torch.full((3,), 1.0 + 2 * (1 + 2 + 3)))
    assert step.fits(torch.zeros(2))
    assert not step.fits(torch.zeros(3))
    assert not step.fits(torch.zeros(2, dtype=torch.float64))


def test_what_is_derived_from_the_state_notices_a_replay():
    """A graph changes tensors behind autograd's back, and kept text features go by versions."""

    class SilentRecorder(CallingRecorder):
        def replay(self):
            weight.data.add_(1)

    weight = torch.zeros(2)
    step = graph.CapturedStep(
        lambda batch: {"sum": batch.sum()}, lambda: [weight], SilentRecorder()
    )
    step(torch.zeros(1))
    before = weight._version
    step(torch.zeros(1))
    assert weight._version > before


@pytest.mark.parametrize("text_query", ["image", "class"])
@pytest.mark.parametrize("options", [{}, {"lbo_count": "unbiased"}, {"msp": False}, {"mpp": False}])
def test_a_step_reads_no_value(small_clip, text_query, options):
    """Forward, loss, backward in blocks and LBO; sharing is off because shapes are to be fixed."""
    config = LampSettings(k=2, s=2, d=8, m=6, layers=(2, 3), text_query=text_query, **options)
    lamp = Lamp(small_clip(), config, trimming=Trimming(block=4))
    classes = lamp.prepare(NAMES, "a photo of a {}.")
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.arange(6) % len(NAMES)
    progress = torch.zeros((), dtype=torch.float64)
    with ReadsNoValue():
        steps = lamp.accumulate(
            images, labels, classes, F.cross_entropy, 2, lambda loss: loss, fixed_shapes=True
        )
        lamp.after_step([each.observations for each in steps], progress)
    if text_query == "image" and config.mpp:
        with pytest.raises(AssertionError, match="unique"), ReadsNoValue():
            lamp.step(images, labels, classes, F.cross_entropy)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_grad": 1.0},
        *({"loss": name} for name in typing.get_args(Loss)),
        *({"loss": name, "class_weights": "auto"} for name in ("ce", "ldam", "focal")),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_the_trainers_own_part_reads_no_value(tmp_path, changes):
    config = settings(tmp_path / "run", **changes)
    trainer = Trainer(assemble(config), config.out)
    # On a CPU the unfused optimiser keeps its step count on the host; the fused one is a GPU's.
    kind, rate = type(trainer.optimiser), torch.tensor(1e-3)
    trainer.optimiser = kind(trainer.parameters, lr=rate, fused=True)
    images = torch.zeros(16, 3, *[trainer.experiment.clip.preprocessing.size] * 2)
    with ReadsNoValue():
        trainer._fixed_step(images, torch.zeros(16, dtype=torch.int64))


@pytest.mark.parametrize("text_query", ["image", "class"])
def test_the_forward_compiles_as_one_graph(small_clip, text_query):
    """``fullgraph=True`` refuses the first break; values and gradients are those of eager."""
    config = LampSettings(k=2, s=2, d=8, m=6, layers=(2,), text_query=text_query)
    lamp = Lamp(small_clip(2, 2), config, trimming=Trimming(share_routes=False))
    classes = lamp.prepare(NAMES, "a photo of a {}.")
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(lamp, fullgraph=True, backend="aot_eager")
    results = []
    for model in (lamp, compiled):
        lamp.zero_grad()
        forward = model(images, classes)
        forward.logits.square().sum().backward()
        gradients = [each.grad.clone() for each in lamp.parameters() if each.grad is not None]
        results.append([forward.logits.detach(), *gradients])
        assert torch.equal(forward.selections.image, lamp(images, classes).selections.image)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("planned", [1, 7, 600, 12_345])
def test_the_bias_moves_by_the_hosts_cosine(planned):
    """Decided on the device, gamma_t is the host's to the last float32 bit of b."""
    generator = torch.Generator().manual_seed(planned)
    for t in range(0, planned, max(1, planned // 100)):
        balance = LoadBalance(1, 8, 2, gamma=5e-4)
        balance.bias += torch.randn(1, 8, generator=generator) * 1e-3
        expected = balance.bias.clone()
        counts = torch.randint(0, 5, (1, 8), generator=generator)
        over = torch.sign(8 * counts - 2 * 11).float()
        expected += -(0.5 * 5e-4 * (1 + math.cos(math.pi * t / planned))) * over
        balance.update(counts, 11, torch.tensor(t / planned, dtype=torch.float64))
        assert torch.equal(balance.bias, expected), t


@pytest.mark.parametrize(
    ("change", "device", "ranks", "reason"),
    [
        ({}, "cuda", ALONE, None),
        ({"graph": False}, "cuda", ALONE, "--no-graph"),
        ({}, "cpu", ALONE, "on a CPU"),
        ({"precision": "fp16"}, "cuda", ALONE, "scaler"),
        ({}, "cuda", Ranks(0, 2, torch.device("cuda")), "several ranks"),
        ({"batch": graph.SHARE_FROM_BATCH}, "cuda", ALONE, "--no-share-routes"),
        ({"batch": graph.SHARE_FROM_BATCH, "share_routes": False}, "cuda", ALONE, None),
        ({"batch": graph.SHARE_FROM_BATCH, "text_query": "class"}, "cuda", ALONE, None),
        ({"path": "literal"}, "cuda", ALONE, "the method"),
    ],
)
def test_when_a_run_captures(small_clip, change, device, ranks, reason):
    config = TrainConfig(optim=OptimConfig(batch=4))
    for part in ("optim", "machine", "trim"):
        own = getattr(config, part)
        fields = {name: value for name, value in change.items() if hasattr(own, name)}
        config = replace(config, **{part: replace(own, **fields)})
    own = LampSettings(layers=(2,), text_query=change.get("text_query", "image"))
    lamp = Lamp(small_clip(2, 2), own, config.machine.path, config.trim)
    got = graph.why_not_captured(config, lamp, torch.device(device), ranks)
    assert (got is None) if reason is None else reason in got


@needs_gpu
@pytest.mark.parametrize("text_query", ["image", "class"])
def test_a_cuda_graph_is_the_plain_run(tmp_path, text_query):
    """On a GPU, to the bit: the same kernels in the same order, with and without the graph."""
    trainers = []
    for captured in (False, True):
        config = settings(tmp_path / str(captured))
        config = replace(
            config,
            own=replace(config.own, text_query=text_query),
            machine=replace(config.machine, device="cuda", graph=captured),
        )
        trainer = Trainer(assemble(config), config.out)
        assert (trainer.captured is not None) == captured
        trainer.run()
        trainers.append(trainer)
    assert_same(*map(state_of, trainers))
    assert log(trainers[0]) == log(trainers[1])
