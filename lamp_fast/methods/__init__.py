"""Methods by name: one line here each. No torch is imported before :meth:`MethodEntry.load`."""

from lamp_fast.errors import InputError
from lamp_fast.methods.settings import MethodEntry, Preset
from lamp_fast.methods.settings.candle import CANDLE
from lamp_fast.methods.settings.clap import CLAP, ZS_LP
from lamp_fast.methods.settings.clip_adapter import CLIP_ADAPTER
from lamp_fast.methods.settings.clip_lora import CLIP_LORA
from lamp_fast.methods.settings.cocoop import COCOOP
from lamp_fast.methods.settings.coop import COOP
from lamp_fast.methods.settings.lamp import LAMP
from lamp_fast.methods.settings.lfa import LFA
from lamp_fast.methods.settings.lift import LIFT, LIFT_PLUS
from lamp_fast.methods.settings.linear_probe import LINEAR_PROBE
from lamp_fast.methods.settings.lp_plus_plus import LP_PLUS_PLUS
from lamp_fast.methods.settings.maple import MAPLE
from lamp_fast.methods.settings.mma import MMA
from lamp_fast.methods.settings.mmrl import MMRL, MMRL_PLUS_PLUS
from lamp_fast.methods.settings.prolip import PROLIP
from lamp_fast.methods.settings.promptlt import PROMPTLT
from lamp_fast.methods.settings.promptsrc import PROMPTSRC
from lamp_fast.methods.settings.ss_text import SS_TEXT, SS_TEXT_PLUS
from lamp_fast.methods.settings.tcp import TCP
from lamp_fast.methods.settings.tip import TIP, TIP_F
from lamp_fast.methods.settings.two_stage import TWO_STAGE
from lamp_fast.methods.settings.zeroshot import ZEROSHOT

METHODS: dict[str, MethodEntry] = {
    "lamp": LAMP,
    "zeroshot": ZEROSHOT,
    "coop": COOP,
    "cocoop": COCOOP,
    "maple": MAPLE,
    "tcp": TCP,
    "mma": MMA,
    "lfa": LFA,
    "candle": CANDLE,
    "lift": LIFT,
    "lift+": LIFT_PLUS,
    "linear-probe": LINEAR_PROBE,
    "lp++": LP_PLUS_PLUS,
    "tip": TIP,
    "tip-f": TIP_F,
    "clip-adapter": CLIP_ADAPTER,
    "zs-lp": ZS_LP,
    "clap": CLAP,
    "prolip": PROLIP,
    "ss-text": SS_TEXT,
    "ss-text+": SS_TEXT_PLUS,
    "promptsrc": PROMPTSRC,
    "mmrl": MMRL,
    "mmrl++": MMRL_PLUS_PLUS,
    "clip-lora": CLIP_LORA,
    "2sfs": TWO_STAGE,
    "promptlt": PROMPTLT,
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
