"""Methods by name: one file and one line here each."""

from lamp_fast.errors import InputError
from lamp_fast.methods.base import Method, Step, TrainingSet
from lamp_fast.methods.candle import Candle
from lamp_fast.methods.clap import Clap, ZeroShotProbe
from lamp_fast.methods.clip_adapter import ClipAdapter
from lamp_fast.methods.clip_lora import ClipLora
from lamp_fast.methods.cocoop import CoCoOp
from lamp_fast.methods.coop import CoOp
from lamp_fast.methods.lamp import Lamp
from lamp_fast.methods.lfa import Lfa
from lamp_fast.methods.lift import Lift, LiftPlus
from lamp_fast.methods.linear_probe import LinearProbe
from lamp_fast.methods.lp_plus_plus import LpPlusPlus
from lamp_fast.methods.maple import MaPLe
from lamp_fast.methods.mma import Mma
from lamp_fast.methods.mmrl import Mmrl, MmrlPlusPlus
from lamp_fast.methods.prolip import ProLip
from lamp_fast.methods.promptlt import PromptLt
from lamp_fast.methods.promptsrc import PromptSrc
from lamp_fast.methods.settings import Preset, RunClasses, Surroundings
from lamp_fast.methods.ss_text import SsText, SsTextPlus
from lamp_fast.methods.tcp import Tcp
from lamp_fast.methods.tip import Tip, TipF
from lamp_fast.methods.two_stage import TwoStage
from lamp_fast.methods.zeroshot import ZeroShot

METHODS: dict[str, type[Method]] = {
    "lamp": Lamp,
    "zeroshot": ZeroShot,
    "coop": CoOp,
    "cocoop": CoCoOp,
    "maple": MaPLe,
    "tcp": Tcp,
    "mma": Mma,
    "lfa": Lfa,
    "candle": Candle,
    "lift": Lift,
    "lift+": LiftPlus,
    "linear-probe": LinearProbe,
    "lp++": LpPlusPlus,
    "tip": Tip,
    "tip-f": TipF,
    "clip-adapter": ClipAdapter,
    "zs-lp": ZeroShotProbe,
    "clap": Clap,
    "prolip": ProLip,
    "ss-text": SsText,
    "ss-text+": SsTextPlus,
    "promptsrc": PromptSrc,
    "mmrl": Mmrl,
    "mmrl++": MmrlPlusPlus,
    "clip-lora": ClipLora,
    "2sfs": TwoStage,
    "promptlt": PromptLt,
}


def find_preset(name: str) -> tuple[str, Preset]:
    """A preset and the method that it is of.

    Raises:
        InputError: an unknown name.
    """
    known = {
        preset: (method, kind.presets[preset])
        for method, kind in METHODS.items()
        for preset in kind.presets
    }
    if name not in known:
        raise InputError(f"--preset {name}: expected one of {', '.join(known)}")
    return known[name]


__all__ = [
    "METHODS",
    "Candle",
    "Clap",
    "ClipAdapter",
    "ClipLora",
    "CoCoOp",
    "CoOp",
    "Lamp",
    "Lfa",
    "Lift",
    "LiftPlus",
    "LinearProbe",
    "LpPlusPlus",
    "MaPLe",
    "Method",
    "Mma",
    "Mmrl",
    "MmrlPlusPlus",
    "ProLip",
    "PromptLt",
    "PromptSrc",
    "RunClasses",
    "SsText",
    "SsTextPlus",
    "Step",
    "Surroundings",
    "Tcp",
    "Tip",
    "TipF",
    "TrainingSet",
    "TwoStage",
    "ZeroShot",
    "ZeroShotProbe",
    "find_preset",
]
