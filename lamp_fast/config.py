"""Every setting of a run, its presets, and how both become JSON.

The dataclasses are the single source of the command line, of the saved ``config.json`` and of the
Python interface. Field names are the flags' names; SPEC numbers below are the paper's.
"""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lamp_fast.errors import InputError


def parse_layers(text: str) -> tuple[int, ...]:
    """Read ``3..12``, ``6`` or ``3,5,9..12`` as 1-based layer numbers, ascending.

    Raises:
        ValueError: anything else, naming the text.
    """
    expected = f"--layers {text}: expected layers such as 3..12 or 3,5,9..12, numbered from 1"
    layers: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        if not first.strip().isdigit() or (dots and not last.strip().isdigit()):
            raise ValueError(expected)
        low, high = int(first), int(last) if dots else int(first)
        if low < 1 or high < low:
            raise ValueError(expected)
        layers.update(range(low, high + 1))
    return tuple(sorted(layers))


def format_layers(layers: tuple[int, ...]) -> str:
    """Write layer numbers the way :func:`parse_layers` reads them."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def _or_none(convert: type) -> tyro.constructors.PrimitiveConstructorSpec:
    """A number, or ``none`` in any case."""
    name = convert.__name__

    def read(arguments: list[str]) -> Any:
        return None if arguments[0].lower() == "none" else convert(arguments[0])

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{name.upper()}|none",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, convert),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


Layers = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="A..B",
        instance_from_str=lambda arguments: parse_layers(arguments[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda layers: [format_layers(layers)],
    ),
]
IntOrNone = Annotated[int | None, _or_none(int)]
FloatOrNone = Annotated[float | None, _or_none(float)]


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

    def resolved(self) -> "DataConfig":
        """The same with the defaults of the data set filled in and absolute paths."""
        own = self.data in OWN_DATA
        imb = 1.0 if own or self.shots is not None else 10.0
        return replace(
            self,
            root=None if self.root is None else Path(self.root).expanduser().absolute(),
            table=None if self.table is None else Path(self.table).expanduser().absolute(),
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
    phi_bias: bool = True
    """Off: projectors without bias (an ablation)."""
    adapt_passes: int = 1
    """Passes over the unlabelled new-class pictures that adapt the bias (the transductive row)."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation, as the peers do it: the rate is stepped per epoch."""

    optimiser: Literal["adamw", "adam"] = "adamw"
    lr: float = 3e-3
    weight_decay: float = 5e-4
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


