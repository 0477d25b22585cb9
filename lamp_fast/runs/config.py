"""Every setting of a run, and its presets.

The dataclasses are the single source of the command line, of the saved ``config.json`` and of the
Python interface. Field names are the flags' names; numbers of equations and tables are the paper's.
"""

import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lamp_fast.cli import expand_path
from lamp_fast.data.sources import catalog
from lamp_fast.errors import InputError
from lamp_fast.fields import (
    FloatOrNone,
    IntOrNone,
    Layers,
    TextOrNone,
    format_layers,
    from_json,
    peek,
)

# A user's own pictures: trained and tested as they are, where papers halve and thin the classes.
OWN_DATA = ("folder", "table")
SPLITS = ("all", "base-new")
AUTO = "auto"


@dataclass(frozen=True)
class ClipConfig:
    """The frozen CLIP."""

    clip: str = "tiny"
    """An open_clip model name such as ViT-B-16, or "tiny": the small one the package carries."""
    pretrained: str | None = None
    """A tag (openai), a local state dict (.safetensors, .pt), or "random"."""
    weights_of: str | None = None
    """The tag whose weights the file of --pretrained holds, such as openai: it decides activation
    and normalisation. Files of some tags are recognised."""
    init_seed: int = 0
    """Seed of the weights when --pretrained random."""


def _read_cap(arguments: list[str]) -> int | str | None:
    word = arguments[0].lower()
    return {"none": None, AUTO: AUTO}[word] if word in ("none", AUTO) else int(word)


Cap = Annotated[
    int | str | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|none|auto",
        instance_from_str=_read_cap,
        is_instance=lambda value: value is None or value == AUTO or isinstance(value, int),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    ),
]


@dataclass(frozen=True)
class DataConfig:
    """The pictures and the protocol that draws from them."""

    data: str = "digits"
    """digits; folder (one folder of pictures a class) or table (see --table); or one of the field's
    data sets in CoOp's layout (docs/data.md): caltech101, oxford_pets, stanford_cars, flowers102,
    food101, fgvc_aircraft, sun397, dtd, eurosat, ucf101, imagenet."""
    root: Path | None = None
    """The folder that holds the data set's folder; for --data folder the class folders; for --data
    table what its paths start from, by default the table's own folder."""
    table: Path | None = None
    """For --data table: a .csv or .parquet file with a row a picture."""
    path_column: str = "path"
    """The table's column of paths."""
    label_column: str = "label"
    """The table's column of class names."""
    split_column: str | None = None
    """The table's column of train, val and test; by default "split" where there is one."""
    template: str | None = None
    """Class prompt with {} for the name; by default the data set's own."""
    split: str | None = None
    """all trains and tests every class together, the default for folder and table; base-new trains
    the first half and also tests the rest, as papers do, the default for the others."""
    imb: float | None = None
    """Imbalance ratio of the base training set; by default 10, but 1 (as it is) with --shots and
    for folder and table."""
    cap: Cap = AUTO
    """Most pictures a class before the long tail is drawn; none takes the classes as they are; by
    default 100, but none for folder and table."""
    shots: IntOrNone = None
    """Few-shot: this many pictures a class, in place of --cap."""
    skip_unreadable: bool = False
    """Count unreadable pictures and go on without them."""
    downscale: IntOrNone = None
    """Scale larger pictures down to this shorter side when they are decoded: less to keep and to
    read, but other crops than from the files."""

    def __post_init__(self) -> None:
        # One name for a data set, whatever it was called: settings, folders and runs go by it.
        object.__setattr__(self, "data", catalog.find(self.data) or self.data)

    def resolved(self) -> "DataConfig":
        """The same with the defaults of the data set filled in and absolute paths."""
        own = self.data in OWN_DATA
        imb = 1.0 if own or self.shots is not None else 10.0
        return replace(
            self,
            root=None if self.root is None else expand_path(self.root).absolute(),
            table=None if self.table is None else expand_path(self.table).absolute(),
            split=self.split or ("all" if own else "base-new"),
            imb=imb if self.imb is None else self.imb,
            cap=(None if own else 100) if self.cap == AUTO else self.cap,
        )


