"""The one reader of finished runs: whoever evaluates, predicts, exports or reports begins here.

A run folder, or a saved classifier, is data from outside. Its record is held to a schema, its
tensors to their digest, and names, shapes and dtypes to a method that holds no numbers, before any
memory is taken that only the settings ask for.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamp_fast.clip.towers import FrozenClip
from lamp_fast.errors import InputError
from lamp_fast.files import read_json
from lamp_fast.methods.base import Method
from lamp_fast.methods.surroundings import RunClasses
from lamp_fast.runs.building import build_method
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.fitted import Fitted, read_fitted
from lamp_fast.runs.folder import ANSWERS, CONFIG, LEARNED, RESULT, WEIGHTS, finished_file
from lamp_fast.runs.record import Record, check_facts, check_rows, read_record
from lamp_fast.tensors import load_tensors

# A float64 run may go on in float32 and the reverse; nothing else is cast.
_FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class SavedRun:
    """A finished run as its folder holds it.

    Attributes:
        folder: where it lies.
        record: its ``config.json``.
        weights: the file of ``tensors`` and ``facts``.
        tensors: what was learned, finite, by name.
        facts: training seconds, epochs, and how the bias was adapted to new classes (or None).
        results: rows of the closing table; None where there is none.
        fitted: what was fitted on validation pictures; None where there were none.
    """

    folder: Path
    record: Record
    weights: Path
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    results: Sequence[Mapping[str, Any]] | None
    fitted: Fitted | None = None

    @property
    def classes(self) -> RunClasses:
        """The classes that it knew."""
        data = self.record.data
        return RunClasses(data.base_names, data.new_names, data.counts)

    def method(self, clip: FrozenClip, config: TrainConfig) -> Method:
        """The trained method, over the run's CLIP.

        Args:
            clip: the frozen CLIP.
            config: the run's settings, on the machine of now.

        Raises:
            InputError: another CLIP, or tensors that are not those of the settings.
        """
        now, then = clip.identity.fingerprint, self.record.clip.fingerprint
        if now != then:
            raise InputError(
                f"{self.folder}: the CLIP weights are not those of the run"
                f" (sha256 {now[:12]}, then {then[:12]})"
            )
        check_state(_shapes(clip, config, self.classes), self.tensors, self.weights)
        with torch.random.fork_rng(devices=[]):  # a fresh method draws what is then overwritten
            method = build_method(clip, config, self.classes)
        method.load_state_dict(dict(self.tensors), strict=True)
        method.block = config.trim.block or self.record.block
        return method


def load(folder: Path) -> SavedRun:
    """Read a finished run, or what ``save_pretrained`` wrote, as far as its own files go.

    Raises:
        InputError: a file that is missing, damaged, or not what a run writes; training that has not
            finished; settings that no version accepts.
    """
    file = folder / CONFIG
    record = read_record(file)
    weights = folder / WEIGHTS
    if (folder / LEARNED).is_file() or not weights.is_file():
        weights = finished_file(folder, LEARNED)
    tensors, facts = load_tensors(weights)
    results = folder / RESULT
    rows = check_rows(read_json(results), str(results)) if results.is_file() else None
    answers, classes = folder / ANSWERS, len(record.data.base_names)
    fitted = read_fitted(answers, tensors, classes) if answers.is_file() else None
    facts = check_facts(facts, str(weights))
    return SavedRun(folder, record, weights, tensors, facts, rows, fitted)


def check_state(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], file: Path) -> None:
    """Hold saved tensors to the names, shapes and dtypes of a method's own.

    Raises:
        InputError: naming the first that differs.
    """
    reason = None
    if missing := sorted(expected.keys() - found.keys()):
        reason = f"{missing[0]} is missing"
    elif unknown := sorted(found.keys() - expected.keys()):
        reason = f"{unknown[0]} is not of it"
    for name in () if reason else expected:
        now, then = expected[name], found[name]
        if now.shape != then.shape:
            reason = f"{name} is {list(then.shape)}, expected {list(now.shape)}"
        elif now.dtype != then.dtype and not {now.dtype, then.dtype} <= set(_FLOATS):
            reason = f"{name} is {then.dtype}, expected {now.dtype}"
        if reason:
            break
    if reason:
        raise InputError(f"{file}: not the state of this model ({reason})")


def _shapes(clip: FrozenClip, config: TrainConfig, classes: RunClasses) -> dict[str, Tensor]:
    """The state of a method with these settings, as tensors without numbers."""
    tensors = [*clip.model.parameters(), *clip.model.buffers()]
    shells = {id(each): _shell(each) for each in tensors}
    model = copy.deepcopy(clip.model, shells)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            shell = FrozenClip(model, clip.preprocessing, clip.tokenizer, clip.identity, fold=False)
            return build_method(shell, config, classes).state_dict()
    except InputError:
        raise
    except Exception as error:  # sizes that no tensor has fail in torch's many ways
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the settings of the run make no method ({reason})") from None


def _shell(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
