"""Settings of SS-Text and SS-Text+, and published values."""

from dataclasses import replace

from lamp_fast.methods.settings import MethodEntry

SS_TEXT = MethodEntry(
    "ss_text.SsText",
    "SS-Text",
    no_ensemble=None,
    own_loss="SS-Text is a closed form, without logits that are trained",
)

SS_TEXT_PLUS = replace(SS_TEXT, model="ss_text.SsTextPlus", title="SS-Text+")