@dataclass(frozen=True)
class LampConfig:
    """LAMP: prompt pool (MPP), modality-shared prompts (MSP), load balancing (LBO)."""

    k: int = 2
    """K: prompts retrieved from each layer's pool."""
    s: int = 2
    """S: modality-shared prompts of each layer."""
    d: int = 32
    """D: width of the prompts before projection."""
    layers: Layers = tuple(range(3, 13))
    """Sec: the layers with prompts, from 1, both ends included (3..12, or 3,5,9)."""
    m: int = 20
    """M: prompts in each layer's pool."""
    beta: float = 1.0
    """Weight of the similarity loss (Eq. 11)."""
    gamma: float = 5e-4
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
    phi_hidden: int = 32
    """Width between the two layers of --phi mlp."""
    phi_bias: bool = True
    """Off: projectors without biases (an ablation)."""
    similarity_gradient: Literal["keys", "both"] = "keys"
    """What the similarity loss moves: the keys alone, or also the tokens that they are compared
    with, and so the prompts of every layer below."""
    adapt_passes: int = 1
    """Passes over the unlabelled new-class pictures that adapt the bias (the transductive row)."""

    @property
    def phi_widths(self) -> tuple[int, ...]:
        """Widths that a prompt passes through in phi before the tower's."""
        return (self.d, self.phi_hidden) if self.phi == "mlp" else (self.d,)


@dataclass(frozen=True)
class ContextConfig:
    """Learned context words (coop, cocoop, maple, tcp)."""

    n_ctx: int = 4
    """How many tokens of the class prompt are learned, right behind bot."""
    ctx_init: TextOrNone = "a photo of a"
    """Words that the class prompt begins with and whose embeddings start the learned tokens; none
    draws them from N(0, 0.02^2)."""


@dataclass(frozen=True)
class MapleConfig:
    """MaPLe."""

    depth: int = 9
    """Layers with prompts of their own, from the first; cut to the shallower tower."""


@dataclass(frozen=True)
class TcpConfig:
    """TCP: textual class-aware prompts."""

    knowledge_layer: int = 9
    """The text layer, from 1, before which the learned tokens give way to class-aware ones: 9 of
    12; two thirds down in a text tower of another depth."""
    knowledge_weight: float = 8.0
    """Weight of the distance between learned and zero-shot text features."""


@dataclass(frozen=True)
class MmaConfig:
    """MMA: multi-modal adapters."""

    adapter_layers: Layers = tuple(range(5, 13))
    """Layers with adapters, from 1; cut to the shallower tower."""
    adapter_width: int = 32
    """Width between the projections down and up."""
    adapter_scale: float = 1e-3
    """What an adapter's output is multiplied by."""


@dataclass(frozen=True)
class LfaConfig:
    """LFA: linear feature alignment; --epochs counts its iterations."""

    procrustes_beta: FloatOrNone = 0.9
    """How far the closed-form start is drawn to the identity; none cross-validates it on the
    training set."""
    neighbours: int = 3
    """Nearest classes that the re-ranking loss looks at."""
    feature_noise: float = 0.035
    """Standard deviation of the noise on every second iteration's features."""
    feature_dropout: float = 0.05
    """Share of every second iteration's features that is dropped."""


@dataclass(frozen=True)
class CandleConfig:
    """Candle: prototypes of both kinds and attention between them."""

    prototype_scale: float = 1.0
    """Logit scale against visual prototypes, in units of CLIP's."""
    fusion_heads: int = 8
    """Attention heads."""
    fusion_dropout: float = 0.1
    """Dropout of attention weights in training."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation, as the peers do it: the rate is stepped per epoch."""

    optimiser: Literal["adamw", "adam", "sgd"] = "adamw"
    """sgd has momentum 0.9, the others betas (0.9, 0.999)."""
    lr: float = 3e-3
    lr_end: float = 0.0
    """What the cosine falls towards."""
    weight_decay: float = 5e-4
    eps: float = 1e-8
    """Of adamw and adam."""
    epochs: int = 50
    batch: int = 4
    """Pictures an optimiser step."""
    accumulate: int = 1
    """Process each batch in this many pieces: less memory, the same step."""
    clip_grad: FloatOrNone = None
    """Largest gradient norm; none leaves gradients alone."""
    warmup_epochs: int = 1
    """Epochs at --warmup-lr first (none where there is only one epoch)."""
    warmup_lr: float = 1e-5
    logit_adjustment: bool = False
    """Add tau * log prior to the training logits (Menon et al. 2020): the tables' "+LA"."""
    tau: float = 1.0


