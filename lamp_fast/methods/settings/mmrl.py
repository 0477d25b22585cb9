"""Settings of MMRL and MMRL++, and published values."""

from dataclasses import dataclass
from typing import Annotated, Any

from lamp_fast.fields import Bounds
from lamp_fast.methods.settings import MethodEntry, Preset, sgd
from lamp_fast.methods.settings.rep_tokens import RepTokenSettings


@dataclass(frozen=True)
class MmrlSettings(RepTokenSettings):
    """MMRL: multi-modal representation learning."""


@dataclass(frozen=True)
class MmrlPlusPlusSettings(RepTokenSettings):
    """MMRL++: fewer parameters, and tokens that pass on what they learn."""

    rep_beta: Annotated[float, Bounds(0, 1)] = 0.9
    """Share of a layer's own tokens, beside what the layer before made of its own."""
    aligner_rank: Annotated[int, Bounds(1, 16_384)] = 4
    """Rank of what a layer's map of the vectors adds to the map that its tower's layers share."""
    head_rank: Annotated[int, Bounds(1, 16_384)] = 64
    """Rank of what the tokens' projection adds to CLIP's."""


def _adamw(lr: float, epochs: int, batch: int, warmup_epochs: int = 1) -> dict[str, Any]:
    return {**sgd(lr, epochs, batch, warmup_epochs), "optimiser": "adamw"}


# Random crops of training pictures show at least half of them.
VIEWS = {"crop_area": 0.5}


_MMRL_BY_DATA = {
    "stanford_cars": {"reg_weight": 7.0},
    "fgvc_aircraft": {"reg_weight": 6.0},
    "sun397": {"reg_weight": 6.0},
    "dtd": {"reg_weight": 6.0},
    "food101": {"reg_weight": 5.0},
    "flowers102": {"reg_weight": 4.0},
    "ucf101": {"reg_weight": 3.0},
    "imagenet": {"reg_weight": 0.5},
    "caltech101": {"reg_weight": 0.5},
    "oxford_pets": {"reg_weight": 0.2},
    "eurosat": {"reg_weight": 0.01, "rep_width": 2048},
}


_MMRL_PLUS_PLUS_BY_DATA = {
    data: {"rep_beta": beta, "reg_weight": weight}
    for data, beta, weight in (
        ("imagenet", 0.9, 0.2),
        ("fgvc_aircraft", 0.9, 2.0),
        ("ucf101", 0.9, 3.0),
        ("dtd", 0.9, 7.0),
        ("oxford_pets", 0.7, 0.01),
        ("stanford_cars", 0.7, 6.0),
        ("caltech101", 0.6, 3.0),
        ("sun397", 0.5, 3.0),
        ("flowers102", 0.4, 7.0),
        ("eurosat", 0.2, 0.01),
        ("food101", 0.1, 1.0),
    )
}


MMRL = MethodEntry(
    "mmrl.Mmrl",
    "MMRL",
    MmrlSettings,
    presets={
        "mmrl": Preset(
            _adamw(1e-3, 10, 4),
            by_data={"imagenet": {"epochs": 5, "batch": 32}},
            own_by_data=_MMRL_BY_DATA,
            views=VIEWS,
        ),
        "mmrl-all": Preset(
            _adamw(1e-3, 50, 32),
            {"reg_weight": 0.5},
            by_data={"imagenet": {"epochs": 5}},
            own_by_data=_MMRL_BY_DATA,
            views=VIEWS,
        ),
        "mmrl-source": Preset(
            _adamw(1e-3, 1, 32, warmup_epochs=0), {"reg_weight": 0.2}, views=VIEWS
        ),
    },
)

MMRL_PLUS_PLUS = MethodEntry(
    "mmrl.MmrlPlusPlus",
    "MMRL++",
    MmrlPlusPlusSettings,
    presets={
        "mmrl++": Preset(
            _adamw(1e-3, 10, 4),
            by_data={"imagenet": {"epochs": 5, "batch": 32}},
            own_by_data=_MMRL_PLUS_PLUS_BY_DATA,
            views=VIEWS,
        ),
        "mmrl++-all": Preset(
            _adamw(2e-3, 100, 32),
            by_data={"imagenet": {"lr": 1e-3, "epochs": 5}},
            own_by_data=_MMRL_PLUS_PLUS_BY_DATA,
            views=VIEWS,
        ),
        "mmrl++-source": Preset(
            _adamw(1e-3, 1, 32, warmup_epochs=0), {"reg_weight": 0.1}, views=VIEWS
        ),
    },
)
