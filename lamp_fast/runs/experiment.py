"""Settings become objects: device, CLIP, pictures and method of one run.

Training, evaluation and prediction assemble the same way, so a saved config is all they need.
"""

import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lamp_fast
from lamp_fast import ops
from lamp_fast.clip import FrozenClip, load_clip, warn_if_random
from lamp_fast.data import (
    Benchmark,
    DataConfig,
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
from lamp_fast.fields import validate
from lamp_fast.files import read_json
from lamp_fast.methods import METHODS, Method, RunClasses, Surroundings
from lamp_fast.runs import checkpoint
from lamp_fast.runs.config import TrainConfig, load_config, to_saved
from lamp_fast.runs.folder import CONFIG, LEARNED, read_learned
from lamp_fast.runs.machine import resolve_machine
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
        block: how many (image, class) pairs the method encodes at once; None where it does not ask.
    """

    config: TrainConfig
    device: torch.device
    clip: FrozenClip
    benchmark: Benchmark
    method: Method
    data_hash: str
    unreadable: tuple[str, ...]
    block: int | None = None

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
        if config.preset is not None:
            optim = {name: getattr(config.optim, name) for name in ("optimiser", "lr", "batch")}
            method += f", preset {config.preset}: {self.method.describe(config.own, optim)}"
        return [*lines, method]

    def record(self) -> dict[str, Any]:
        """What ``config.json`` holds: settings and the identity of everything they led to."""
        return {
            "settings": to_saved(replace(self.config, resume=False, overwrite=False)),
            "block": self.block,
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


def assemble(
    config: TrainConfig, checked: Checked | None = None, block: int | None = None
) -> Experiment:
    """Build every part of a run; nothing is written.

    Args:
        config: the settings.
        checked: what :func:`check_data` gave for them, where another process has called it.
        block: of the run when it was begun, see :func:`recorded_block`; without it and without
            ``--block`` the method chooses one by the memory that is free.

    Raises:
        InputError: the first setting that cannot be served.
    """
    validate(config)
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
    block = method.choose_block(names, benchmark.template, config.trim.block or block)
    config = replace(config, own=method.resolved(config.own))
    return Experiment(config, device, clip, benchmark, method, data_hash, tuple(unreadable), block)


def recorded_block(record: Mapping[str, Any]) -> int | None:
    """What a run's ``config.json`` says of ``block``: a fact of the run, so that one that goes on,
    or is scored again, adds up in the same order; None where nothing was chosen.

    Raises:
        InputError: no number.
    """
    block = record.get("block")
    if block is not None and (type(block) is not int or block < 1):
        raise InputError(f"{CONFIG}: block {block!r}, expected a number of at least 1")
    return block


def check_data(config: TrainConfig) -> Checked:
    """Read every picture of a run once; see :func:`check_benchmark`.

    Raises:
        InputError: see :func:`load_data` and :func:`check_benchmark`.
    """
    validate(config)
    return _check_pictures(load_data(config.data, config.seed)[1], config)


def _check_pictures(benchmark: Benchmark, config: TrainConfig) -> Checked:
    return check_benchmark(benchmark, skip_unreadable=config.data.skip_unreadable)


def check_target(data: DataConfig) -> Checked:
    """Read every test picture of a data set once, to test on it what was trained on another.

    Raises:
        InputError: see :func:`load_source` and :func:`check_benchmark`.
    """
    validate(data)
    benchmark = transfer_benchmark(find_source(data, only_test=True))
    return check_benchmark(benchmark, skip_unreadable=data.skip_unreadable)


def find_source(data: DataConfig, *, only_test: bool = False) -> DataSource:
    """List the pictures of a data set; see :func:`load_source`."""
    data = data.resolved()
    table = None
    if data.table is not None:
        table = Table(data.table, data.path_column, data.label_column, data.split_column)
    return load_source(data.data, data.root, data.template, table, only_test=only_test)


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


def build_method(
    clip: FrozenClip, config: TrainConfig, classes: RunClasses | None = None
) -> Method:
    """The method that ``config.method`` names, with fresh parameters.

    Args:
        clip: the frozen CLIP.
        config: the settings.
        classes: of the run; none where only the method's own parameters are of interest.

    Raises:
        InputError: settings that the CLIP cannot serve, or ``--logit-adjustment`` where the method
            has no use for it.
    """
    kind = METHODS[config.method]
    if config.optim.logit_adjustment and kind.no_logit_adjustment:
        raise InputError(f"--logit-adjustment: {kind.no_logit_adjustment}")
    surroundings = Surroundings(
        classes=classes or RunClasses(),
        trimming=config.trim,
        path=config.machine.path,
        epochs=config.optim.epochs,
        tau=config.optim.tau,
    )
    return kind.build(clip, config.own, surroundings)


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
    experiment = assemble(place(config, ranks), target, recorded_block(record))
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
