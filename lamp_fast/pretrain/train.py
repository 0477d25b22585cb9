"""Contrastive pre-training of the tiny CLIP; see :mod:`lamp_fast.pretrain.__main__`."""

import math
import sys
from dataclasses import dataclass

import open_clip
import torch
from open_clip.loss import ClipLoss
from torch import Generator, Tensor
from tqdm import tqdm

from lamp_fast.clip import tiny
from lamp_fast.data.sources import digits
from lamp_fast.errors import InputError
from lamp_fast.fields import validate
from lamp_fast.pretrain import glyphs
from lamp_fast.pretrain.settings import HELD_OUT_SEED, PretrainConfig

ARCHITECTURE = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": glyphs.PICTURE_SIZE,
        "patch_size": 8,
        "layers": 6,
        "width": 128,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "layers": 6,
        "width": 64,
        "heads": 2,
    },
}
"""Arguments of ``open_clip.CLIP``."""

MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class HeldOut:
    """Pictures in fonts that training never draws.

    Attributes:
        pictures: float32 [N, 3, 32, 32].
        classes: index into ``glyphs.CLASSES``, int64 [N].
    """

    pictures: Tensor
    classes: Tensor


def main(config: PretrainConfig) -> None:
    """Pre-train, print scores on held-out glyphs, write the weights.

    Raises:
        InputError: a value out of its bounds, or an ``--out`` that is a file, or that
            holds something while ``--overwrite`` is not given.
    """
    validate(config)
    out = config.out or tiny.carried_folder()
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: a file, expected a folder")
    if not config.overwrite and out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out}: expected a new or empty folder, or --overwrite")
    torch.set_num_threads(config.threads)
    model, losses = pretrain(config)
    tiny.save_tiny(model, ARCHITECTURE, seen_token_ids(), out)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    stored = score(tiny.load_tiny(out), held_out(config.held_out))
    print(f"{out}: {describe(stored)} as stored, in float16")


def pretrain(config: PretrainConfig) -> tuple[open_clip.CLIP, list[float]]:
    """Train a tiny CLIP from scratch; returns it and the loss of every step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = tiny.build_tiny(ARCHITECTURE)
    generator = Generator().manual_seed(config.seed)
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    shapes = glyphs.load_shapes(glyphs.TRAINING_FONTS)
    test = held_out(config.held_out)
    loss_of = ClipLoss()
    optimiser = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, config))
    losses = []
    with tqdm(total=config.steps, unit="step", file=sys.stderr, disable=None) as progress:
        for step in range(1, config.steps + 1):
            classes = draw_classes(config, generator)  # [G, P]
            bitmaps = glyphs.draw(shapes, shapes.choose(classes.flatten(), generator), generator)
            texts = tokenizer(glyphs.captions(classes.flatten().tolist(), generator))
            images = model.encode_image(glyphs.scan(bitmaps), normalize=True)
            words = encode_text(model, texts)
            groups = zip(images.split(classes.shape[1]), words.split(classes.shape[1]), strict=True)
            scale = model.logit_scale.exp()
            loss = torch.stack([loss_of(image, word, scale) for image, word in groups]).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
            losses.append(loss.item())
            progress.update()
            if step % config.evaluate_every == 0 or step == config.steps:
                progress.write(
                    f"step {step}: loss {losses[-1]:.3f}, {describe(score(model, test))}"
                )
    return model.eval(), losses


def draw_classes(config: PretrainConfig, generator: Generator) -> Tensor:
    """The classes of a step, no two alike within a group: int64 [groups, 10 + letters]."""
    count = len(digits.NAMES)
    rows = []
    for _ in range(config.groups):
        letters = torch.randperm(len(glyphs.LETTERS), generator=generator)[: config.letters]
        rows.append(torch.cat([torch.arange(count), count + letters]))
    return torch.stack(rows)


def encode_text(model: open_clip.CLIP, texts: Tensor) -> Tensor:
    """``model.encode_text(texts, normalize=True)`` without the columns behind the last eot.

    Under a causal mask no eot sees them.

    Args:
        texts: token ids, int64 [N, context].

    Returns:
        Unit rows, [N, embed_dim].
    """
    eot = texts.argmax(dim=-1)
    length = int(eot.max()) + 1
    x = model.token_embedding(texts[:, :length]) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(x)), eot] @ model.text_projection
    return torch.nn.functional.normalize(x, dim=-1)


def parameter_groups(model: open_clip.CLIP, weight_decay: float) -> list[dict]:
    """AdamW's groups: matrices of the blocks and projections decay, nothing else does."""
    decayed, kept = [], []
    for name, value in model.named_parameters():
        is_matrix = value.ndim >= 2 and "embedding" not in name
        (decayed if is_matrix else kept).append(value)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def rate(step: int, config: PretrainConfig) -> float:
    """Learning rate of a step (0 first) over its peak."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / (config.steps - config.warmup)
    return (1 + math.cos(math.pi * done)) / 2


def held_out(per_class: int) -> HeldOut:
    """Draw every class in the held-out fonts with the held-out distortion; the seed is fixed."""
    generator = Generator().manual_seed(HELD_OUT_SEED)
    shapes = glyphs.load_shapes(glyphs.HELD_OUT_FONTS)
    classes = torch.arange(len(glyphs.CLASSES)).repeat_interleave(per_class)
    indices = shapes.choose(classes, generator)
    bitmaps = glyphs.draw(shapes, indices, generator, glyphs.HELD_OUT_DISTORTION)
    return HeldOut(glyphs.scan(bitmaps), classes)


@torch.no_grad()
def score(model: open_clip.CLIP, test: HeldOut) -> dict[str, float]:
    """Zero-shot accuracy on held-out glyphs.

    Returns:
        For "digits" (of ten, captioned by the digits' own template), "bare" (of ten, by their
        names alone), "phrases" (of ten, mean over templates that training never used) and
        "letters" (of all letters) the fraction in 0..1.
    """
    training = model.training
    model.eval()
    features = model.encode_image(test.pictures, normalize=True)
    is_digit = test.classes < len(digits.NAMES)

    def accuracy(names: tuple[str, ...], template: str, chosen: Tensor, first: int) -> float:
        texts = open_clip.tokenizer.SimpleTokenizer()([template.format(name) for name in names])
        nearest = (features[chosen] @ encode_text(model, texts).T).argmax(dim=-1)
        return (nearest == test.classes[chosen] - first).double().mean().item()

    def of_digits(template: str) -> float:
        return accuracy(digits.NAMES, template, is_digit, 0)

    phrases = [of_digits(template) for template in glyphs.HELD_OUT_TEMPLATES]
    letter = digits.TEMPLATE.replace("digit", "letter")
    scores = {
        "digits": of_digits(digits.TEMPLATE),
        "bare": of_digits("{}"),
        "phrases": sum(phrases) / len(phrases),
        "letters": accuracy(glyphs.LETTERS, letter, ~is_digit, len(digits.NAMES)),
    }
    model.train(training)
    return scores


def describe(scores: dict[str, float]) -> str:
    """One line of :func:`score`'s result, in per cent."""
    values = ", ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())
    return f"held-out accuracy (%): {values}"


def seen_token_ids() -> set[int]:
    """Every token of every caption that training can draw, with bot and eot."""
    texts = open_clip.tokenizer.SimpleTokenizer()(glyphs.all_captions())
    behind_eot = torch.arange(texts.shape[1]) > texts.argmax(dim=-1, keepdim=True)
    return set(texts[~behind_eot].tolist())
