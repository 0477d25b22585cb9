"""LAMP (the paper's method): prompt pools, shared prompts and load balancing in a frozen CLIP."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamp_fast.clip.prompts import ClassPrompts, class_prompts
from lamp_fast.clip.settings import Trimming
from lamp_fast.clip.towers import FrozenClip
from lamp_fast.data.benchmark import NOWHERE, Origin
from lamp_fast.errors import InputError
from lamp_fast.fields import format_layers
from lamp_fast.methods.base import Criterion, Method, Step, SumOverRanks, backward_in_pieces
from lamp_fast.methods.fixed import Sides, cast_floating
from lamp_fast.methods.lamp import literal
from lamp_fast.methods.lamp.balance import LoadBalance
from lamp_fast.methods.lamp.exact import (
    ClassTexts,
    EncodedImages,
    ExactLamp,
    ImageEncoder,
    TextEncoder,
    project,
)
from lamp_fast.methods.lamp.export import apart
from lamp_fast.methods.lamp.memory import affordable_block, free_memory
from lamp_fast.methods.lamp.prompts import LayerPrompts
from lamp_fast.methods.lamp.state import Forward, Selections, over_ranks, similarity_loss
from lamp_fast.methods.settings.lamp import LAMP, LampSettings
from lamp_fast.methods.surroundings import Surroundings


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
        trimming: what the exact path leaves out.

    Raises:
        InputError: layers outside the towers.
    """

    entry = LAMP
    independent_names = True

    def __init__(
        self,
        clip: FrozenClip,
        config: LampSettings,
        path: str = "exact",
        trimming: Trimming | None = None,
    ) -> None:
        super().__init__(clip)
        if not config.layers or config.layers[-1] > clip.depth:
            raise InputError(
                f"--layers {format_layers(config.layers)}: expected layers within 1..{clip.depth},"
                " the depth of the shorter tower"
            )
        self.config = config
        self.path = path
        self.trimming = trimming or Trimming()
        self.block = self.trimming.block
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
        self.match_clip()

    @classmethod
    def build(cls, clip: FrozenClip, settings: LampSettings, surroundings: Surroundings) -> "Lamp":
        return cls(clip, settings, surroundings.path, surroundings.trimming)

    def describe(self, settings: LampSettings, optim: Mapping[str, Any]) -> str:
        return f"{settings.describe()}, {self.path} path"

    @property
    def first_changed_layer(self) -> int:
        return self.config.layers[0]

    @property
    def has_bias(self) -> bool:
        return self.config.mpp

    @property
    def shares_routes(self) -> bool:
        return self.trimming.share_routes and self.config.text_query == "image"

    @property
    def text_per_picture(self) -> bool:
        return self.config.text_query == "image"

    @property
    def no_class_matrix(self) -> str | None:
        own = "every picture has its own text with --text-query image"
        return own if self.text_per_picture else None

    def choose_block(self, names: Sequence[str], template: str) -> int:
        """What a step can keep for backward within half of the memory that is free now."""
        budget = free_memory(next(self.clip.parameters()).device) // 2
        return affordable_block(self.prepare(names, template), self.clip, budget)

    @property
    def capturable(self) -> bool:
        """The literal path takes single rows out by values."""
        return self.path == "exact"

    def prepare(
        self, names: Sequence[str], template: str, origin: Origin = NOWHERE
    ) -> ClassPrompts:
        """Forests behind the layers below the first selected one, which no prompt reaches; bot,
        which none reaches in any, apart."""
        return class_prompts(
            self.clip,
            names,
            template,
            first_layer=self.config.layers[0] if self.trimming.prepare_text else 1,
            most_rows=self.trimming.most_rows,
            # With a query a class even equal beginnings see different prompts.
            share=self.trimming.share_tokens and self.config.text_query == "image",
            bot_row=False,
        )

    def forward(
        self,
        images: Tensor,
        classes: ClassPrompts,
        adapted: bool = False,
        fixed_shapes: bool = False,
    ) -> Forward:
        """One pass, pure: nothing is counted or moved."""
        if self.path == "literal":
            return literal.forward(self, images, classes, self._bias(adapted))
        return self.exact(classes, adapted, fixed_shapes)(images)

    def exact(
        self,
        classes: ClassPrompts,
        adapted: bool = False,
        fixed_shapes: bool = False,
        text: ClassTexts | None = None,
        clip: FrozenClip | None = None,
    ) -> ExactLamp:
        """The exact path with the parameters as they are now.

        Args:
            classes: of :meth:`prepare`.
            adapted: retrieve with the bias that :meth:`adapt` moved.
            fixed_shapes: no shape may depend on a value.
            text: with ``text_query=class``, what :meth:`class_texts` gave before.
            clip: in place of its own, with the same weights.
        """
        clip = clip or self.clip
        image_bias, text_bias = self._bias(adapted)
        if text is None and self.config.text_query == "class":
            text = self.class_texts(classes, text_bias)
        share = self.trimming.share_routes and not fixed_shapes
        return ExactLamp(
            images=self._image_encoder(clip, image_bias),
            text=text or self._text_encoder(clip, classes, text_bias, share),
            logit_scale=clip.logit_scale,
        )

    def encode_images(self, images: Tensor, bias: Tensor | None = None) -> EncodedImages:
        """Features of pictures [B, 3, S, S] and what they retrieve.

        Args:
            images: [B, 3, S, S].
            bias: float32 [layers, M]; by default the trained one.
        """
        bias = self.image_balance.bias if bias is None else bias
        return self._image_encoder(self.clip, bias)(images)

    def class_texts(self, classes: ClassPrompts, bias: Tensor) -> ClassTexts:
        """Text features where each class retrieves; bias is float32 [layers, M]."""
        return self._text_encoder(self.clip, classes, bias, share_routes=False).class_texts()

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        classes: ClassPrompts,
        criterion: Criterion,
        fixed_shapes: bool = False,
    ) -> Step:
        """Eq. 11: cross-entropy + beta * similarity loss."""
        result = self(images, classes, fixed_shapes=fixed_shapes)
        return self._step(result, labels, criterion)

    def accumulate(
        self,
        images: Tensor,
        labels: Tensor,
        classes: ClassPrompts,
        criterion: Criterion,
        pieces: int,
        scale: Callable[[Tensor], Tensor],
        fixed_shapes: bool = False,
    ) -> list[Step]:
        """As the base class says; with ``text_query=class`` the text is computed once a batch.

        The pieces leave their gradients on a detached copy of the text features, which then go
        through the text tower in one backward.
        """
        once = self.path == "exact" and self.config.text_query == "class"
        if not once or pieces == 1:
            step = partial(
                self.step, classes=classes, criterion=criterion, fixed_shapes=fixed_shapes
            )
            return backward_in_pieces(step, images, labels, pieces, scale)
        text = self.class_texts(classes, self.text_balance.bias)
        leaf = text.features.detach().requires_grad_()
        similarity = [each.detach() for each in text.similarity]
        held = ClassTexts(leaf, similarity, text.counts)

        def step(some: Tensor, their: Tensor) -> Step:
            return self._step(self.exact(classes, text=held)(some), their, criterion)

        steps = backward_in_pieces(step, images, labels, pieces, scale)
        roots, gradients = [text.features], [leaf.grad]
        if text.similarity:
            roots.append(scale(self.config.beta * similarity_loss(text.similarity)))
            gradients.append(None)
        torch.autograd.backward(roots, gradients)
        return steps

    @torch.no_grad()
    def logits(self, images: Tensor, classes: ClassPrompts, adapted: bool = False) -> Tensor:
        """Class scores [B, C]; text per class is kept until what it depends on changes."""
        kept = self.path == "exact" and self.config.text_query == "class"
        if not (kept and self.trimming.cache_text):
            return self(images, classes, adapted).logits
        bias = self._bias(adapted)[1]
        compute = partial(self.class_texts, classes, bias)
        text = self._kept.get(classes, (bias, *self.parameters()), compute)
        return self.exact(classes, adapted, text=text)(images).logits

    @torch.no_grad()
    def fixed_sides(self, clip: FrozenClip, classes: ClassPrompts, adapted: bool = False) -> Sides:
        """One picture side serves the class lists of one bias."""
        exact = apart(self.exact(classes, adapted, fixed_shapes=True, clip=clip))
        return Sides(lambda pictures: exact.images(pictures).features, exact.text.features)

    @torch.no_grad()
    def fixed_logits(
        self, clip: FrozenClip, classes: ClassPrompts, adapted: bool = False
    ) -> Callable[[Tensor], Tensor]:
        if self.no_class_matrix is None:
            return super().fixed_logits(clip, classes, adapted)
        classes = cast_floating(classes, clip.dtype)
        exact = apart(self.exact(classes, adapted, fixed_shapes=True, clip=clip))
        return lambda pictures: exact(pictures).logits

    @torch.no_grad()
    def routes(self, images: Tensor) -> list[Tensor]:
        """Per selected layer, the pool entries int64 [B, K] that each image retrieves."""
        return list(self.encode_images(images).chosen)

    def start_epoch(self) -> None:
        self.image_balance.start_epoch()
        self.text_balance.start_epoch()

    def after_step(
        self,
        observations: Sequence[Selections | None],
        progress: Tensor,
        sum_over_ranks: SumOverRanks | None = None,
    ) -> None:
        """One LBO update for the whole step.

        Image selections add up over the step's pieces and ranks; the classes are the same in all of
        them and count once.
        """
        pieces = [each for each in observations if each is not None]
        here = None
        if pieces:
            here = Selections(
                torch.stack([each.image for each in pieces]).sum(0),
                sum(each.image_rows for each in pieces),
                pieces[0].text,
                pieces[0].text_rows,
            )
        self._balance(here, self.image_balance, self.text_balance, progress, sum_over_ranks)

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
    def adapt(
        self,
        batches: Sequence[Tensor],
        classes: ClassPrompts,
        sum_over_ranks: SumOverRanks | None = None,
    ) -> dict[str, Any] | None:
        """Move a copy of b over unlabelled pictures of new classes.

        See docs/mathematics.md, New classes. Each pass over ``batches`` is an epoch: totals start
        at zero. The planned total T is the passes' own number of updates. With
        ``text_query=class`` the text's bias adapts to the new names in the same updates.

        Returns:
            The number of updates and the load's spread per layer with b_base and with b_new; None
            without a pool or load balancing.
        """
        if not (self.config.mpp and self.config.lbo):
            return None
        image, text = self.new_image_balance, self.new_text_balance
        image.load_state_dict(self.image_balance.state_dict())
        text.load_state_dict(self.text_balance.state_dict())
        before = self._load_std(batches, self.image_balance.bias, sum_over_ranks)
        steps = self.config.adapt_passes * len(batches)
        taken = 0
        for _ in range(self.config.adapt_passes):
            image.start_epoch()
            text.start_epoch()
            for images in batches:
                here = None
                if len(images):
                    counts = self.encode_images(images, image.bias).counts
                    chosen: Sequence[Tensor] = ()
                    if self.config.text_query == "class":
                        chosen = self.class_texts(classes, text.bias).counts
                    here = Selections.of(counts, len(images), chosen, len(classes))
                self._balance(here, image, text, taken / steps, sum_over_ranks)
                taken += 1
        after = self._load_std(batches, image.bias, sum_over_ranks)
        return {"steps": taken, "load_std_before": before, "load_std_after": after}

    def prompts_of(self, layer: int) -> LayerPrompts | None:
        """The prompts of a layer, from 1; None where it has none."""
        return self.prompts[str(layer)] if layer in self.config.layers else None

    def _image_encoder(self, clip: FrozenClip, bias: Tensor) -> ImageEncoder:
        rows = [prompts.visual_rows() for prompts in self.prompts.values()]
        pools = project(clip.vision.blocks, rows, bias, clip.dtype, self.config, self.trimming)
        return ImageEncoder(clip.vision, pools, self.trimming.last_row)

    def _text_encoder(
        self, clip: FrozenClip, classes: ClassPrompts, bias: Tensor, share_routes: bool
    ) -> TextEncoder:
        rows = [prompts.text_rows() for prompts in self.prompts.values()]
        how = clip.dtype, self.config, self.trimming
        pools = project(clip.text.blocks, rows, bias, *how, classes.bot)
        last_row = self.trimming.last_row
        return TextEncoder(clip.text, pools, classes, last_row, share_routes, self.block)

    def _step(self, result: Forward, labels: Tensor, criterion: Criterion) -> Step:
        cross_entropy = criterion(result.logits, labels)
        similarity = similarity_loss([*result.image_similarity, *result.text_similarity])
        return Step(
            loss=cross_entropy + self.config.beta * similarity,
            logits=result.logits,
            terms={"cross_entropy": cross_entropy.detach(), "similarity_loss": similarity.detach()},
            observations=result.selections,
        )

    def _load_std(
        self, batches: Sequence[Tensor], bias: Tensor, sum_over_ranks: SumOverRanks | None
    ) -> list[float]:
        measure = self._new_balance().to(bias.device)
        for images in batches:
            if len(images):
                measure.chosen += torch.stack(self.encode_images(images, bias).counts)
                measure.rows += len(images)
        if sum_over_ranks is not None:
            sum_over_ranks(measure.chosen)
            sum_over_ranks(measure.rows)
        return measure.load_std()

    def _balance(
        self,
        here: Selections | None,
        image: LoadBalance,
        text: LoadBalance,
        progress: Tensor | float,
        sum_over_ranks: SumOverRanks | None,
    ) -> None:
        """One LBO update with what a step chose on all ranks; ``here`` is None without a row."""
        if self.config.mpp and sum_over_ranks is not None:
            here = over_ranks(here, image.chosen, sum_over_ranks)
        if here is not None:
            image.update(here.image, here.image_rows, progress)
            if here.text is not None:
                text.update(here.text, here.text_rows, progress)

    def _bias(self, adapted: bool = False) -> tuple[Tensor, Tensor]:
        if adapted:
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
