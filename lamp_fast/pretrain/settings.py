"""What the pre-training of the tiny CLIP is told."""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds

LETTERS = tuple(letter for letter in string.ascii_lowercase if letter != "o")
"""The letter o is left out: filling its box, it is a zero."""

# Apart from every seed that training draws with, so that scores of different runs compare.
HELD_OUT_SEED = 2**40


@dataclass(frozen=True)
class PretrainConfig:
    """Flags of the command."""

    out: Path | None = None
    """Folder for config.json and weights.safetensors; the package's own assets if not given."""
    overwrite: bool = False
    """Replace weights that lie in --out."""
    seed: Annotated[int, Bounds(0, below=HELD_OUT_SEED)] = 0
    """Of the initial weights, the drawings and the captions."""
    steps: Annotated[int, Bounds(1, 1_000_000)] = 1500
    """Optimiser steps."""
    groups: Annotated[int, Bounds(1, 10_000)] = 6
    """Groups of pairs in a step; the loss is computed within each."""
    letters: Annotated[int, Bounds(0, len(LETTERS))] = 12
    """Letters in a group, beside the ten digits."""
    lr: Annotated[float, Bounds(above=0, high=1e30)] = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Bounds(0, 1_000_000)] = 0.05
    """Of matrices; embeddings, gains, biases and the logit scale are not decayed."""
    warmup: Annotated[int, Bounds(0, 1_000_000)] = 100
    """Steps of linear warm-up; a cosine brings the rate to 0 after them."""
    evaluate_every: Annotated[int, Bounds(1, 1_000_000)] = 250
    """Steps between scores on held-out glyphs."""
    held_out: Annotated[int, Bounds(1, 10_000)] = 60
    """Held-out pictures of each class."""
    threads: Annotated[int, Bounds(1, 4096)] = 2
    """CPU threads."""

    def check_together(self) -> None:
        """Refuse values that do not go together.

        Raises:
            InputError: naming the flag, its value and what was expected.
        """
        if self.warmup >= self.steps:
            raise InputError(f"--warmup {self.warmup}: expected 0..{self.steps - 1}, below --steps")