@dataclass(frozen=True)
class Trimming:
    """What the exact path leaves out. All of it is exact to rounding; a switch each, for study."""

    fold_quick_gelu: bool = True
    """Write QuickGELU as SiLU over folded weights (float32 and float64)."""
    prepare_text: bool = True
    """Run the text layers below the first selected one once per class set."""
    project_once: bool = True
    """Project each layer's pool once a step, then index."""
    last_row: bool = True
    """In the last layer compute the cls and eot rows alone."""
    share_tokens: bool = True
    """Compute what class prompts share once an image (text per image only)."""
    share_routes: bool = True
    """Images that retrieved the same prompts so far share their text computation."""
    cache_text: bool = True
    """Keep text features per class until weights, bias or classes change."""
    block: IntOrNone = None
    """(image, class) pairs encoded at once; none decides by free memory when the run begins."""
    most_rows: int = 192
    """Text rows of one sequence of classes."""
    as_published: bool = False
    """Trim nothing of the methods LAMP is compared with: 77 tokens, text encoded anew for every
    batch where their code does (for timing; LAMP has --path literal)."""


@dataclass(frozen=True)
class MachineConfig:
    """Where and how fast; nothing here changes a result beyond rounding."""

    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Compute type of the frozen CLIP: bf16 on a GPU, fp32 on a CPU; parameters, cosines and logits
    stay at least fp32."""
    threads: IntOrNone = None
    """CPU threads; none leaves it to torch."""
    ops: Literal["auto", "reference"] = "auto"
    """reference runs every op in plain torch (python -m lamp_fast.info shows what auto takes)."""
    workers: int = 0
    """Processes that load pictures; 0 loads in the main one."""
    cache_size: float = 10.0
    """Gigabytes of decoded pictures to keep between epochs and runs, in $LAMP_FAST_CACHE or
    ~/.cache/lamp_fast; 0 keeps none. python -m lamp_fast.cache shows and clears them."""
    transforms: Literal["auto", "host", "device"] = "auto"
    """Where pictures are cropped, scaled and normalised: by torchvision where they are loaded, or a
    batch at a time on the device, with the same crops and within a step of 255 of the same pixels;
    auto takes a GPU where there is one."""
    test_batch: int = 100
    """Pictures an evaluation batch."""
    graph: bool = True
    """On a GPU, replay the training step as one CUDA graph where that is exact; the run says
    whether it does, and else why not."""
    path: Literal["exact", "literal"] = "exact"
    """literal: prompts as tokens, 77 tokens, one text pass per (image, class); slow, obvious."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    method: str = "lamp"
    """lamp, zeroshot, coop, cocoop, maple, tcp, mma, lfa or candle."""
    preset: str | None = None
    """Defaults for the flags below: what --method was published with; for LAMP "tiny" without
    --clip, "table16-imb" with it."""
    config: Path | None = None
    """Take the defaults, but for --out, from this saved config.json."""
    seed: int = 1
    out: Path | None = None
    """Run folder; by default a new one under runs/."""
    resume: bool = False
    """Go on from the checkpoint in --out."""
    overwrite: bool = False
    """Replace what is in --out."""
    tensorboard: bool = False
    """Also write each epoch as TensorBoard events (needs the tensorboard extra)."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lamp: LampConfig = field(default_factory=LampConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    maple: MapleConfig = field(default_factory=MapleConfig)
    tcp: TcpConfig = field(default_factory=TcpConfig)
    mma: MmaConfig = field(default_factory=MmaConfig)
    lfa: LfaConfig = field(default_factory=LfaConfig)
    candle: CandleConfig = field(default_factory=CandleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    trim: Trimming = field(default_factory=Trimming)


# The settings that each method reads; of the others a run may change none.
READS: dict[str, tuple[str, ...]] = {
    "lamp": ("lamp",),
    "zeroshot": (),
    "coop": ("context",),
    "cocoop": ("context",),
    "maple": ("context", "maple"),
    "tcp": ("context", "tcp"),
    "mma": ("mma",),
    "lfa": ("lfa",),
    "candle": ("candle",),
}


# Methods whose class prompt is their own on every data set.
OWN_PROMPT = ("coop", "cocoop", "maple", "mma")


@dataclass(frozen=True)
class Preset:
    """Defaults by the name of a group of settings; what it leaves out is the group's own."""

    method: str
    groups: Mapping[str, Mapping[str, Any]]


def _preset(method: str, optim: Mapping[str, Any], **groups: Mapping[str, Any]) -> Preset:
    return Preset(method, {"optim": optim, **groups})


