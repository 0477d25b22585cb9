"""Class names as CLIP tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lamp_fast import tiny
from lamp_fast.clip import FrozenClip
from lamp_fast.errors import InputError


@dataclass(frozen=True)
class ClassTokens:
    """The tokenised prompts of a list of classes.

    Attributes:
        names: the C class names.
        ids: token ids, int64 [C, context], [bot, template and name, eot, padding].
        eot: position of each eot, int64 [C].
    """

    names: tuple[str, ...]
    ids: Tensor
    eot: Tensor

    def __len__(self) -> int:
        return len(self.names)

    @property
    def trimmed_ids(self) -> Tensor:
        """ids cut after the last eot: under a causal mask nothing behind it is ever seen."""
        return self.ids[:, : int(self.eot.max()) + 1]


def tokenise(clip: FrozenClip, names: Sequence[str], template: str) -> ClassTokens:
    """Put each name into ``template`` and tokenise it with the CLIP's own tokenizer.

    Args:
        clip: whose tokenizer and eot rule; the ids land on its device.
        names: the class names, at least one.
        template: with ``{}`` where the name goes.

    Raises:
        InputError: no name, or a prompt longer than the context.
    """
    if not names:
        raise InputError("class names: got none, expected at least one")
    prompts = [template.replace("{}", name) for name in names]
    ids = clip.tokenizer(prompts)
    eot = clip.eot_positions(ids)
    context = ids.shape[1]
    for prompt, position in zip(prompts, eot.tolist(), strict=True):
        if position == context - 1 and _is_cut(clip, prompt, context):
            raise InputError(f"class prompt {prompt[:60]!r}: longer than {context} tokens")
    if clip.identity is not None and clip.identity.name == "tiny":
        tiny.warn_unseen_tokens(ids)
    device = next(clip.parameters()).device
    return ClassTokens(tuple(names), ids.to(device), eot.to(device))


def _is_cut(clip: FrozenClip, prompt: str, context: int) -> bool:
    longer = clip.tokenizer([prompt], context_length=context + 1)
    return bool(clip.eot_positions(longer) >= context)
