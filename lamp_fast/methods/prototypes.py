"""Classifiers by cosine with a vector of each trained class, beside which other names have a text.

What the methods of this kind differ in is how the vectors come about.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.methods.base import Method
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.methods.text import ensemble_texts, plain_text_features


@dataclass(frozen=True)
class NamedClasses:
    """Classes as they are asked for.

    Attributes:
        texts: text features [C, Ds], not normalised.
        known: int64 [K], which of them were trained.
        columns: int64 [K], where each of these stands among the trained classes.
    """

    texts: Tensor
    known: Tensor
    columns: Tensor


class Prototypes(Method):
    """Scores s cos(f, w_c), w_c [Ds] of each trained class; f is CLIP's own image feature.

    A class of any list, also of another data set's, has the w_c of the trained class of its name.
    One of another name has its text feature, as in zero-shot CLIP. Subclasses bring ``weight``.

    Args:
        clip: the frozen CLIP.
        classes: of the run.
    """

    reads_features = True

    weight: Tensor
    """w [C_base, Ds], float32, or float64 with a float64 CLIP."""

    def __init__(self, clip: FrozenClip, classes: RunClasses) -> None:
        super().__init__(clip)
        self.names = classes

    def empty_weight(self) -> Tensor:
        """Zeros of the shape of ``weight``."""
        return torch.zeros(len(self.names.base), self.clip.vision.visual.proj.shape[1])

    @torch.no_grad()
    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> NamedClasses:
        """A class's text is the mean of its features in :meth:`templates`, none normalised."""
        if origin.words is None:
            templates = self.templates(template, origin)
            each = [plain_text_features(self.clip, names, one) for one in templates]
            texts = torch.stack(each).mean(0)
        else:
            texts = ensemble_texts(self.clip, names, origin.words, normalised=False)
        known, columns = torch.tensor(self.names.placed(names), dtype=torch.int64).to(texts.device)
        return NamedClasses(texts, known, columns)

    @torch.no_grad()
    def feature_logits(
        self, features: Tensor, classes: NamedClasses, adapted: bool = False
    ) -> Tensor:
        trained = self.weight[classes.columns].to(classes.texts.dtype)
        rows = classes.texts.index_copy(0, classes.known, trained)
        return self.cosines(self.clip.vision.joint(features), rows)

    def cosines(self, features: Tensor, rows: Tensor) -> Tensor:
        """Logits [B, C] of image features [B, Ds], of length 1, with class vectors [C, Ds]."""
        return self.clip.logit_scale * features @ F.normalize(rows, dim=-1).T