def _sgd(lr: float, epochs: int, batch: int, warmup_epochs: int = 1) -> dict[str, Any]:
    return {
        "optimiser": "sgd",
        "lr": lr,
        "epochs": epochs,
        "batch": batch,
        "warmup_epochs": warmup_epochs,
    }


_SECTION_41 = {"optimiser": "adam", "lr": 3e-4, "batch": 128, "epochs": 50}
_TCP_ADAM = {"optimiser": "adam", "lr": 2e-3, "eps": 1e-3, "epochs": 50, "batch": 32}
_LFA_ADAMW = {"lr": 5e-4, "lr_end": 1e-7, "warmup_epochs": 0, "batch": 1 << 20}

# LAMP's presets are the paper's and the carried CLIP's. Those of the methods that it is compared
# with are what their code ships: NAME for base-to-new, NAME-all for training on every class.
PRESETS: dict[str, Preset] = {
    "table16-imb": _preset("lamp", {}),
    "table16-fewshot": _preset("lamp", {"lr": 1e-3, "batch": 32}, lamp={"k": 4, "s": 4}),
    "table16-cross": _preset("lamp", {"lr": 1e-3, "batch": 32, "epochs": 1}, lamp={"k": 4, "s": 4}),
    "section4.1": _preset("lamp", _SECTION_41),
    "ablation-best": _preset(
        "lamp",
        _SECTION_41,
        lamp={"k": 6, "s": 4, "d": 64, "layers": tuple(range(6, 13)), "beta": 2.0},
    ),
    "tiny": _preset(
        "lamp",
        {"lr": 3e-3, "batch": 16, "epochs": 30},
        lamp={"layers": (3, 4, 5, 6), "adapt_passes": 10},
    ),
    "coop": _preset("coop", _sgd(2e-3, 200, 32)),
    "coop-all": _preset("coop", _sgd(2e-3, 200, 32), context={"n_ctx": 16, "ctx_init": None}),
    "cocoop": _preset("cocoop", _sgd(2e-3, 10, 1)),
    "maple": _preset("maple", _sgd(3.5e-3, 5, 4), context={"n_ctx": 2}),
    "maple-all": _preset("maple", _sgd(2.6e-3, 2, 4), context={"n_ctx": 2}, maple={"depth": 3}),
    "tcp": _preset("tcp", _TCP_ADAM, context={"ctx_init": None}),
    "mma": _preset("mma", _sgd(1.5e-3, 5, 16, warmup_epochs=0)),
    "lfa": _preset("lfa", {**_LFA_ADAMW, "epochs": 50}),
    "lfa-all": _preset("lfa", {**_LFA_ADAMW, "epochs": 200}, lfa={"procrustes_beta": None}),
    "candle": _preset("candle", _sgd(3e-4, 50, 128)),
}

# Where the published setting differs by data set.
PUBLISHED_FOR_DATA: dict[tuple[str, str], dict[str, Any]] = {
    ("coop", "imagenet"): {"epochs": 50},
    ("coop-all", "imagenet"): {"epochs": 50},
    ("tcp", "imagenet"): {"epochs": 25},
    ("tcp", "sun397"): {"epochs": 25},
    ("mma", "imagenet"): {"batch": 128},
}
# LFA's iterations: base-to-new, and on every class.
for _data, _base_new, _all in (
    ("caltech101", 40, 1000),
    ("dtd", 100, 1000),
    ("eurosat", 50, 100),
    ("fgvc_aircraft", 100, 1000),
    ("flowers102", 50, 100),
    ("food101", 50, 100),
    ("imagenet", 100, 200),
    ("oxford_pets", 10, 30),
    ("stanford_cars", 50, 2000),
    ("sun397", 50, 100),
    ("ucf101", 100, 200),
):
    PUBLISHED_FOR_DATA["lfa", _data] = {"epochs": _base_new}
    PUBLISHED_FOR_DATA["lfa-all", _data] = {"epochs": _all}


# The flags that decide what the others' defaults are.
CHOOSE_DEFAULTS = ("method", "preset", "config", "clip", "data", "split", "shots")


