"""A data set's pictures become findings: read, encoded or found in the cache, judged, written."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lamp_fast import cli
from lamp_fast.audit.judging import KINDS, Judged, judge
from lamp_fast.audit.page import build_page
from lamp_fast.audit.settings import AuditConfig
from lamp_fast.clip.settings import ClipConfig
from lamp_fast.clip.towers import FrozenClip, at_least_float32
from lamp_fast.data.entries import SPLIT_PARTS
from lamp_fast.data.loading import report_dead_workers
from lamp_fast.data.pictures import check_pictures
from lamp_fast.data.settings import DataConfig, ViewConfig
from lamp_fast.data.sources import DataSource
from lamp_fast.data.sources.excluded import PART, PATH
from lamp_fast.data.views import centre_view
from lamp_fast.errors import InputError
from lamp_fast.files import path_text, write_bytes, write_csv
from lamp_fast.runs.building import build_clip, build_reader, build_transform, warn_of
from lamp_fast.runs.config import TrainConfig
from lamp_fast.runs.experiment import find_source
from lamp_fast.runs.folder import is_filled, make_folder, refuse_nested
from lamp_fast.runs.machine import resolve_machine
from lamp_fast.runs.settings import MachineConfig

TABLE, PAGE = "audit.csv", "audit.html"
HEADER = (
    PATH,
    PART,
    "label",
    "kind",
    "suggested_label",
    "twin",
    "twin_part",
    "twin_label",
    "score",
)
# Of each kind, in words.
TITLES = {
    "label": "suspected labels",
    "leak": "pictures with a copy in a part that is tested on",
    "conflict": "pictures with a copy of another class",
    "outlier": "pictures far from all others",
}
# Rows that are projected at once.
_ROWS = 4096


def audit(
    out: Path,
    data: DataConfig,
    settings: AuditConfig,
    clip: ClipConfig,
    machine: MachineConfig,
    seed: int,
) -> Judged:
    """Look at every picture of a data set, and leave a table and a page in a new folder.

    Args:
        out: the folder.
        data: which data set; no protocol is applied to it.
        settings: what to look for.
        clip: whose features are compared.
        machine: where it runs.
        seed: of the probe's folds.

    Raises:
        InputError: what cannot be read or served; nothing has been written.
    """
    if is_filled(out):
        raise InputError(f"--out {out}: is there already, expected a new folder")
    refuse_nested(out, data)
    with make_folder(out), report_dead_workers():
        resolved, _ = resolve_machine(machine)
        if resolved.threads is not None:
            torch.set_num_threads(resolved.threads)
        source = _readable(find_source(data), data)
        frozen = build_clip(TrainConfig(clip=clip, data=data, machine=resolved))
        warn_of(frozen, data.data)
        features = _features(frozen, source, resolved)
        labels = {part: getattr(source, part).labels for part in SPLIT_PARTS}
        judged = judge(features, labels, len(source.classnames), settings, seed)
        page = build_page(source, judged, settings, frozen.identity, TITLES)
        write_csv(out / TABLE, HEADER, _rows(source, judged))
        write_bytes(out / PAGE, page.encode())
    for line in summary(source, judged, settings):
        cli.say(line)
    cli.say(f"wrote   {out / PAGE}", f"wrote   {out / TABLE}: --exclude takes what you leave in it")
    return judged


def summary(source: DataSource, judged: Judged, settings: AuditConfig) -> Iterator[str]:
    """How much of each kind was found, and what was not judged, a line each."""
    kinds = [each.kind for each in judged.findings]
    for kind in KINDS:
        yield f"audit   {kinds.count(kind):,} {TITLES[kind]}"
    if judged.unjudged:
        names = ", ".join(source.classnames[label] for label in judged.unjudged)
        yield (
            f"audit   labels of {len(judged.unjudged):,} of {len(source.classnames):,} classes are"
            f" not judged, with fewer than {settings.folds} pictures to learn from: {names}"
        )


def _readable(source: DataSource, data: DataConfig) -> DataSource:
    """The same with digests, and without what cannot be read where that is to be skipped."""
    parts = {}
    for part in SPLIT_PARTS:
        pictures = replace(getattr(source, part), downscale=data.downscale)
        parts[part], unreadable, _ = check_pictures(pictures, skip_unreadable=data.skip_unreadable)
        for name in unreadable:
            cli.say(f"skipped {name}", stream=sys.stderr)
    return replace(source, **parts)


@torch.no_grad()
def _features(clip: FrozenClip, source: DataSource, machine: MachineConfig) -> dict[str, Tensor]:
    """Projected features of each part, [N, D], at least float32, on the CLIP's device."""
    views, device = ViewConfig(), next(clip.parameters()).device
    reader = build_reader(clip, machine)
    shown = build_transform(clip, views, machine, centre_view(views, clip.preprocessing.size))
    found = {}
    for part in SPLIT_PARTS:
        pictures = getattr(source, part)
        if not len(pictures):
            found[part] = torch.empty(0, clip.vision.visual.proj.shape[1], device=device)
            continue
        chunks = reader.read(pictures, shown).split(_ROWS)
        projected = [at_least_float32(clip.vision.project(each.to(device))) for each in chunks]
        found[part] = torch.cat(projected)
    return found


def _rows(source: DataSource, judged: Judged) -> Iterator[tuple[str, ...]]:
    for each in judged.findings:
        pictures = getattr(source, each.place.part)
        label = source.classnames[pictures.labels[each.place.row]]
        suggested = "" if each.suggested is None else source.classnames[each.suggested]
        twin = ("", "", "")
        if each.twin is not None:
            others = getattr(source, each.twin.part)
            name = path_text(others.names[each.twin.row])
            twin = (name, each.twin.part, source.classnames[others.labels[each.twin.row]])
        path = path_text(pictures.names[each.place.row])
        score = f"{each.score:.6g}"
        yield (path, each.place.part, label, each.kind, suggested, *twin, score)
