"""Settings of LP++, and published values."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import Bounds
from lamp_fast.methods.settings import MethodEntry, MethodSettings


@dataclass(frozen=True)
class LpPlusPlusSettings(MethodSettings):
    """LP++: a linear probe beside class texts."""

    lp_steps: Annotated[int, Bounds(1, 1_000_000)] = 300
    """Steps of gradient descent over the whole training set."""

    @property
    def uses_validation(self) -> bool:
        return True


LP_PLUS_PLUS = MethodEntry(
    "lp_plus_plus.LpPlusPlus",
    "LP++",
    LpPlusPlusSettings,
    no_ensemble=None,
    own_loss="LP++ descends by steps of its own, which are made for cross-entropy",
    no_new_names="LP++ has weights for each trained class, and no other",
)