def default_config(argv: typing.Sequence[str]) -> TrainConfig:
    """The defaults that explicit flags override: of ``--config``, of the preset, or of the method.

    Only the flags that choose defaults are looked at, in ``--flag value`` or ``--flag=value`` form.

    Raises:
        InputError: an unknown preset or one of another method, or a config file that cannot be
            read.
    """
    given = peek(argv, *CHOOSE_DEFAULTS)
    base = TrainConfig()
    if "config" in given:
        # Its settings, not its folder: that one is full.
        file = expand_path(given["config"])
        base = replace(load_config(file), config=file, out=None)
        if given.get("method", base.method) == base.method and "preset" not in given:
            return base
    if "preset" in given:
        config = apply_preset(base, given["preset"])
        if given.get("method", config.method) != config.method:
            raise InputError(
                f"--preset {given['preset']}: is of --method {config.method}, not {given['method']}"
            )
        return config
    method = given.get("method", "lamp")
    if method == "lamp":
        carried = given.get("clip", base.clip.clip) == "tiny"
        return apply_preset(base, "tiny" if carried else "table16-imb")
    named = {name: given[name] for name in ("data", "split") if name in given}
    data = replace(base.data, **named).resolved()
    shots = given.get("shots", base.data.shots)
    return apply_published(
        base, method, data.data, data.split, None if shots is None else str(shots)
    )


