"""Settings of the linear probe, and published values."""

from dataclasses import dataclass
from typing import Annotated, Literal

from lamp_fast.fields import Bounds, FloatOrNone
from lamp_fast.methods.settings import MethodEntry, MethodSettings


@dataclass(frozen=True)
class LinearProbeSettings(MethodSettings):
    """Linear probe: scikit-learn's logistic regression on image features."""

    probe_features: Literal["projected", "unprojected"] = "projected"
    """What it reads of a picture, not normalised: CLIP's joint space, as CoOp does, or the wider
    features before the projection, as CLIP's paper does for ViTs."""
    probe_class_weight: Literal["none", "balanced"] = "none"
    """balanced weighs every class alike, however many pictures it has; C is then chosen by the mean
    of the classes' accuracies on the validation pictures, else by accuracy."""
    probe_c: Annotated[FloatOrNone, Bounds(above=0, high=1e30)] = None
    """Inverse strength of the regularisation; none chooses it on the validation pictures."""

    @property
    def uses_validation(self) -> bool:
        return self.probe_c is None


LINEAR_PROBE = MethodEntry(
    "linear_probe.LinearProbe",
    "Linear probe",
    LinearProbeSettings,
    no_ensemble=None,
    own_loss="the probe is scikit-learn's logistic regression, whose loss is its own;"
    " --probe-class-weight balanced is its answer to classes of unequal size",
    no_new_names="a linear probe has a row of weights for each trained class, and no other",
)
