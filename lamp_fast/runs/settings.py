"""How a run learns, and where and how fast it computes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from lamp_fast.data.settings import Sampling
from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds, FloatOrNone, IntOrNone
from lamp_fast.runs.class_numbers import check_numbers, read_numbers

Loss = Literal["ce", "la", "balanced", "ldam", "cb", "grw", "focal", "lade"]


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation, as the peers do it."""

    optimiser: Literal["adamw", "adam", "sgd"] = "adamw"
    """sgd has momentum 0.9, the others betas (0.9, 0.999)."""
    lr: Annotated[float, Bounds(above=0, high=1e30)] = 3e-3
    lr_end: Annotated[float, Bounds(0, 1e30)] = 0.0
    """What the cosine falls towards."""
    lr_per: Literal["epoch", "step"] = "epoch"
    """How often the rate moves along its cosine."""
    weight_decay: Annotated[float, Bounds(0, 1_000_000)] = 5e-4
    eps: Annotated[float, Bounds(above=0, high=1_000_000)] = 1e-8
    """Of adamw and adam."""
    epochs: Annotated[IntOrNone, Bounds(1, 1_000_000)] = 50
    """none: as many as the method's published number of steps is on these data (CLIP-LoRA, 2SFS);
    the run keeps the number."""
    batch: Annotated[int, Bounds(1, 1_000_000_000)] = 4
    """Pictures an optimiser step."""
    accumulate: Annotated[int, Bounds(1, 1_000_000)] = 1
    """Process each batch in this many pieces: less memory, the same step."""
    clip_grad: Annotated[FloatOrNone, Bounds(above=0, high=1_000_000)] = None
    """Largest gradient norm; none leaves gradients alone."""
    warmup_epochs: Annotated[int, Bounds(0, 1_000_000)] = 1
    """Epochs at --warmup-lr first (none where there is only one epoch)."""
    warmup_lr: Annotated[float, Bounds(above=0, high=1e30)] = 1e-5
    loss: Loss = "ce"
    """What is minimised over the logits, for classes of unequal size. ce: cross-entropy. la: of
    logits + tau log prior, which asks for equal accuracy of all classes; balanced: la at tau 1;
    lade: that with a regulariser. ldam: a margin, wider for small classes. cb, grw: weights by the
    effective number of pictures, or by 1 / prior. focal: pictures that are still hard."""
    logit_adjustment: bool = False
    """The same as --loss la (Menon et al. 2020): the tables' "+LA"."""
    tau: Annotated[float, Bounds(0, 1_000_000)] = 1.0
    """Of la, and of Candle's loss: 0 is ce, 1 is right where test classes are of one size."""
    loss_max_margin: Annotated[float, Bounds(0, 1_000)] = 0.5
    """Of ldam: the smallest class's margin, as a cosine; others have n^(-1/4) of it."""
    loss_beta: Annotated[float, Bounds(0, below=1)] = 0.9999
    """Of cb: 0 weighs classes alike, towards 1 it comes to 1 / n."""
    loss_gamma: Annotated[float, Bounds(0, 1_000)] = 2.0
    """Of focal: 0 is ce, more looks away from what is already right."""
    loss_lader: Annotated[float, Bounds(0, 1_000_000)] = 0.1
    """Of lade: how much its regulariser counts."""
    loss_remine: Annotated[float, Bounds(0, 1_000_000)] = 0.1
    """Of lade: how much the regulariser's square counts."""
    class_weights: str = "none"
    """Multiplies each picture's loss by a number of its class: none; auto, N / (C n_c), so that all
    classes weigh alike; or a JSON file {"cat": 2, "dog": 0.5} of all trained classes, whose content
    the run keeps."""
    sampler: Sampling = "shuffle"
    """Which pictures an epoch has: shuffle takes each once; balanced draws as many with
    replacement, every class alike; sqrt lies between, a class by the root of its size."""

    @property
    def criterion(self) -> Loss:
        """The loss, by whichever flag it was asked for."""
        return "la" if self.logit_adjustment else self.loss

    @property
    def splits_batches(self) -> bool:
        """Whether a batch's loss is the mean of its parts', so that they may be taken apart."""
        return self.criterion != "lade"

    def check_together(self) -> None:
        """Refuse settings of the loss that do not go together.

        Raises:
            InputError: naming the first such flag, its value and what was expected.
        """
        if self.logit_adjustment and self.loss not in ("ce", "la"):
            raise InputError(
                f"--loss {self.loss} --logit-adjustment: expected one of the two;"
                " --no-logit-adjustment takes back what --config says"
            )
        if self.criterion == "balanced" and self.tau != 1:
            raise InputError(f"--tau {self.tau}: --loss balanced is la at 1, expected --loss la")
        if self.class_weights != "none" and self.criterion in ("cb", "grw", "lade"):
            raise InputError(
                f"--class-weights: --loss {self.criterion} weighs classes itself, expected none"
            )
        if self.splits_batches:
            return
        whole = f"--loss {self.loss} compares the pictures of a whole batch"
        if self.accumulate > 1:
            raise InputError(f"--accumulate {self.accumulate}: {whole}, expected 1")
        if self.sampler != "shuffle":
            raise InputError(
                f"--sampler {self.sampler}: {whole} drawn as they are, expected shuffle"
            )

    def resolved(self, names: Sequence[str]) -> "OptimConfig":
        """The same with the content of a file of class weights in place of its name, as JSON.

        Raises:
            InputError: a file that is not there, or says something else than a positive number for
                each of the trained classes ``names``.
        """
        if self.class_weights in ("none", "auto"):
            return self
        weights = given_weights(self.class_weights, names)
        return replace(self, class_weights=json.dumps(weights))

    def describe(self) -> str | None:
        """What of loss and sampling is not the default, in words; None where all is."""
        words = []
        if self.criterion != "ce":
            words.append(f"loss {self.criterion}")
        if self.class_weights != "none":
            words.append(f"class weights {'auto' if self.class_weights == 'auto' else 'given'}")
        if self.sampler != "shuffle":
            words.append(f"sampler {self.sampler}")
        return ", ".join(words) or None


