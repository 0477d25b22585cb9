"""MaPLe (Khattak et al., CVPR 2023): deep prompts in both towers, the visual ones projected."""

from torch import Tensor, nn

from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.methods.deep_prompts import DeepPrompts
from lamp_fast.methods.settings.maple import MAPLE, MapleSettings
from lamp_fast.methods.surroundings import Surroundings


class MaPLe(DeepPrompts):
    """Deep prompts whose visual ones are V_i = F_i(P_i), F_i linear [Dt -> Dv]; F_2.. start alike.

    Args:
        clip: the frozen CLIP.
        settings, trimming: as in :class:`DeepPrompts`.

    Raises:
        InputError: see :class:`DeepPrompts`.
    """

    entry = MAPLE

    def __init__(self, clip: FrozenClip, settings: MapleSettings, trimming: Trimming) -> None:
        super().__init__(clip, settings, trimming)
        widths = clip.text.width, clip.vision.width
        self.projections = nn.ModuleList(nn.Linear(*widths) for _ in range(self.depth))
        for each in self.projections[2:]:
            each.load_state_dict(self.projections[1].state_dict())
        self.match_clip()

    @classmethod
    def build(
        cls, clip: FrozenClip, settings: MapleSettings, surroundings: Surroundings
    ) -> "MaPLe":
        return cls(clip, settings, surroundings.trimming)

    def image_prompts_of(self, layer: int) -> Tensor:
        return self.projections[layer - 1](self.words[layer - 1])
