"""Which CLIP a run is over, what its answers are worth, and what of it is computed."""

from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from lamp_fast.cli import expand_path
from lamp_fast.fields import Bounds, IntOrNone, Seed

# A field that no flag sets.
StudySwitch = tyro.conf.Suppress[tyro.conf.Fixed[bool]]

TINY = "tiny"
# Where nothing is said: what most of the field's tables are about.
USUAL, USUAL_WEIGHTS = "ViT-B-16", "openai"
# The data sets of the kind of picture that the carried CLIP was trained on; benchmarks/letters.py
# draws the second.
GLYPHS = ("digits", "letters")

RANDOM = "random"
HUB, LOCAL = "hf-hub:", "local-dir:"


def in_folder(name: str) -> bool:
    """Whether a CLIP's name says where its folder is, as open_clip spells it; see
    :mod:`lamp_fast.clip.model_folder`."""
    return name.startswith((HUB, LOCAL))


@dataclass(frozen=True)
class ClipConfig:
    """The frozen CLIP."""

    clip: str | None = None
    """An open_clip model name such as ViT-B-16; hf-hub:ORG/NAME or local-dir:FOLDER, which hold
    architecture, weights (open_clip_model.safetensors) and preprocessing; or "tiny", the small one
    that the package carries, which has only seen drawn digits and letters. By default tiny for
    --data digits, and for all other pictures ViT-B-16 with --pretrained openai."""
    pretrained: str | None = None
    """A tag (openai), a local state dict (.safetensors, .pt), or "random"; for hf-hub: and
    local-dir: another folder of the same files."""
    weights_of: str | None = None
    """The tag whose weights the file of --pretrained holds, such as openai: it decides activation
    and normalisation. Files of some tags are recognised."""
    init_seed: Seed = 0
    """Seed of the weights when --pretrained random."""

    def resolved(self, data: str) -> "ClipConfig":
        """The same with the CLIP for a data set filled in, and an absolute folder.

        Args:
            data: its name.
        """
        if self.clip is None and data in GLYPHS:
            return replace(self, clip=TINY)
        if self.clip is None:
            return replace(self, clip=USUAL, pretrained=self.pretrained or USUAL_WEIGHTS)
        if self.clip.startswith(LOCAL) and (folder := self.clip.removeprefix(LOCAL)):
            return replace(self, clip=f"{LOCAL}{expand_path(folder).absolute()}")
        return self


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


def caution(name: str, random: bool, data: str) -> str | None:
    """Why accuracies and answers on some pictures mean nothing, in a sentence; None where they may
    mean something.

    Every place that shows them shows this, too.

    Args:
        name: of the CLIP.
        random: whether its weights are drawn.
        data: the data set of the pictures.
    """
    if random:
        return "The CLIP's weights are random: these accuracies mean nothing."
    if name == TINY and data not in GLYPHS:
        return (
            "The tiny CLIP has only seen drawn digits and letters: on other pictures its answers"
            " mean nothing, it only tries the pipeline (--clip ViT-B-16 --pretrained openai)."
        )
    return None