@dataclass(frozen=True)
class MachineConfig:
    """Where and how fast; nothing here changes a result beyond rounding."""

    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Compute type of the frozen CLIP: bf16 on a GPU, fp32 on a CPU; parameters stay fp32."""
    threads: IntOrNone = None
    """CPU threads; none leaves it to torch."""
    workers: int = 0
    """Processes that load pictures; 0 loads in the main one."""
    test_batch: int = 100
    """Pictures an evaluation batch."""
    path: Literal["exact", "literal"] = "exact"
    """literal: prompts as tokens, 77 tokens, one text pass per (image, class); slow, obvious."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    method: str = "lamp"
    """lamp or zeroshot."""
    preset: str | None = None
    """Defaults for the flags below; "tiny" without --clip, "table16-imb" with it."""
    config: Path | None = None
    """Take the defaults from this saved config.json."""
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
    optim: OptimConfig = field(default_factory=OptimConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    trim: Trimming = field(default_factory=Trimming)


def _preset(lamp: Mapping[str, Any], optim: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {"lamp": dict(lamp), "optim": dict(optim)}


_SECTION_41 = {"optimiser": "adam", "lr": 3e-4, "batch": 128, "epochs": 50}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "table16-imb": _preset({}, {}),
    "table16-fewshot": _preset({"k": 4, "s": 4}, {"lr": 1e-3, "batch": 32}),
    "table16-cross": _preset({"k": 4, "s": 4}, {"lr": 1e-3, "batch": 32, "epochs": 1}),
    "section4.1": _preset({}, _SECTION_41),
    "ablation-best": _preset(
        {"k": 6, "s": 4, "d": 64, "layers": tuple(range(6, 13)), "beta": 2.0}, _SECTION_41
    ),
    "tiny": _preset(
        {"layers": (3, 4, 5, 6), "adapt_passes": 10}, {"lr": 3e-3, "batch": 16, "epochs": 30}
    ),
}


def default_config(argv: typing.Sequence[str]) -> TrainConfig:
    """The defaults that explicit flags override: of ``--config``, or of the preset.

    Only ``--preset``, ``--config`` and ``--clip`` are looked at, in ``--flag value`` or
    ``--flag=value`` form.

    Raises:
        InputError: an unknown preset, or a config file that cannot be read.
    """
    given = peek(argv, "preset", "config", "clip")
    if "config" in given:
        base = replace(load_config(Path(given["config"])), config=Path(given["config"]))
        return apply_preset(base, given["preset"]) if "preset" in given else base
    carried = given.get("clip", "tiny") == "tiny"
    return apply_preset(TrainConfig(), given.get("preset", "tiny" if carried else "table16-imb"))


def apply_preset(config: TrainConfig, name: str) -> TrainConfig:
    """Set everything that the preset ``name`` says, starting from the paper's defaults."""
    if name not in PRESETS:
        raise InputError(f"--preset {name}: expected one of {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    return replace(
        config,
        preset=name,
        lamp=LampConfig(**chosen["lamp"]),
        optim=OptimConfig(**chosen["optim"]),
    )


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
        ("--adapt-passes", lamp.adapt_passes, 1),
        ("--epochs", optim.epochs, 1),
        ("--batch", optim.batch, 1),
        ("--accumulate", optim.accumulate, 1),
        ("--warmup-epochs", optim.warmup_epochs, 0),
        ("--beta", lamp.beta, 0),
        ("--gamma", lamp.gamma, 0),
        ("--weight-decay", optim.weight_decay, 0),
        ("--tau", optim.tau, 0),
        ("--workers", machine.workers, 0),
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
    ):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{flag} {value}: expected more than 0")
    if lamp.k > lamp.m:
        raise InputError(f"--k {lamp.k}: expected at most the pool size --m {lamp.m}")
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
    if data.template is not None and data.template.count("{}") != 1:
        raise InputError(f"--template {data.template!r}: expected {{}} once, for the class name")


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass of settings as plain JSON values."""
    return json.loads(json.dumps(asdict(config), default=str))


def from_json(config_class: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """Rebuild a dataclass of settings from :func:`to_json`'s values.

    Raises:
        InputError: an unknown field or a value of another kind, by name.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected an object of settings, got {values!r}")
    known = {each.name: each for each in fields(config_class)}
    hints = typing.get_type_hints(config_class)
    if unknown := sorted(set(values) - set(known)):
        raise InputError(f"{where}: unknown setting {unknown[0]!r}")
    return config_class(
        **{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    )


def load_config(file: Path) -> TrainConfig:
    """Read the settings of a saved ``config.json`` (the object itself or its ``config`` entry)."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config {file}: not a readable config.json ({error})") from None
    if isinstance(values, dict) and isinstance(values.get("settings"), dict):
        values = values["settings"]
    return from_json(TrainConfig, values, str(file))


def _value(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return from_json(hint, value, where)
    if typing.get_origin(hint) is Literal:
        accepted = value in typing.get_args(hint)
    elif typing.get_origin(hint) is tuple:
        accepted = isinstance(value, list) and all(type(each) is int for each in value)
        value = tuple(value) if accepted else value
    else:
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        accepted = (
            (value is None and type(None) in options)
            or (isinstance(value, str) and (str in options or Path in options))
            or (isinstance(value, bool) and bool in options)
            or (type(value) is int and (int in options or float in options))
            or (type(value) is float and float in options)
        )
        if accepted and isinstance(value, str) and Path in options:
            value = Path(value)
    if not accepted:
        raise InputError(f"{where}: {value!r} is not {hint}")
    return value


def peek(argv: typing.Sequence[str], *names: str) -> dict[str, str]:
    """Values of some flags in raw arguments, before they are parsed as a whole."""
    found = {}
    for position, argument in enumerate(argv):
        for name in names:
            if argument == f"--{name}" and position + 1 < len(argv):
                found[name] = argv[position + 1]
            elif argument.startswith(f"--{name}="):
                found[name] = argument.partition("=")[2]
    return found
