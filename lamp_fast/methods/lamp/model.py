"""LAMP (the paper's method): prompt pools, shared prompts and load balancing in a frozen CLIP."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamp_fast.clip import Block, FrozenClip
from lamp_fast.config import LampConfig, format_layers
from lamp_fast.errors import InputError
from lamp_fast.methods.base import Criterion, Method, Step
from lamp_fast.methods.lamp import exact, literal
from lamp_fast.methods.lamp.balance import LoadBalance
from lamp_fast.methods.lamp.prompts import LayerPrompts
from lamp_fast.methods.lamp.state import Forward, LampClasses, Selections
from lamp_fast.tokens import tokenise

PATHS = {"exact": exact.forward, "literal": literal.forward}


class Lamp(Method):
    """LAMP over a frozen CLIP.

    Args:
        clip: the frozen CLIP.
        config: K, S, D, layers and every ablation.
        path: "exact" or "literal"; the same numbers to rounding.

    Parameters stay float32 whatever the CLIP computes in (float64 with a float64 CLIP).

    Attributes:
        image_balance, text_balance: b and totals learned in training; the text's moves only with
            ``text_query=class``.
        new_image_balance, new_text_balance: the same adapted to new classes by :meth:`adapt`.
        use_adapted: retrieve with the adapted bias.
        pair_block: most (image, class) pairs that evaluation encodes at once.

    Raises:
        InputError: layers outside the towers.
    """

    def __init__(self, clip: FrozenClip, config: LampConfig, path: str = "exact") -> None:
        super().__init__(clip)
        if not config.layers or config.layers[-1] > clip.depth:
            raise InputError(
                f"--layers {format_layers(config.layers)}: expected layers within 1..{clip.depth},"
                " the depth of the shorter tower"
            )
        self.config = config
        self.path = path
        self.pair_block = 2048
        self.use_adapted = False
        self.prompts = nn.ModuleDict(
            {
                str(layer): LayerPrompts(config, clip.vision.width, clip.text.width)
                for layer in config.layers
            }
        )
        self.image_balance = self._new_balance()
        self.text_balance = self._new_balance()
        self.new_image_balance = self._new_balance()
        self.new_text_balance = self._new_balance()
        self.to(next(clip.parameters()).device)
        if clip.dtype == torch.float64:
            self.double()

    def prepare(self, names: Sequence[str], template: str) -> LampClasses:
        """Tokenise, and run the text layers below the first selected one: they see no prompt."""
        tokens = tokenise(self.clip, names, template)
        with torch.no_grad():
            x = self.clip.text.embed(tokens.trimmed_ids)
            for block in self.clip.text.blocks[: self.config.layers[0] - 1]:
                x = block(x, causal=True)
        return LampClasses(tokens, x)

    def forward(self, images: Tensor, classes: LampClasses) -> Forward:
        """One pass, pure: nothing is counted or moved."""
        return PATHS[self.path](self, images, classes, self._bias())

    def step(
        self, images: Tensor, labels: Tensor, classes: LampClasses, criterion: Criterion
    ) -> Step:
        """Eq. 11: cross-entropy + beta * similarity loss."""
        result = self(images, classes)
        cross_entropy = criterion(result.logits, labels)
        similarity_loss = result.similarity_loss()
        return Step(
            loss=cross_entropy + self.config.beta * similarity_loss,
            logits=result.logits,
            terms={
                "cross_entropy": cross_entropy.detach(),
                "similarity_loss": similarity_loss.detach(),
            },
            observations=result.selections,
        )

    @torch.no_grad()
    def logits(self, images: Tensor, classes: LampClasses) -> Tensor:
        return self(images, classes).logits

    def start_epoch(self) -> None:
        self.image_balance.start_epoch()
        self.text_balance.start_epoch()

    def after_step(self, observations: Sequence[Selections | None], progress: float) -> None:
        """One LBO update for the whole step.

        Image selections add up over the step's pieces; the classes are the same in every piece and
        count once.
        """
        pieces = [each for each in observations if each is not None]
        if pieces:
            image = torch.stack([each.image for each in pieces]).sum(0)
            rows = sum(each.image_rows for each in pieces)
            self.image_balance.update(image, rows, progress)
            if pieces[0].text is not None:
                self.text_balance.update(pieces[0].text, pieces[0].text_rows, progress)

    def epoch_log(self) -> dict[str, Any]:
        """Per layer: activations of every prompt, load spread, mean key-to-key cosine."""
        if not self.config.mpp:
            return {}
        log: dict[str, Any] = {
            "layers": list(self.config.layers),
            "activations": self.image_balance.chosen.tolist(),
            "load_std": self.image_balance.load_std(),
            "key_cosine": self.key_cosines(),
        }
        if self.config.text_query == "class":
            log["text_activations"] = self.text_balance.chosen.tolist()
            log["text_load_std"] = self.text_balance.load_std()
        return log

    @torch.no_grad()
    def key_cosines(self) -> list[float]:
        """Per selected layer, the mean cosine between two different keys phi_v(V)."""
        means = []
        for prompts in self.prompts.values():
            keys = F.normalize(prompts.visual_rows()[: self.config.m], dim=-1)
            cosines = keys @ keys.T
            pairs = max(self.config.m * (self.config.m - 1), 1)
            means.append(float((cosines.sum() - cosines.diagonal().sum()) / pairs))
        return means

    @torch.no_grad()
    def adapt(self, batches: Iterable[Tensor], classes: LampClasses) -> dict[str, Any] | None:
        """Move a copy of b over unlabelled pictures of new classes (SPEC, "New classes").

        Each pass over ``batches`` is an epoch: totals start at zero. The planned total T is the
        passes' own number of updates. With ``text_query=class`` the text's bias adapts to the new
        names in the same updates.

        Returns:
            The number of updates and the load's spread per layer with b_base and with b_new; None
            without a pool or load balancing.
        """
        if not (self.config.mpp and self.config.lbo):
            return None
        image, text = self.new_image_balance, self.new_text_balance
        image.load_state_dict(self.image_balance.state_dict())
        text.load_state_dict(self.text_balance.state_dict())
        before = self._load_std(batches, self.image_balance.bias)
        steps = self.config.adapt_passes * sum(1 for _ in batches)
        taken = 0
        for _ in range(self.config.adapt_passes):
            image.start_epoch()
            text.start_epoch()
            for images in batches:
                progress = taken / steps
                _, _, _, counts = exact.encode_images(self, images, image.bias)
                image.update(torch.stack(counts), len(images), progress)
                if self.config.text_query == "class":
                    _, _, text_counts = exact.encode_class_texts(self, classes, text.bias)
                    text.update(torch.stack(text_counts), len(classes), progress)
                taken += 1
        after = self._load_std(batches, image.bias)
        return {"steps": taken, "load_std_before": before, "load_std_after": after}

    def prompts_of(self, layer: int) -> LayerPrompts | None:
        """The prompts of a layer, from 1; None where it has none."""
        name = str(layer)
        return self.prompts.get(name, None)

    def prompted_text_blocks(self) -> Iterator[tuple[int, Block]]:
        """(number, block) of the text tower from the first selected layer to its end."""
        first = self.config.layers[0]
        return enumerate(self.clip.text.blocks[first - 1 :], first)

    def _load_std(self, batches: Iterable[Tensor], bias: Tensor) -> list[float]:
        measure = self._new_balance().to(bias.device)
        for images in batches:
            _, _, _, counts = exact.encode_images(self, images, bias)
            measure.chosen += torch.stack(counts)
            measure.rows += len(images)
        return measure.load_std()

    def _bias(self) -> tuple[Tensor, Tensor]:
        if self.use_adapted:
            return self.new_image_balance.bias, self.new_text_balance.bias
        return self.image_balance.bias, self.text_balance.bias

    def _new_balance(self) -> LoadBalance:
        config = self.config
        return LoadBalance(
            len(config.layers),
            config.m if config.mpp else 0,
            config.k,
            config.gamma if config.lbo else 0.0,
            raise_overused=config.lbo_sign == "printed",
        )
