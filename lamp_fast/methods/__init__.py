"""Methods by name: one line here each. No torch is imported before :meth:`MethodEntry.load`."""

from lamp_fast.errors import InputError
from lamp_fast.methods.settings import (
    MethodEntry,
    Preset,
    candle,
    clap,
    clip_adapter,
    clip_lora,
    cocoop,
    coop,
    lamp,
    lfa,
    lift,
    linear_probe,
    lp_plus_plus,
    maple,
    mma,
    mmrl,
    prolip,
    promptlt,
    promptsrc,
    ss_text,
    tcp,
    tip,
    two_stage,
    zeroshot,
)

METHODS: dict[str, MethodEntry] = {
    "lamp": lamp.LAMP,
    "zeroshot": zeroshot.ZEROSHOT,
    "coop": coop.COOP,
    "cocoop": cocoop.COCOOP,
    "maple": maple.MAPLE,
    "tcp": tcp.TCP,
    "mma": mma.MMA,
    "lfa": lfa.LFA,
    "candle": candle.CANDLE,
    "lift": lift.LIFT,
    "lift+": lift.LIFT_PLUS,
    "linear-probe": linear_probe.LINEAR_PROBE,
    "lp++": lp_plus_plus.LP_PLUS_PLUS,
    "tip": tip.TIP,
    "tip-f": tip.TIP_F,
    "clip-adapter": clip_adapter.CLIP_ADAPTER,
    "zs-lp": clap.ZS_LP,
    "clap": clap.CLAP,
    "prolip": prolip.PROLIP,
    "ss-text": ss_text.SS_TEXT,
    "ss-text+": ss_text.SS_TEXT_PLUS,
    "promptsrc": promptsrc.PROMPTSRC,
    "mmrl": mmrl.MMRL,
    "mmrl++": mmrl.MMRL_PLUS_PLUS,
    "clip-lora": clip_lora.CLIP_LORA,
    "2sfs": two_stage.TWO_STAGE,
    "promptlt": promptlt.PROMPTLT,
}


def find_preset(name: str) -> tuple[str, Preset]:
    """A preset and the method that it is of.

    Raises:
        InputError: an unknown name.
    """
    known = {
        preset: (method, entry.presets[preset])
        for method, entry in METHODS.items()
        for preset in entry.presets
    }
    if name not in known:
        raise InputError(f"--preset {name}: expected one of {', '.join(known)}")
    return known[name]
