"""Which CLIP a run is over, and what of it is computed."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from lamp_fast.fields import Bounds, IntOrNone, Seed

# A field that no flag sets.
StudySwitch = tyro.conf.Suppress[tyro.conf.Fixed[bool]]


@dataclass(frozen=True)
class ClipConfig:
    """The frozen CLIP."""

    clip: str = "tiny"
    """An open_clip model name such as ViT-B-16, or "tiny": the small one the package carries."""
    pretrained: str | None = None
    """A tag (openai), a local state dict (.safetensors, .pt), or "random"."""
    weights_of: str | None = None
    """The tag whose weights the file of --pretrained holds, such as openai: it decides activation
    and normalisation. Files of some tags are recognised."""
    init_seed: Seed = 0
    """Seed of the weights when --pretrained random."""


@dataclass(frozen=True)
class Trimming:
    """What the exact path leaves out. All of it is exact to rounding; a switch each, for study.

    Three of them are flags; the others are for Python alone.
    """

    fold_quick_gelu: StudySwitch = True
    """Write QuickGELU as SiLU over folded weights (float32 and float64)."""
    prepare_text: StudySwitch = True
    """Run the text layers below the first selected one once per class set."""
    project_once: StudySwitch = True
    """Project each layer's pool once a step, then index."""
    last_row: StudySwitch = True
    """In the last layer compute the cls and eot rows alone."""
    share_tokens: StudySwitch = True
    """Compute what class prompts share once an image (text per image only)."""
    share_routes: bool = True
    """Images that retrieved the same prompts so far share their text computation."""
    cache_text: StudySwitch = True
    """Keep text features per class until weights, bias or classes change."""
    block: Annotated[IntOrNone, Bounds(1, 2**31 - 1)] = None
    """(image, class) pairs encoded at once; none decides by free memory when the run begins."""
    most_rows: Annotated[tyro.conf.Suppress[tyro.conf.Fixed[int]], Bounds(1, 1_000_000)] = 192
    """Text rows of one sequence of classes."""
    as_published: bool = False
    """Trim nothing of the methods LAMP is compared with: 77 tokens, text encoded anew for every
    batch where their code does (for timing; LAMP has --path literal)."""

    @property
    def only_cls(self) -> bool:
        """Whether the last image layer of such a method computes cls alone."""
        return self.last_row and not self.as_published