def apply_preset(config: TrainConfig, name: str) -> TrainConfig:
    """Set everything that the preset ``name`` says, its method's other settings to their own."""
    if name not in PRESETS:
        raise InputError(f"--preset {name}: expected one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    return _with_groups(replace(config, method=preset.method, preset=name), preset.groups)


def apply_published(
    config: TrainConfig, method: str, data: str, split: str, shots: str | None = None
) -> TrainConfig:
    """Set what a method's own code uses for a benchmark; a method without presets keeps ours.

    Args:
        config: everything else.
        method: its name.
        data: the data set's name.
        split: "base-new" or "all".
        shots: pictures a class, where it is few-shot.
    """
    names = [method] if split == "base-new" else [f"{method}-all", method]
    name = next((each for each in names if each in PRESETS), None)
    if name is None:
        return _with_groups(replace(config, method=method, preset=None), {})
    config = apply_preset(config, name)
    changes = dict(PUBLISHED_FOR_DATA.get((name, data), {}))
    if name == "coop-all" and not changes and shots in ("1", "2", "4"):
        changes["epochs"] = 50 if shots == "1" else 100
    return replace(config, optim=replace(config.optim, **changes))


def _with_groups(config: TrainConfig, groups: Mapping[str, Mapping[str, Any]]) -> TrainConfig:
    names = {"optim"}.union(*READS.values())
    kinds = {each.name: each.type for each in fields(TrainConfig) if each.name in names}
    return replace(config, **{name: kind(**groups.get(name, {})) for name, kind in kinds.items()})


def validate(config: TrainConfig) -> None:
    """Refuse values that no data or model could make sense of.

    Raises:
        InputError: naming the first such flag, its value and what was expected.
    """
    lamp, optim, data, machine = config.lamp, config.optim, config.data, config.machine
    least: list[tuple[str, Any, Any]] = [
        ("--k", lamp.k, 1),
        ("--s", lamp.s, 1),
        ("--d", lamp.d, 1),
        ("--m", lamp.m, 1),
        ("--phi-hidden", lamp.phi_hidden, 1),
        ("--adapt-passes", lamp.adapt_passes, 1),
        ("--epochs", optim.epochs, 1),
        ("--batch", optim.batch, 1),
        ("--accumulate", optim.accumulate, 1),
        ("--warmup-epochs", optim.warmup_epochs, 0),
        ("--beta", lamp.beta, 0),
        ("--gamma", lamp.gamma, 0),
        ("--weight-decay", optim.weight_decay, 0),
        ("--tau", optim.tau, 0),
        ("--lr-end", optim.lr_end, 0),
        ("--n-ctx", config.context.n_ctx, 1),
        ("--depth", config.maple.depth, 1),
        ("--knowledge-layer", config.tcp.knowledge_layer, 1),
        ("--knowledge-weight", config.tcp.knowledge_weight, 0),
        ("--adapter-width", config.mma.adapter_width, 1),
        ("--procrustes-beta", config.lfa.procrustes_beta, 0),
        ("--neighbours", config.lfa.neighbours, 1),
        ("--feature-noise", config.lfa.feature_noise, 0),
        ("--feature-dropout", config.lfa.feature_dropout, 0),
        ("--prototype-scale", config.candle.prototype_scale, 0),
        ("--fusion-heads", config.candle.fusion_heads, 1),
        ("--fusion-dropout", config.candle.fusion_dropout, 0),
        ("--workers", machine.workers, 0),
        ("--cache-size", machine.cache_size, 0),
        ("--downscale", data.downscale, 1),
        ("--test-batch", machine.test_batch, 1),
        ("--threads", machine.threads, 1),
        ("--imb", data.imb, 1),
        ("--cap", None if isinstance(data.cap, str) else data.cap, 1),
        ("--shots", data.shots, 1),
        ("--seed", config.seed, 0),
        ("--block", config.trim.block, 1),
        ("--most-rows", config.trim.most_rows, 1),
    ]
    for flag, value, minimum in least:
        if value is not None and not minimum <= value < float("inf"):
            raise InputError(f"{flag} {value}: expected at least {minimum}")
    for flag, value in (
        ("--lr", optim.lr),
        ("--warmup-lr", optim.warmup_lr),
        ("--clip-grad", optim.clip_grad),
        ("--eps", optim.eps),
        ("--adapter-scale", config.mma.adapter_scale),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{flag} {value}: expected more than 0")
    for flag, value in (
        ("--feature-dropout", config.lfa.feature_dropout),
        ("--fusion-dropout", config.candle.fusion_dropout),
    ):
        if value >= 1:
            raise InputError(f"{flag} {value}: expected less than 1")
    _refuse_unread(config)
    if lamp.k > lamp.m:
        raise InputError(f"--k {lamp.k}: expected at most the pool size --m {lamp.m}")
    if lamp.phi == "linear" and lamp.phi_hidden != LampConfig.phi_hidden:
        raise InputError(f"--phi-hidden {lamp.phi_hidden}: --phi linear has no hidden layer")
    if not (lamp.mpp or lamp.msp):
        raise InputError("--no-mpp --no-msp: expected at least one of the two kinds of prompts")
    if config.resume and config.overwrite:
        raise InputError("--resume --overwrite: expected one of the two")
    if isinstance(data.cap, str) and data.cap != AUTO:
        raise InputError(f"--cap {data.cap}: expected a number, none or {AUTO}")
    if data.split is not None and data.split not in SPLITS:
        raise InputError(f"--split {data.split}: expected {' or '.join(SPLITS)}")
    if data.table is not None and data.data != "table":
        raise InputError(f"--table {data.table}: expected --data table with it, not {data.data}")
    if data.template is not None and config.method in OWN_PROMPT:
        raise InputError(
            f"--template {data.template!r}: --method {config.method} has a prompt of its own"
        )
    if data.template is not None and data.template.count("{}") != 1:
        raise InputError(f"--template {data.template!r}: expected {{}} once, for the class name")


def _refuse_unread(config: TrainConfig) -> None:
    """A flag that the method never reads would change nothing, which nobody who gives it means."""
    if config.method not in READS:
        return
    groups = set().union(*READS.values()) - set(READS[config.method])
    for name in sorted(groups):
        group = getattr(config, name)
        for each in fields(group):
            value = getattr(group, each.name)
            if value != each.default:
                flag = each.name.replace("_", "-")
                raise InputError(f"--{flag}: {value!r}, but --method {config.method} has no such")
    if config.method == "lamp" and config.trim.as_published:
        raise InputError("--as-published: expected another --method; LAMP has --path literal")


def describe_read(config: TrainConfig) -> str:
    """The settings that a run's method reads, on one line."""
    values = [
        (each.name, getattr(getattr(config, group), each.name))
        for group in READS[config.method]
        for each in fields(getattr(config, group))
    ]
    values += [(name, getattr(config.optim, name)) for name in ("optimiser", "lr", "batch")]
    return " ".join(
        f"{name}={format_layers(value) if isinstance(value, tuple) else value}"
        for name, value in values
    )


def saved_settings(values: Any, where: str) -> TrainConfig:
    """What a run saved of its settings, in this or an earlier version.

    Before there was a setting, what it decides was fixed: phi was linear, and the similarity loss
    moved keys and tokens.

    Raises:
        InputError: see :func:`from_json`.
    """
    lamp = values.get("lamp") if isinstance(values, Mapping) else None
    if isinstance(lamp, Mapping) and values.get("method") == "lamp":
        values = {**values, "lamp": {"phi": "linear", "similarity_gradient": "both", **lamp}}
    return from_json(TrainConfig, values, where)


def load_config(file: Path) -> TrainConfig:
    """Read the settings of a saved ``config.json`` (the object itself or its ``config`` entry)."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config {file}: not a readable config.json ({error})") from None
    if isinstance(values, dict) and isinstance(values.get("settings"), dict):
        return saved_settings(values["settings"], str(file))
    return from_json(TrainConfig, values, str(file))
