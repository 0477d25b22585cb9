"""Settings become objects: device, CLIP, pictures and method of one run.

Training, evaluation and prediction assemble the same way, so a saved config is all they need.
"""

import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lamp_fast
from lamp_fast import ops
from lamp_fast.clip import FrozenClip, load_clip, warn_if_random
from lamp_fast.data import (
    Benchmark,
    DataSource,
    DecodedCache,
    Table,
    build_benchmark,
    check_benchmark,
    decode_through,
    load_source,
    on_device,
    transfer_benchmark,
)
from lamp_fast.data.decoded import default_folder
from lamp_fast.data.loading import Batch, Transform
from lamp_fast.data.resample import PackTransform
from lamp_fast.data.transforms import evaluation_transform, training_transform
from lamp_fast.errors import InputError
from lamp_fast.fields import format_layers, to_json
from lamp_fast.files import read_json
from lamp_fast.methods import METHODS, Method, RunClasses, build_method
from lamp_fast.runs import checkpoint
from lamp_fast.runs import config as settings
from lamp_fast.runs.config import DataConfig, MachineConfig, TrainConfig, load_config
from lamp_fast.runs.folder import CONFIG, LEARNED, read_learned
from lamp_fast.runs.ranks import ALONE, Ranks, place

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


# The readable pictures of a run, the names of the others, the sha256 of all that is read.
Checked = tuple[Benchmark, tuple[str, ...], str]


@dataclass(frozen=True)
class Experiment:
    """Everything that a run is made of, ready to use.

    Attributes:
        config: the settings with every "auto" resolved.
        unreadable: names of the pictures that were skipped.
        data_hash: sha256 over names, labels and bytes of every picture of the run.
    """

    config: TrainConfig
    device: torch.device
    clip: FrozenClip
    benchmark: Benchmark
    method: Method
    data_hash: str
    unreadable: tuple[str, ...]

    @property
    def test_transform(self) -> Transform:
        return self._transform(random=False)

    @property
    def train_transform(self) -> Transform:
        """Random crops and flips, or the test transform for data that they would spoil (digits)."""
        return self._transform(random=self.benchmark.augment)

    def on_device(self, batches: Iterable[Batch]) -> Iterator[list[torch.Tensor]]:
        """Batches as this run's device and CLIP want them; see :func:`lamp_fast.data.on_device`."""
        return on_device(batches, self.device, self.clip.dtype)

    def _transform(self, *, random: bool) -> Transform:
        if self.config.machine.transforms == "device":
            return PackTransform(self.clip.preprocessing, random=random)
        transform = training_transform if random else evaluation_transform
        return transform(self.clip.preprocessing)

    def describe(self) -> list[str]:
        """The first lines of a run: what CLIP, what data, what method."""
        identity, config = self.clip.identity, self.config
        lines = [
            f"clip    {identity.name}, weights {identity.weights}, {identity.activation},"
            f" {len(self.clip.vision.blocks)}+{len(self.clip.text.blocks)} layers,"
            f" {self.device.type} {config.machine.precision}",
            *(f"data    {line}" for line in self.benchmark.describe()),
        ]
        if self.unreadable:
            lines.append(
                f"data    skipped {len(self.unreadable)} unreadable, first {self.unreadable[0]}"
            )
        method = f"method  {config.method}, {self.method.trainable_parameters():,} parameters"
        if config.method == "lamp":
            lamp = config.lamp
            method += (
                f", preset {config.preset}: K={lamp.k} S={lamp.s} D={lamp.d} M={lamp.m}"
                f" layers {format_layers(lamp.layers)} beta={lamp.beta:g}"
                f" gamma={lamp.gamma:g} text per {lamp.text_query}, {config.machine.path} path"
            )
        elif config.preset is not None:
            method += f", preset {config.preset}: {settings.describe_read(config)}"
        return [*lines, method]

    def record(self) -> dict[str, Any]:
        """What ``config.json`` holds: settings and the identity of everything they led to."""
        return {
            "settings": to_json(replace(self.config, resume=False, overwrite=False)),
            "version": lamp_fast.__version__,
            "commit": _commit(),
            "torch": torch.__version__,
            "clip": asdict(self.clip.identity),
            "data": {
                "sha256": self.data_hash,
                "base_names": list(self.benchmark.base_names),
                "new_names": list(self.benchmark.new_names),
                "template": self.benchmark.template,
                "counts": [int(count) for count in self.benchmark.counts],
                "unreadable": list(self.unreadable),
            },
        }


