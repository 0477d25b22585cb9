"""Settings of LAMP, and published values."""

from dataclasses import dataclass
from typing import Annotated, Literal

from lamp_fast.data.settings import DataConfig
from lamp_fast.errors import InputError
from lamp_fast.fields import MAX_LAYER, Bounds, Layers, format_layers
from lamp_fast.methods.settings import MethodEntry, MethodSettings, Preset


@dataclass(frozen=True)
class LampSettings(MethodSettings):
    """LAMP: prompt pool (MPP), modality-shared prompts (MSP), load balancing (LBO)."""

    k: Annotated[int, Bounds(1, 16_384)] = 2
    """K: prompts retrieved from each layer's pool."""
    s: Annotated[int, Bounds(1, 4096)] = 2
    """S: modality-shared prompts of each layer."""
    d: Annotated[int, Bounds(1, 4096)] = 32
    """D: width of the prompts before projection."""
    layers: Annotated[Layers, Bounds(1, MAX_LAYER)] = tuple(range(3, 13))
    """Sec: the layers with prompts, from 1, both ends included (3..12, or 3,5,9)."""
    m: Annotated[int, Bounds(1, 16_384)] = 20
    """M: prompts in each layer's pool."""
    beta: Annotated[float, Bounds(0, 1_000_000)] = 1.0
    """Weight of the similarity loss (Eq. 11)."""
    gamma: Annotated[float, Bounds(0, 1_000_000)] = 5e-4
    """gamma_0: first step of the load-balancing bias, cosine to 0 (Eq. 9)."""
    text_query: Literal["image", "class"] = "image"
    """Who retrieves the text prompts: the image (the equations as printed) or each class."""
    mpp: bool = True
    """Off: no prompt pool (Table 6)."""
    msp: bool = True
    """Off: no shared prompts (Table 6)."""
    lbo: bool = True
    """Off: the bias stays 0 (Table 6)."""
    lbo_sign: Literal["balance", "printed"] = "balance"
    """printed: Eq. 9's own sign, which raises over-used prompts (for study)."""
    lbo_count: Literal["biased", "unbiased"] = "biased"
    """Which selection is counted: the activated one, or Eq. 10's without the bias (for study)."""
    phi: Literal["mlp", "linear"] = "mlp"
    """The projectors: D -> --phi-hidden, ReLU, -> the tower's width, or one affine map."""
    phi_hidden: Annotated[int, Bounds(1, 16_384)] = 32
    """Width between the two layers of --phi mlp."""
    phi_bias: bool = True
    """Off: projectors without biases (an ablation)."""
    similarity_gradient: Literal["keys", "both"] = "keys"
    """What the similarity loss moves: the keys alone, or also the tokens that they are compared
    with, and so the prompts of every layer below."""
    adapt_passes: Annotated[int, Bounds(1, 1_000_000)] = 1
    """Passes over the unlabelled new-class pictures that adapt the bias (the transductive row)."""

    @property
    def phi_widths(self) -> tuple[int, ...]:
        """Widths that a prompt passes through in phi before the tower's."""
        return (self.d, self.phi_hidden) if self.phi == "mlp" else (self.d,)

    def check_together(self) -> None:
        if self.k > self.m:
            raise InputError(f"--k {self.k}: expected at most the pool size --m {self.m}")
        if self.phi == "linear" and self.phi_hidden != LampSettings.phi_hidden:
            raise InputError(f"--phi-hidden {self.phi_hidden}: --phi linear has no hidden layer")
        if not (self.mpp or self.msp):
            raise InputError("--no-mpp --no-msp: expected at least one of the two kinds of prompts")

    def describe(self) -> str:
        """On one line."""
        return (
            f"K={self.k} S={self.s} D={self.d} M={self.m} layers {format_layers(self.layers)}"
            f" beta={self.beta:g} gamma={self.gamma:g} text per {self.text_query}"
        )


_SECTION_41 = {"optimiser": "adam", "lr": 3e-4, "batch": 128, "epochs": 50}
_TINY = "tiny"

# The paper's, and that of the carried CLIP.
_PRESETS = {
    "table16-imb": Preset(),
    "table16-fewshot": Preset({"lr": 1e-3, "batch": 32}, {"k": 4, "s": 4}),
    "table16-cross": Preset({"lr": 1e-3, "batch": 32, "epochs": 1}, {"k": 4, "s": 4}),
    "section4.1": Preset(_SECTION_41),
    "ablation-best": Preset(
        _SECTION_41, {"k": 6, "s": 4, "d": 64, "layers": tuple(range(6, 13)), "beta": 2.0}
    ),
    _TINY: Preset(
        {"lr": 3e-3, "batch": 16, "epochs": 30}, {"layers": (3, 4, 5, 6), "adapt_passes": 10}
    ),
}


@dataclass(frozen=True)
class _LampEntry(MethodEntry):
    def default_preset(self, name: str, clip: str, data: DataConfig) -> str:
        """By the CLIP: the carried one has its own."""
        return _TINY if clip == "tiny" else "table16-imb"


LAMP = _LampEntry(
    "lamp.model.Lamp",
    "LAMP",
    LampSettings,
    _PRESETS,
    no_as_published="expected another --method; LAMP has --path literal",
)
