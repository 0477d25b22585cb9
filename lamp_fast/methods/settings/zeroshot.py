"""Settings of zero-shot CLIP, and published values."""

from lamp_fast.methods.settings import MethodEntry

ZEROSHOT = MethodEntry(
    "zeroshot.ZeroShot",
    "CLIP zero-shot",
    no_ensemble=None,
)