def assemble(config: TrainConfig, checked: Checked | None = None) -> Experiment:
    """Build every part of a run; nothing is written.

    Args:
        config: the settings.
        checked: what :func:`check_data` gave for them, where another process has called it.

    Raises:
        InputError: the first setting that cannot be served.
    """
    settings.validate(config)
    if config.method not in METHODS:
        raise InputError(f"--method {config.method}: expected one of {', '.join(METHODS)}")
    machine, device = resolve_machine(config.machine)
    config = replace(config, machine=machine, data=config.data.resolved())
    if config.machine.threads is not None:
        torch.set_num_threads(config.machine.threads)
    ops.prefer(None if config.machine.ops == "auto" else config.machine.ops)
    clip = build_clip(config)
    listed = checked[0] if checked else load_data(config.data, config.seed)[1]
    torch.manual_seed(config.seed)
    method = build_method(clip, config, RunClasses(listed.base_names, listed.new_names))
    benchmark, unreadable, data_hash = checked or _check_pictures(listed, config)
    cache = None
    if config.machine.cache_size and benchmark.train.arrays is None:
        cache = DecodedCache(default_folder(), round(config.machine.cache_size * 1e9))
    benchmark = decode_through(benchmark, cache, config.data.downscale)
    names = max(benchmark.base_names, benchmark.new_names, key=len)
    config = method.decided(config, names, benchmark.template)
    if config.trim.block is None:
        method.block = method.choose_block(names, benchmark.template)
        config = replace(config, trim=replace(config.trim, block=method.block))
    return Experiment(config, device, clip, benchmark, method, data_hash, tuple(unreadable))


def check_data(config: TrainConfig) -> Checked:
    """Read every picture of a run once; see :func:`check_benchmark`.

    Raises:
        InputError: see :func:`load_data` and :func:`check_benchmark`.
    """
    settings.validate(config)
    return _check_pictures(load_data(config.data, config.seed)[1], config)


def _check_pictures(benchmark: Benchmark, config: TrainConfig) -> Checked:
    return check_benchmark(benchmark, skip_unreadable=config.data.skip_unreadable)


def check_target(data: DataConfig) -> Checked:
    """Read every test picture of a data set once, to test on it what was trained on another.

    Raises:
        InputError: see :func:`load_source` and :func:`check_benchmark`.
    """
    settings.validate(TrainConfig(data=data))
    benchmark = transfer_benchmark(find_source(data))
    return check_benchmark(benchmark, skip_unreadable=data.skip_unreadable)


def find_source(data: DataConfig) -> DataSource:
    """List the pictures of a data set; see :func:`load_source`."""
    data = data.resolved()
    table = None
    if data.table is not None:
        table = Table(data.table, data.path_column, data.label_column, data.split_column)
    return load_source(data.data, data.root, data.template, table)


def load_data(data: DataConfig, seed: int) -> tuple[DataSource, Benchmark]:
    """List the pictures of a data set and apply the protocol; no picture is read yet.

    Raises:
        InputError: see :func:`load_source` and :func:`build_benchmark`.
    """
    data = data.resolved()
    source = find_source(data)
    benchmark = build_benchmark(
        source, split=data.split, imb=data.imb, cap=data.cap, shots=data.shots, seed=seed
    )
    return source, benchmark