def given_weights(given: str, names: Sequence[str]) -> dict[str, float]:
    shown = "--class-weights" if given.lstrip().startswith("{") else f"--class-weights {given}"
    return check_numbers(shown, read_numbers("--class-weights", given), names)


@dataclass(frozen=True)
class MachineConfig:
    """Where and how fast; nothing here changes a result beyond rounding."""

    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Compute type of the frozen CLIP: auto takes bf16 on a GPU and on a CPU that multiplies it
    (AVX512_BF16, AMX; python -m lamp_fast.info), else fp32; parameters, cosines and logits stay at
    least fp32."""
    threads: Annotated[IntOrNone, Bounds(1, 4096)] = None
    """CPU threads; none leaves it to torch."""
    ops: Literal["auto", "reference"] = "auto"
    """reference runs every op in plain torch (python -m lamp_fast.info shows what auto takes)."""
    workers: Annotated[int, Bounds(0, 4096)] = 0
    """Processes that load pictures; 0 loads in the main one."""
    cache_size: Annotated[float, Bounds(0, 1_000_000)] = 10.0
    """Gigabytes of decoded pictures to keep between epochs and runs, and as many of features, in
    $LAMP_FAST_CACHE or ~/.cache/lamp_fast; 0 keeps none. python -m lamp_fast.cache shows and clears
    them."""
    transforms: Literal["auto", "host", "device"] = "auto"
    """Where pictures are cropped, scaled and normalised: by torchvision where they are loaded, or a
    batch at a time on the device, with the same crops and within a step of 255 of the same pixels;
    auto takes a GPU where there is one."""
    test_batch: Annotated[int, Bounds(1, 1_000_000)] = 100
    """Pictures an evaluation batch."""
    ahead: Annotated[IntOrNone, Bounds(1, 1_000_000)] = None
    """Training pictures that go at once through the image tower's layers below the first that the
    method changes, while its steps take them a batch at a time; 1 runs each batch alone. none: as
    many as a GiB holds on a GPU, 1 on a CPU, where it gains nothing."""
    graph: bool = True
    """On a GPU, replay the training step as one CUDA graph where that is exact; the run says
    whether it does, and else why not."""
    path: Literal["exact", "literal"] = "exact"
    """literal: prompts as tokens, 77 tokens, one text pass per (image, class); slow, obvious."""