def build_clip(config: TrainConfig) -> FrozenClip:
    """The frozen CLIP of a run whose machine is resolved; random weights are warned of.

    Raises:
        InputError: see :func:`load_clip`.
    """
    clip = load_clip(
        config.clip.clip,
        config.clip.pretrained,
        init_seed=config.clip.init_seed,
        device=config.machine.device,
        dtype=DTYPES[config.machine.precision],
        fold=config.trim.fold_quick_gelu,
    )
    warn_if_random(clip.identity)
    return clip


def resolve_machine(machine: MachineConfig) -> tuple[MachineConfig, torch.device]:
    """Decide every "auto" of the machine; the device is there.

    Raises:
        InputError: a device that is not, or a precision that it cannot compute in.
    """
    name = machine.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    precision = machine.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16: expected fp32, bf16 or fp64 on a CPU")
    transforms = machine.transforms
    if transforms == "auto":
        transforms = "device" if device.type == "cuda" else "host"
    machine = replace(machine, device=str(device), precision=precision, transforms=transforms)
    return machine, device


def load_run(
    folder: Path, ranks: Ranks = ALONE, *, root: Path | None = None, table: Path | None = None
) -> tuple[Experiment, dict[str, Any]]:
    """Rebuild a finished run from its folder, on this rank's device.

    Args:
        folder: of the run.
        ranks: the processes that will share the pictures.
        root, table: where its pictures lie now, if not where the run found them.

    Returns:
        The experiment with its learned state, and the facts stored with that state.

    Raises:
        InputError: files missing or damaged, or data or CLIP that are no longer the run's.
    """
    config = load_config(folder / CONFIG)
    data = replace(config.data, root=root or config.data.root, table=table or config.data.table)
    experiment, facts = _load_run(folder, replace(config, data=data), ranks)
    then = read_json(folder / CONFIG)["data"]["sha256"]
    _refuse_another("data", folder, experiment.data_hash, then)
    return experiment, facts


def load_run_on(
    folder: Path, target: DataConfig, ranks: Ranks = ALONE
) -> tuple[Experiment, dict[str, Any]]:
    """Rebuild a finished run to test it on another data set; its own pictures are not needed.

    The target's names and template take the place of the run's classes, and the load-balancing bias
    is b_base. :func:`transfer_rows` scores the result.

    Args:
        folder: of the run.
        target: the data set to test on; how it would be drawn from for training does not matter.
        ranks: the processes that will share the pictures.

    Raises:
        InputError: as :func:`load_run`, or a target that is missing, incomplete or malformed.
    """
    ranks.together(read_learned, folder)  # refused before a large data set is read
    checked = ranks.once(check_target, target)
    config = load_config(folder / CONFIG)
    experiment, facts = ranks.together(_load_run, folder, config, ranks, checked)
    benchmark, unreadable, _ = checked
    return replace(experiment, benchmark=benchmark, unreadable=unreadable), facts


def _load_run(
    folder: Path, config: TrainConfig, ranks: Ranks, target: Checked | None = None
) -> tuple[Experiment, dict[str, Any]]:
    """A run with its learned state; with a target, over that one's pictures instead of its own."""
    record = read_json(folder / CONFIG)
    tensors, facts = read_learned(folder)
    if target is not None:
        # A method may hold state by class: it is built for the classes that the run knew.
        own = ("base_names", "new_names")
        named = replace(target[0], **{each: tuple(record["data"][each]) for each in own})
        target = (named, *target[1:])
    experiment = assemble(place(config, ranks), target)
    clip = experiment.clip.identity.fingerprint
    _refuse_another("CLIP weights", folder, clip, record["clip"]["fingerprint"])
    checkpoint.load_into(experiment.method, tensors, folder / LEARNED)
    return experiment, facts


def _refuse_another(what: str, folder: Path, now: str, then: str) -> None:
    if now != then:
        raise InputError(
            f"{folder}: the {what} are not those of the run (sha256 {now[:12]}, then {then[:12]})"
        )


def _commit() -> str | None:
    """The package's git commit, where it runs from a checkout."""
    folder = Path(lamp_fast.__file__).parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
